"""The steps that `docs/memory.md` shows, of a transformer of 671 MB.

    python benchmarks/pictured.py gpu      # an H100 that need not be there

`python docs/drawings.py memory gpu` draws them. Memory is arguments, results and temp.
"""

import argparse
import functools

import forms
import jax
import jax.numpy as jnp
import programs
import transformer
from devices import CHIPS, Device, device
from results import Row

import accumax

SIZE = transformer.Size()


def steps(size: transformer.Size) -> dict[str, tuple[forms.Form, int]]:
    """For each picture its train step, and the microbatches of a call."""
    loss = functools.partial(transformer.loss, size)
    whole = jax.value_and_grad(loss)
    divided = accumax.value_and_grad(loss, microbatches=forms.EVERY)
    calls = forms.train_steps(loss)
    plain = forms.applied(forms.ADAMW)
    scanned = forms.scanned(whole, size.rows)
    return {
        "plain": (calls[forms.PLAIN], 1),
        "multisteps": (calls[forms.MULTISTEPS], 1),
        "train_step": (calls[forms.TRAIN_STEP], 1),
        "whole": (forms.whole(plain, whole), forms.EVERY),
        "scan": (forms.whole(plain, scanned), forms.EVERY),
        "value_and_grad": (forms.whole(plain, divided), forms.EVERY),
    }


def lowered(on: Device, size: transformer.Size = SIZE) -> dict[str, jax.stages.Lowered]:
    """The program of each step."""
    params, found = transformer.shapes(size), {}
    for name, (form, microbatches) in steps(size).items():
        rows = size.rows * microbatches
        tokens = jax.ShapeDtypeStruct((rows, size.length + 1), jnp.int32)
        state = jax.eval_shape(form.init, params)
        found[name] = programs.lowered(form, params, state, tokens, on)
    return found


def rows(on: Device, target: str, size: transformer.Size = SIZE) -> list[Row]:
    unit, found = programs.bytes_of(transformer.shapes(size)), []
    totals = {k: programs.peak(x.compile()) for k, x in lowered(on, size).items()}
    for name, total in totals.items():
        for what, value, of in (
            ("mib", total / 2**20, "MiB"),
            ("parameters", total / unit, "x parameters"),
            ("over_plain", total / totals["plain"], "x plain"),
        ):
            found.append(Row(f"pictures/{what}/{target}/{name}", value, of))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    target = parser.parse_args().target
    for row in rows(device(target), target):
        print(f"{row.name:48}{row.value:10.2f} {row.unit}")


if __name__ == "__main__":
    main()
