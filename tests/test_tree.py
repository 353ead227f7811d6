import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import same_bits

from accumax import _tree


def test_differentiable_hides_what_has_no_gradient_and_restore_puts_it_back():
    key = jax.random.key(0)
    float0 = np.zeros((2,), jax.dtypes.float0)
    tree = {
        "w": jnp.ones(2),
        "half": jnp.ones(2, jnp.bfloat16),
        "c": jnp.ones(2, jnp.complex64),
        "number": 1.5,
        "ids": jnp.arange(3),
        "flag": True,
        "key": key,
        "none": None,
        "masked": optax.MaskedNode(),
        "name": "relu",
        "function": jnp.tanh,
        "float0": float0,
    }
    part = _tree.differentiable(tree)
    kept = {name for name, leaf in part.items() if jax.tree.leaves(leaf)}
    assert kept == {"w", "half", "c", "number"}
    restored = _tree.restore(jax.tree.map(lambda x: x * 2, part), tree)
    assert restored["number"] == 3.0
    assert restored["masked"] == optax.MaskedNode()
    for name in tree.keys() - kept - {"masked"}:
        assert restored[name] is tree[name]


@pytest.mark.parametrize("x", [1.0, jnp.float32(1), np.float32(1), jnp.asarray(1.0)])
def test_strong_removes_the_weak_type_that_would_trace_twice(x):
    assert not _tree.strong(x).aval.weak_type
    assert _tree.strong(x, jnp.bfloat16).dtype == jnp.bfloat16


def test_minus_zeros_leave_every_parameter_as_it_is_to_the_bit():
    params = {"w": jnp.array([-0.0, 0.0, 1.0, jnp.nan]), "n": jnp.arange(2)}
    zeros = _tree.minus_zeros_like(params)
    assert same_bits(jax.tree.map(jnp.add, params, zeros), params)


def test_all_finite_sees_one_nan_in_one_leaf():
    tree = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16), "n": None}
    assert _tree.all_finite(tree)
    assert _tree.all_finite({})
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not _tree.all_finite(tree | {"b": jnp.array([1.0, bad])})


LIKE = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3), None]}


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ({"w": LIKE["w"]}, ValueError, ["no leaf at ['b'][0]", "float32[3]"]),
        (LIKE | {"c": 1.0}, ValueError, ["grads['c']", "nothing to differentiate"]),
        (
            LIKE | {"w": jnp.ones((3, 2))},
            ValueError,
            ["grads['w']", "(3, 2)", "(2, 3)"],
        ),
        (LIKE | {"w": jnp.ones((2, 3), int)}, TypeError, ["grads['w']", "int32[2, 3]"]),
        (LIKE | {"w": jnp.ones((2, 3)) * 1j}, TypeError, ["complex64", "real part"]),
        (LIKE | {"w": "x"}, TypeError, ["grads['w']", "'x'"]),
        (LIKE | {"b": (LIKE["b"][0], None)}, ValueError, ["different containers"]),
        (LIKE["w"], ValueError, ["no leaf at ['b'][0]", "(root)"]),
    ],
)
def test_a_tree_that_does_not_fit_is_named_by_its_path(tree, error, words):
    with pytest.raises(error) as caught:
        _tree.check_like("grads", tree, LIKE, "state.acc_grads")
    for word in [*words, "state.acc_grads"]:
        assert word in str(caught.value)


def test_a_tree_that_fits_may_differ_in_precision_and_in_what_is_not_differentiated():
    like = {"w": jnp.ones(2), "ids": None}
    tree = {"w": jnp.ones(2, jnp.bfloat16), "ids": np.zeros(3, jax.dtypes.float0)}
    _tree.check_like("grads", tree, like, "params")
