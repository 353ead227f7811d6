"""Memory of accumulation without a gradient tree, exactly: AdamA's claim.

    python benchmarks/adama.py         # or gpu, tpu: compiled for one that is not here

AdamA (Zhang et al., arXiv 2305.19982) adds each microbatch's gradient into Adam's
moments and so needs no gradient: up to 23 % less memory than accumulation, by another
update, whose second moment adds up squares of microbatches. `accumax.train_step` has an
accumulator and no gradient beside it, and makes the update of the big batch.

The model has the sizes of BERT-Large: 24 layers, width 1024, 30,522 words, sequences of
128, scanned and rematerialised, AdamW. "tree" adds a gradient tree to another, in a
program of its own, as most trainings do by hand; the optimizer's state lies beside it.
"""

import argparse
import functools

import devices
import forms
import jax
import jax.numpy as jnp
import peers
import report
import transformer
import zoo
from devices import CHIPS, Device
from programs import bytes_of, compiled
from results import Row

BERT = transformer.Size(24, 1024, 16, 30_522, 128, 8)
FORMS = "none", "multisteps", "train_step"


def rows(on: Device, target: str, size: transformer.Size = BERT) -> list[Row]:
    """Gigabytes: `adama/TARGET/FORM`, and what is saved, in per cent."""
    loss = functools.partial(transformer.loss, size)
    x = zoo.array(size.rows, size.length + 1, dtype=jnp.int32)
    params = transformer.shapes(size)
    model = zoo.Model("bert", loss, params, x, forms.ADAMW)
    unit, steps = bytes_of(params) / 1e9, peers.steps(model)
    found = {
        name: compiled(steps[name].form, params, x, on, haste=True).total * unit
        for name in FORMS
    }
    by_hand = forms.added(jax.value_and_grad(loss))
    moments = bytes_of(jax.eval_shape(forms.ADAMW.init, params)) / 1e9
    found["tree"] = compiled(by_hand, params, x, on, haste=True).total * unit + moments
    rows = [Row(f"adama/{target}/{name}", size, "GB") for name, size in found.items()]
    for name in ("tree", "multisteps"):
        less = 100 * (1 - found["train_step"] / found[name])
        rows.append(Row(f"adama/{target}/saved_over_{name}", less, "%"))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    target = parser.parse_args(argv).target
    on = devices.device(target)
    report.header("accumax, compiled", CHIPS.get(target, "CPU"))
    report.rows("Arguments and temporary memory of a step", rows(on, target))


if __name__ == "__main__":
    main()
