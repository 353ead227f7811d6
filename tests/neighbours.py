"""What the rows of docs/neighbours.md share, and the page made of them.

A file of rows has a list of its own, since pytest may import it twice, for doctests.
"""

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import big_batch, cast, data, distance, init, loss_fn, microbatches

import accumax

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "neighbours.md"
K, STEPS = 4, 4
FORMS = ("update", "apply_gradients", "train_step")
SGD, ADAM = optax.sgd(0.1), optax.adam(0.05, eps=1e-3)
OPTAX = {  # what the installed Optax has, by the names that the rows use
    prefix + name: thing
    for module, prefix in [
        (optax.transforms, ""),
        (optax, ""),
        (optax.contrib, "contrib."),
    ]
    for name, thing in sorted(vars(module).items())
    if not name.startswith("_")
}
NEWEST = tuple(int(part) for part in optax.__version__.split(".")[:3]) >= (0, 2, 8)


class Row(NamedTuple):
    """A line of the table. `optax_names`: what of Optax it speaks for."""

    name: str
    works: str
    how: str
    meaning: str
    optax_names: tuple[str, ...]
    check: Callable[[], None]


def table():
    """(rows, the decorator that adds one).

    The docstring of a check has the row's two last cells: how | meaning.
    """
    rows = []

    def row(name, works="exact", optax_names=""):
        def add(check):
            how, meaning = " ".join(check.__doc__.split()).split(" | ")
            names = tuple(optax_names.split())
            rows.append(Row(name, works, how, meaning, names, check))
            return check

        return add

    return rows, row


# --- trainings ----------------------------------------------------------------------


