"""How cost grows with parameters, microbatches and leaves, as rows."""

import functools

import floors
import peers
import timing
import zoo
from devices import Device
from programs import compiled
from results import Row

FORMS = "none", "multisteps", "scan", "train_step", "value_and_grad"


def parameters(on: Device, target: str, exponents: tuple[int, ...]) -> list[Row]:
    """Arguments and temporary memory at 10 ** n parameters, in the parameters' size.

    Eight residual layers in a scan, one row a microbatch, AdamW with clipping. Compiled
    only, so that no machine needs to hold them.
    """
    rows = []
    for n in exponents:
        width = int((10**n / 32) ** 0.5)
        layer = {"up": zoo.array(8, width, 2 * width)}
        layer["down"] = zoo.array(8, 2 * width, width)
        loss = functools.partial(zoo.scanned, zoo.block)
        model = zoo.Model("", loss, layer, zoo.array(1, width))
        found = floors.figures(model, on, FORMS)
        for name, step in found.found.items():
            row = f"grows/parameters/1e{n}/{target}/{name}"
            rows.append(Row(row, step.total, "x parameters"))
    return rows


def microbatches(on: Device, target: str, counts: tuple[int, ...]) -> list[Row]:
    """Memory with k microbatches in a call, in units of the parameters.

    The batch itself, an argument, grows with k. Across calls nothing does.
    """
    rows, width = [], 512
    layers = {"up": zoo.array(8, width, 2 * width)}
    layers["down"] = zoo.array(8, 2 * width, width)
    loss = functools.partial(zoo.scanned, zoo.block, remat=False)
    model = zoo.Model("", loss, layers, zoo.array(64, width))
    steps = peers.steps(model)
    for k in counts:
        for name in ("whole", "microbatching", "scan", "value_and_grad"):
            if name not in steps:
                continue
            x = zoo.array(64 * k, width)
            step = compiled(steps[name].form, model.params, x, on, haste=True)
            row = f"grows/k/{k}/{target}/{name}"
            rows.append(Row(row, step.total, "x parameters"))
    return rows


def leaves(on: Device, target: str, counts: tuple[int, ...]) -> list[Row]:
    """Seconds to trace and to compile a step of many small leaves. No ratios.

    More than 100 are only traced: 1,000 would take XLA:CPU a minute or more a form, and
    10,000 more than 24 GB.
    """
    rows = []
    for n in counts:
        model = zoo.Model("", zoo.leaves, [zoo.array(256)] * n, zoo.array(8, 256))
        steps = peers.steps(model)
        chosen = {name: steps[name] for name in FORMS}
        compiles = n <= 100
        found = timing.compiling(chosen, model, on, 1, compiles)
        for name, times in found.items():
            case = f"{n}/{target}/{name}"
            rows.append(Row(f"grows/leaves_trace/{case}", times.trace, "s"))
            if compiles:
                rows.append(Row(f"grows/leaves_compile/{case}", times.work, "s"))
    return rows


def dispatch(target: str, counts: tuple[int, ...], turns: int) -> list[Row]:
    """Microseconds of a hold call, by the number of leaves: `timing.host`."""
    rows: list[Row] = []
    for n in counts:
        rows += timing.host(target, n, turns)
    return rows
