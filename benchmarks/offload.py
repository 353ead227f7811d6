"""Memory of a device whose optimizer state is on the host: `offload_optimizer`.

    python benchmarks/offload.py         # compiled for a TPU v5e that is not here

AdamW in float32, `train_step`, 16 GB of memory. Printed are the arguments and temporary
memory of the device, and the arguments on the host, in units of the parameters.
"layers" are of one matrix, 8192 x 8192, and the transformer's are one by one. A window
moves the state to the device and back, for which it prints a time on paper: nothing
here has run on a TPU.
"""

import argparse
import functools
from typing import Any

import devices
import forms
import jax
import jax.numpy as jnp
import report
import transformer
import zoo
from devices import CHIPS, Device
from programs import bytes_of
from results import Row

import accumax

LAYERS = 8, 16, 24, 28
LINK = 16e9  # bytes a second, on paper: PCIe 3 with 16 lanes
LARGE = 2**16  # elements: smaller arrays stay on the device


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def models(width: int = 8192) -> list[zoo.Model]:
    loss, x = functools.partial(zoo.one_by_one, layer), zoo.array(64, width)
    square = zoo.array(width, width)
    found = [zoo.Model(f"{n}_layers", loss, [square] * n, x) for n in LAYERS]
    size = transformer.Size(32, width // 4, 16, 4 * width, 512, 2, scanned=0, tied=0)
    tokens = zoo.array(size.rows, size.length + 1, dtype=jnp.int32)
    language = functools.partial(transformer.loss, size)
    shapes = transformer.shapes(size)
    return [*found, zoo.Model("transformer", language, shapes, tokens)]


def memory(model: zoo.Model, on: Device, offload: bool) -> tuple[float, float] | None:
    """Device and host memory in units of the parameters; None if it does not fit."""
    tx = accumax.accumulate(forms.ADAMW, forms.EVERY, offload_optimizer=offload)
    step = accumax.train_step(model.loss, tx)

    def place(tree: Any, kind: str = "device") -> Any:
        def placed(s: Any) -> Any:
            memory = kind if s.size >= LARGE else "device"
            sharding = jax.sharding.SingleDeviceSharding(on, memory_kind=memory)
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

        return jax.tree.map(placed, tree)

    state = jax.eval_shape(tx.init, model.params)
    inner = place(state.inner_opt_state, "pinned_host" if offload else "device")
    args = place(model.params), place(state)._replace(inner_opt_state=inner)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    try:
        found = jitted.lower(*args, place(model.x)).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    assert found is not None
    here, unit = found.argument_size_in_bytes, bytes_of(model.params)
    here += found.temp_size_in_bytes
    return here / unit, found.host_argument_size_in_bytes / unit


def rows(on: Device, target: str, width: int = 8192) -> list[Row]:
    """`offload/MODEL/TARGET/{without, device, host, parameters, transfers}`."""
    found = []
    for model in models(width):
        case, size = f"offload/{model.name}/{target}", bytes_of(model.params)
        for offload in (False, True):
            memories = memory(model, on, offload)
            note = "" if memories else "It does not fit into the memory of the device."
            here, host = memories or (None, None)
            name = f"{case}/{'device' if offload else 'without'}"
            found.append(Row(name, here, "x parameters", note=note))
            if offload:
                found.append(Row(f"{case}/host", host, "x parameters", note=note))
        seconds = 2 * 2 * size / LINK  # two moments, there and back
        found.append(Row(f"{case}/parameters", size / 1e9, "GB"))
        found.append(Row(f"{case}/transfers", seconds, "s a window, on paper"))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=8192)
    width = parser.parse_args(argv).width
    report.header("accumax, compiled", CHIPS["tpu"])
    on = devices.device("tpu")
    report.rows("Memory of a device, and of the host for it", rows(on, "tpu", width))


if __name__ == "__main__":
    main()
