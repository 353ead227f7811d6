"""What a checkpoint in the middle of a window keeps, and into what it is restored."""

import pathlib

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
import resume
from problems import big_batch, data, distance, init, loss_fn, microbatches, same_bits

import accumax

SAMPLES = sorted((pathlib.Path(__file__).parent / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("form", "devices"), [("linen", 1), ("nnx", 4)])
def test_nothing_is_lost_when_the_process_is_killed(form, devices):
    resume.run(form, devices, kills=1, calls=9)


def saved(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)


def restored(like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", resume.abstract(like))


@pytest.mark.slow
@pytest.mark.parametrize(("every", "closes"), [(2, 3), (3, 3), (5, 5)])
def test_a_window_goes_on_with_another_length(every, closes, tmp_path):
    """One that is longer than the new length closes with the next call."""
    params, (batch,) = init(), data(1)
    parts = microbatches(batch, [4] * 6)
    inner = optax.adam(0.1, eps=1e-3)

    def step_of(every):
        tx = accumax.accumulate(inner, every)
        return tx, jax.jit(accumax.train_step(loss_fn, tx))

    tx, step = step_of(3)
    state = tx.init(params)
    for part in parts[:2]:
        params, state, _ = step(params, state, part)
    saved((params, state), tmp_path)
    tx, step = step_of(every)
    params, state = restored((init(), tx.init(init())), tmp_path)
    for n, part in enumerate(parts[2:closes], 3):
        assert state.gradient_step == 0
        params, state, _ = step(params, state, part)
        assert state.gradient_step == (n == closes)
    rows = jax.tree.map(lambda x: x[: 4 * closes], batch)
    want = big_batch(inner, init(), [rows])
    big = big_batch(inner, init(), [rows], jnp.float32)
    assert distance(params, want) <= 2 * distance(big, want) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("form", ["linen", "nnx"])
def test_a_window_goes_on_with_another_sharding(form, tmp_path):
    state, call = resume.FORMS[form]()
    one = state = resume.sharded(state, 4)
    for n in range(2):
        state = jax.jit(call)(state, resume.batch(n))
    saved(state, tmp_path)
    like = resume.sharded(one, 2, last=True)
    back = restored(like, tmp_path)
    assert resume.digest(back) == resume.digest(state)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    step = jax.jit(call, out_shardings=shardings)
    for n in range(2, 4):
        state = jax.jit(call)(state, resume.batch(n))
        back = step(back, resume.batch(n))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, back, shardings))
    numbers = [
        jax.tree.map(
            jnp.asarray, [x for x in jax.tree.leaves(tree) if x.dtype == float]
        )
        for tree in (back, state)
    ]
    assert distance(*numbers) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["linen", "nnx"])
@pytest.mark.parametrize("folder", SAMPLES, ids=lambda path: path.name)
def test_a_checkpoint_of_a_release_is_read(form, folder):
    """What was saved by that version, in the middle of the second window."""
    state, call = resume.FORMS[form]()
    state = resume.sharded(state, 1)
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(folder / form, resume.abstract(state))
    assert resume.digest(back) == (folder / f"{form}.sha256").read_text().strip()
    # It goes on where it was: the next call closes the window.
    for n in range(resume.EVERY + 2):
        state = jax.jit(call)(state, resume.batch(n))
    want, got = (jax.jit(call)(x, resume.batch(9)) for x in (state, back))
    for tree in (want, got):
        assert (count("gradient_step", tree), count("mini_step", tree)) == (2, 0)
    numbers = [
        [x for x in jax.tree.leaves(tree) if x.dtype == float] for tree in (want, got)
    ]
    assert distance(*numbers) < 1e-4


def count(name, tree):
    """The counter of this name in the state of either form."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    (found,) = [x for path, x in paths if name in jax.tree_util.keystr(path)]
    return found


def test_this_release_has_a_sample():
    assert accumax.__version__ in [folder.name for folder in SAMPLES]


def test_a_state_that_was_never_saved_is_as_it_was(tmp_path):
    """Also one with None, integers and keys in its parameters."""
    params = {
        "w": jnp.ones(3),
        "none": None,
        "n": jnp.int32(3),
        "key": jax.random.key(0),
    }
    tx = accumax.accumulate(optax.adam(0.1), 3, averaged_args=("value",))
    state = tx.init(params)
    grads = {"w": jnp.ones(3), "none": None, "n": None, "key": None}
    params, state = accumax.apply_gradients(tx, params, state, grads, value=1.0)
    saved((params, state), tmp_path)
    back = restored((params, tx.init(params)), tmp_path)
    assert resume.digest(back) == resume.digest((params, state))
    assert same_bits(back[1], state)
