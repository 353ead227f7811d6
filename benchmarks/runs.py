"""Runs of forms that take turns."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import forms
import jax
import jax.numpy as jnp

T = TypeVar("T")


class Runner:
    """A jitted, donated step that keeps what it gave for its next call."""

    def __init__(self, form: forms.Form, params: Any):
        params = jax.tree.map(jnp.copy, params)  # the step donates them
        self.params, self.state = params, jax.jit(form.init)(params)
        self.step = forms.jitted(form)

    def run(self, x: Any, calls: int) -> float:
        """Seconds of so many calls."""
        jax.block_until_ready((self.params, self.state))
        start = time.perf_counter()
        for _ in range(calls):
            self.params, self.state, *_ = self.step(self.params, self.state, x)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start


def in_turns(runs: dict[str, Callable[[], T]], turns: int) -> list[dict[str, T]]:
    """In each turn a run of each form. The first turn compiles, and is dropped."""
    found = [{name: run() for name, run in runs.items()} for _ in range(turns + 1)]
    return found[1:]
