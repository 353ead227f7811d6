"""Memory of a token-weighted loss, relative to a mean loss: unlike models.

Both of its passes run in a loop, which leaves them out if the weight is 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from devices import Device
from results import Row

import accumax

ROWS, PARTS = 8192, 4


def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return jnp.tanh(h @ w) + h, None


def unrolled(stack: Any, x: jax.Array) -> jax.Array:
    for w in stack:
        x, _ = layer(x, w)
    return x


def scanned(stack: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(layer, x, stack)[0]


def rematerialised(stack: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(jax.checkpoint(layer), x, stack)[0]


def convolved(stack: Any, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, 8, 8, 4)
    dims = "NHWC", "HWIO", "NHWC"
    for w in stack:
        kernel = w.reshape(3, 3, 4, 4)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dims
        )
        x = jnp.tanh(y)
    return x.reshape(len(x), -1)


# The shapes of their parameters, and the width of a row.
MODELS: dict[Callable[[Any, jax.Array], jax.Array], tuple[Any, int]] = {
    unrolled: ([(64, 64)] * 8, 64),
    scanned: ((8, 64, 64), 64),
    rematerialised: ((8, 64, 64), 64),
    convolved: ([(3 * 3 * 4, 4)] * 4, 256),
}


def temp(
    model: Callable[[Any, jax.Array], jax.Array],
    form: str,
    weighted: bool,
    on: Device,
    microbatches: int | None = PARTS,
    has_aux: bool = False,
) -> int:
    """Bytes of the temporary memory of `value_and_grad` or `train_step`."""
    sharding = jax.sharding.SingleDeviceSharding(on)

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes, width = MODELS[model]
    params = jax.tree.map(array, shapes, is_leaf=lambda x: isinstance(x, tuple))
    x, mask = array((ROWS, width)), array((ROWS,))

    def each(p: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(model(p, x) ** 2, -1)

    def loss(p: Any, x: jax.Array, mask: jax.Array) -> Any:
        if weighted:
            out = jnp.sum(each(p, x) * mask), jnp.sum(mask)
        else:
            out = jnp.mean(each(p, x))
        return (out, jax.tree.leaves(out)[0]) if has_aux else out

    options: dict[str, Any] = {"has_aux": has_aux, "weighted": weighted}
    if microbatches is not None:
        options |= {"microbatches": microbatches, "batch_argnums": (1, 2)}
    if form == "value_and_grad":
        gradient = jax.jit(accumax.value_and_grad(loss, **options))
        lowered = gradient.lower(params, x, mask)
    else:
        tx = accumax.accumulate(optax.sgd(0.1), 2)
        step = jax.jit(accumax.train_step(loss, tx, **options), donate_argnums=(0, 1))
        state = jax.eval_shape(tx.init, params)
        state = jax.tree.map(lambda s: array(s.shape, s.dtype), state)
        lowered = step.lower(params, state, x, mask)
    memory: Any = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes


def rows(on: Device, target: str) -> list[Row]:
    """`weighted/MODEL/TARGET/{value_and_grad, train_step_divided, train_step}`."""
    forms = {
        "value_and_grad": ("value_and_grad", PARTS),
        "train_step_divided": ("train_step", PARTS),
        "train_step": ("train_step", None),
    }
    found = []
    for model in MODELS:
        for name, (form, parts) in forms.items():
            ours, mean = (temp(model, form, w, on, parts) for w in (True, False))
            row = f"weighted/{model.__name__}/{target}/{name}"
            found.append(Row(row, ours / mean, "x a mean loss"))
    return found