def train(step, params, state, batches=None):
    """(params, state) after `step(params, state, call, window)` for every call."""
    for window in batches or data(STEPS):
        for call in microbatches(window, [len(window["x"]) // K] * K):
            params, state = step(params, state, call, window)
    return params, state


def accumulated(tx, params=None, loss=loss_fn, extra=None, form="update", batches=None):
    """(params, state) after all calls; `extra(value, call, window)` is a dict."""
    params = init() if params is None else params
    extra = extra or (lambda value, call, window: {})

    @jax.jit
    def step(params, state, call, window):
        if form == "train_step":
            keywords = extra(jnp.nan, call, window)
            return accumax.train_step(loss, tx)(params, state, call, **keywords)[:2]
        fast = getattr(params, "fast", params)  # of optax.LookaheadParams
        value, grads = jax.value_and_grad(loss)(fast, call)
        keywords = extra(value, call, window)
        if form == "apply_gradients":
            return accumax.apply_gradients(tx, params, state, grads, **keywords)
        updates, state = tx.update(grads, state, params, **keywords)
        return optax.apply_updates(params, updates), state

    return train(step, params, tx.init(params), batches)


def value(value, call, window):
    del call, window
    return {"value": value}


def final(tx, grads, params=None):
    """The parameters, from 0, after a call with each of `grads`."""
    params = jnp.zeros(np.shape(grads[0])) if params is None else params
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
    return params


# --- what they are held against -----------------------------------------------------


def reference(inner, gradient, loss, params, dtype):
    """`big_batch`, or with `gradient(params, calls)` of each window's calls."""
    params = init() if params is None else params
    if gradient is None:
        return big_batch(inner, params, data(STEPS), dtype, loss)
    with jax.enable_x64(dtype == jnp.float64):
        params = cast(params, dtype)
        state = inner.init(params)

        @jax.jit
        def step(params, state, calls):
            updates, state = inner.update(gradient(params, calls), state, params)
            return optax.apply_updates(params, updates), state

        for batch in data(STEPS):
            calls = microbatches(cast(batch, dtype), [len(batch["x"]) // K] * K)
            params, state = step(params, state, calls)
        return jax.tree.map(np.asarray, params)


cached = functools.cache(reference)  # several rows have the same


def is_exact(got, inner, gradient=None, loss=loss_fn, params=None, dtype=jnp.float32):
    """Within twice the big batch's own rounding of the big batch in float64."""
    of = cached if params is None else reference
    start = init() if params is None else params
    want = of(inner, gradient, loss, params, jnp.float64)
    assert distance(want, start) > 1e-6  # it moves
    leaves = [np.abs(x) for x in jax.tree.leaves(want)]
    assert all(np.isfinite(x).all() for x in leaves)
    far = distance(got, want)
    # Where the big batch's rounding happens to cancel: an ulp for each step.
    floor = STEPS * float(jnp.finfo(dtype).eps) * max(1.0, *(x.max() for x in leaves))
    if not far <= floor:  # else the second big batch is spared
        rounding = distance(of(inner, gradient, loss, params, dtype), want)
        assert far <= 2 * rounding + floor, (far, rounding, floor)


def is_inside(inner, extra=None, form="update", averaged_args=(), params=None):
    tx = accumax.accumulate(inner, K, averaged_args=averaged_args)
    got, state = accumulated(tx, params, extra=extra, form=form)
    assert state.gradient_step == STEPS
    is_exact(got, inner, params=params)


def whole(calls):
    return jax.tree.map(lambda *x: jnp.concatenate(x), *calls)


def lookahead_by_hand():
    """Zhang et al.: every second step the slow ones go half of the way to the fast."""
    with jax.enable_x64(True):
        slow = fast = cast(init(), jnp.float64)
        for n, batch in enumerate(cast(data(STEPS), jnp.float64)):
            grads = jax.grad(loss_fn)(fast, batch)
            fast = jax.tree.map(lambda p, g: p - 0.1 * g, fast, grads)
            if n % 2:
                slow = fast = jax.tree.map(lambda s, f: (s + f) / 2, slow, fast)
        return optax.LookaheadParams(fast, slow)


RHO = 0.05
ASCENT = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))


def at_the_worst(params, batch):
    """Foret et al.: the gradient at the worst point on a ball of radius RHO."""
    grads = jax.grad(loss_fn)(params, batch)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    there = jax.tree.map(lambda p, g: p + RHO * g / norm, params, grads)
    return jax.grad(loss_fn)(there, batch)


# --- the page -----------------------------------------------------------------------


def with_window_gradient(inner):
    """`inner`, whose line search gets the window's gradient as `grad=`."""

    def update(grads, state, params=None, **extra_args):
        return inner.update(grads, state, params, **extra_args | {"grad": grads})

    return optax.GradientTransformationExtraArgs(inner.init, update)


INTRO = """\
# The neighbours of accumulate

What you may put inside `accumax.accumulate(...)`, around it, and use as parameters.
`tests/test_neighbours.py` runs every row and writes this page. It fails if Optax has a
public transformation that is in no row.

- **exact**: the parameters after some windows are those of the big batch, computed in
  float64 by Optax alone, within twice the rounding error that the big batch itself has
  in float32 (or in the parameters' own dtype), and an ulp a step. If the row names
  something else than the big batch (clipping of each call), the test computes that in
  float64.
- **with a note**: a test shows that it does what the row says; read the row first.
- **no**: the row says what happens, which is tested, and what to do instead.

`k` is the window's length in calls. Names are Optax's; an older Optax may lack some.
Everything inside sees one gradient per window, so its steps, schedules and periods
count windows. Everything outside sees each call.

**The rule for outside**: before `accumulate` in a chain, a transformation changes each
call's gradient. After `accumulate`, it sees -0.0 in every call but the last of a
window. So it must return 0 for 0, and its state, if any, advances in every call.
"""
TITLES = {
    "inside": "Inside: `accumulate(inner, k)`",
    "outside": "Outside: around `accumulate`, or before and after it in a chain",
    "parameters": "Parameters",
}
LINE_SEARCH = """
A line search with the window's own gradient, value and loss:

```python
{code}

tx = accumax.accumulate(
    with_window_gradient(optax.lbfgs()), every=k, averaged_args=("value",)
)
updates, opt_state = tx.update(
    grads,
    opt_state,
    params,
    value=loss,  # of this call
    value_fn=lambda params: loss_fn(params, window),  # of all k calls' rows
)
```

`value_fn` runs on the whole window at once. If that does not fit in memory, write it
with `accumax.microbatch`. If one call has all rows of a window, it is simpler to pass
the `value` and `grad` of `accumax.value_and_grad(loss_fn, microbatch_size=...)` to
Optax's own `lbfgs`.
"""


def page(tables):
    """`tables`: the rows of inside, outside and parameters."""
    text = [INTRO]
    for where, rows in tables.items():
        text += [f"\n## {TITLES[where]}\n\n| what | works | how | what it means |\n"]
        text += ["|---|---|---|---|\n"]
        for row in rows:
            names = ", ".join(f"`{name}`" for name in row.optax_names)
            line = f"| {row.name} | {row.works} | {row.how} | {row.meaning} |\n"
            text += [line.replace("{names}", names)]
        if where == "inside":
            text += [LINE_SEARCH.format(code=inspect.getsource(with_window_gradient))]
    return "".join(text)
