import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import accumax
from accumax._batch.outputs import reducer
from accumax._batch.rows import slices
from accumax._batch.split import split
from accumax._devices import replicated


def parts_of(rows, **options):
    options = {"microbatch_size": None, "microbatches": None} | options
    divide = split(batch_argnums=0, rng_argnums=(), **options)
    return divide.parts(lambda x: x, (), (jnp.arange(rows),), {})


@given(rows=st.integers(1, 60), size=st.integers(1, 70))
def test_every_row_is_in_one_microbatch_and_comes_back_to_its_place(rows, size):
    parts = parts_of(rows, microbatch_size=size)
    count = parts.count + (parts.tail > 0)
    each = [parts.part(i, i == parts.count) for i in range(count)]
    seen = [np.asarray(part.call()[0][0]) for part in each]
    assert sorted(np.concatenate(seen)) == list(range(rows))
    assert [len(x) for x in seen] == [part.rows for part in each]
    assert {len(x) for x in seen[: parts.count]} == {min(size, rows)}
    assert count == -(-rows // size)  # as few as can be

    row = jax.ShapeDtypeStruct((parts.size,), jnp.int32)
    rest = jax.ShapeDtypeStruct((parts.tail,), jnp.int32)
    rows_of = reducer("concat", row, rest, parts)
    sums = rows_of.init()
    for part in each:
        sums = rows_of.add(sums, part.call()[0][0], part, 1.0)
    np.testing.assert_array_equal(rows_of.result(sums, 1.0), range(rows))


@given(count=st.integers(1, 12), size=st.integers(1, 12))
def test_a_number_of_microbatches_gives_equal_ones(count, size):
    parts = parts_of(count * size, microbatches=count)
    assert (parts.count, parts.size, parts.tail) == (count, size, 0)


def test_a_scan_visits_the_smaller_one_last():
    parts = parts_of(7, microbatch_size=3)

    def body(carry, part):
        return 10 * carry + jnp.sum(part.call()[0][0]) * 0 + part.index + 1

    assert parts.scan(body, jnp.int32(0)) == 123
    assert [part.tail for part in parts.each()] == [False, True]


def test_buckets_hold_each_array_once_and_large_ones_alone():
    whole = replicated.BUCKET
    sizes = [1, whole, whole // 2, whole // 3, whole // 4, 3 * whole, 5]
    groups = replicated.buckets(sizes)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert [1] in groups
    assert [5] in groups
    assert all(sum(sizes[i] for i in g[:-1]) < whole for g in groups)
    assert replicated.buckets([]) == []


@given(count=st.integers(1, 9), size=st.integers(1, 9), wide=st.booleans())
def test_slices_with_a_stride_are_the_rows_of_the_microbatches(count, size, wide):
    """What a TPU reads, in place of columns that it would pad."""
    x = (
        jnp.arange(count * size * 3).reshape(-1, 3)
        if wide
        else jnp.arange(count * size)
    )
    parts = split(None, count, 0, ()).parts(lambda x: x, (), (x,), {})
    each = [parts.part(i).call()[0][0] for i in range(count)]
    np.testing.assert_array_equal(slices(x, count), each)


def test_many_narrow_rows_are_not_copied():
    """The copy for a TPU is not in the program of another platform."""
    x = jax.random.normal(jax.random.key(0), (2**18, 3))
    y = x[:, 0]

    def loss(w, x, y):
        return jnp.mean((jnp.tanh(x @ w) - y) ** 2)

    f = accumax.value_and_grad(loss, microbatches=8, batch_argnums=(1, 2))
    w = jnp.zeros(3)
    temp = jax.jit(f).lower(w, x, y).compile().memory_analysis().temp_size_in_bytes
    assert temp < 0.6 * x.nbytes  # four vectors of a microbatch's rows
    found, want = jax.jit(f)(w, x, y), jax.value_and_grad(loss)(w, x, y)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-3)  # sums of 2**18 numbers
