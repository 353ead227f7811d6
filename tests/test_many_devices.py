"""The page on many devices runs, from top to bottom, on four devices."""

import pathlib
import re

import jax
import numpy as np

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "many_devices.md"


def test_the_code_of_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 5
    namespace = {}
    before = jax.sharding.get_mesh()
    try:
        for block in blocks:
            exec(block, namespace)
    finally:
        jax.set_mesh(before)
    state = namespace["state"]
    assert (state.gradient_step, state.mini_step) == (1, 1)
    names = ("params", "x", "y")
    want = jax.grad(namespace["loss_fn"])(*(namespace[name] for name in names))
    np.testing.assert_allclose(namespace["grads"]["w"], want["w"], rtol=1e-5)
    assert state.acc_grads["w"].sharding.spec[0] == "data"
