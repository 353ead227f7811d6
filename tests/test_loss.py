import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accumax._batch.loss import read_loss

LOSS = jnp.float32(6.0)


@pytest.mark.parametrize(
    ("out", "has_aux", "weighted", "mean", "aux"),
    [
        (LOSS, False, False, 6.0, None),
        ((LOSS, "aux"), True, False, 6.0, "aux"),
        ((LOSS, 4), False, True, 1.5, None),
        (((LOSS, jnp.int32(4)), {"n": 1}), True, True, 1.5, {"n": 1}),
        ((LOSS, 0.0), False, True, 0.0, None),
        ((jnp.float32(jnp.nan), 0.0), False, True, 0.0, None),
    ],
)
def test_every_form_of_a_loss(out, has_aux, weighted, mean, aux):
    loss = read_loss(out, has_aux=has_aux, weighted=weighted)
    assert loss.mean() == mean
    assert loss.aux == aux
    assert (loss.weight is not None) == weighted


def test_the_mean_keeps_the_dtype_of_the_loss():
    loss = read_loss((jnp.bfloat16(3), 2), has_aux=False, weighted=True)
    assert loss.mean().dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("out", "has_aux", "weighted", "words"),
    [
        ((LOSS, "aux"), False, False, ["scalar", "pass has_aux=True"]),
        ((LOSS, 8), False, False, ["pass weighted=True", "pass has_aux=True"]),
        (
            (LOSS, {"a": LOSS}),
            False,
            False,
            ["'float32[]'}). If it returns (loss, aux)"],
        ),
        ((LOSS, (LOSS, LOSS)), False, False, ["pass has_aux=True"]),
        (((LOSS, LOSS), {}), True, False, ["pass weighted=True"]),
        (LOSS, True, False, ["(loss, aux)", "float32[]"]),
        ((LOSS, 1, 2), True, False, ["(loss, aux)"]),
        (LOSS, False, True, ["(loss_sum, weight)", "float32[]"]),
        ((LOSS, 1.0), True, True, ["(loss_sum, weight)"]),
        ((LOSS, jnp.ones(3)), False, True, ["weight", "(3,)"]),
        (jnp.ones(3), False, False, ["scalar", "float32[3]"]),
        (jnp.int32(3), False, False, ["floating-point", "int32[]"]),
        (jnp.complex64(3), False, False, ["real", "complex64[]"]),
        (None, False, False, ["None"]),
    ],
)
def test_another_form_is_an_error_that_says_what_came(out, has_aux, weighted, words):
    with pytest.raises(TypeError) as caught:
        read_loss(out, has_aux=has_aux, weighted=weighted)
    for word in words:
        assert word in str(caught.value)


def test_a_traced_weight_that_is_wrong_is_no_error_but_shows():
    def mean(weight):
        return read_loss((LOSS, weight), has_aux=False, weighted=True).mean()

    assert jax.jit(mean)(np.float32(-1)) == -LOSS
    assert np.isnan(jax.jit(mean)(np.float32(np.nan)))


def test_the_number_of_items_may_be_too_large_for_the_dtype_of_the_loss():
    out = jnp.float16(7e3), jnp.float32(7e4)
    assert read_loss(out, has_aux=False, weighted=True).mean() == jnp.float16(0.1)
