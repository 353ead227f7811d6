"""What XLA makes of it on the CPU; `benchmarks/targets.py` repeats it for GPU and TPU.

Only what is deterministic: memory, copies, traces. Times are in `benchmarks/`.
"""

import functools

import forms
import jax
import jax.numpy as jnp
import losses
import optax
import programs
import pytest
import transformer
import weighted
from forms import ADAMW, EVERY
from problems import init, loss_fn

import accumax

MATRICES = forms.matrices()
MATRIX = 1024 * 1024 * 4


def compiled(step, init_state, params, *args):
    state = jax.eval_shape(init_state, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, *args).compile()


def memory(compiled):
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def copies(compiled):
    """Copies of a matrix's size, wherever they stand in the program."""
    return programs.copies(compiled.as_text(), MATRICES)[0]


def temp(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


@functools.cache
def transformer_memory(form):
    size = transformer.Size()
    params = transformer.shapes(size)
    loss = functools.partial(transformer.loss, size)
    tokens = jax.ShapeDtypeStruct((size.rows, size.length + 1), jnp.int32)
    step, init_state = forms.train_steps(loss)[form]
    return memory(compiled(step, init_state, params, tokens))


def test_a_train_step_takes_at_most_five_percent_more_memory_than_no_accumulation():
    assert transformer_memory(forms.TRAIN_STEP) <= 1.05 * transformer_memory(
        forms.PLAIN
    )


@pytest.mark.slow
def test_the_optax_form_takes_an_eighth_less_memory_than_multisteps():
    ours = transformer_memory(forms.ACCUMULATE)
    assert ours <= 0.87 * transformer_memory(forms.MULTISTEPS)


@functools.cache
def divided_memory(form):
    """Of a step that divides its call into eight microbatches of one row."""
    size = transformer.Size()
    loss = functools.partial(transformer.loss, size)
    weighted_loss = functools.partial(transformer.weighted_loss, size)
    tokens = jax.ShapeDtypeStruct((EVERY, size.length + 1), jnp.int32)
    step, init_state = forms.divided_steps(loss, weighted_loss, 1)[form]
    return memory(compiled(step, init_state, transformer.shapes(size), tokens))


@pytest.mark.slow
@pytest.mark.parametrize("form", [forms.VALUE_AND_GRAD, forms.DIVIDED])
def test_eight_microbatches_take_at_most_eight_percent_more_memory_than_one(form):
    assert divided_memory(form) <= 1.08 * transformer_memory(forms.PLAIN)


@pytest.mark.slow
def test_the_twin_that_carries_the_tree_takes_a_gradient_more():
    carried = divided_memory("value_and_grad(in_place=False)")
    assert carried >= divided_memory(forms.VALUE_AND_GRAD) + 0.7 * sum(
        4 * p.size for p in jax.tree.leaves(transformer.shapes(transformer.Size()))
    )


@pytest.mark.parametrize("model", weighted.MODELS)
@pytest.mark.parametrize("form", ["value_and_grad", "train_step"])
@pytest.mark.parametrize("has_aux", [False, True])
def test_a_weighted_loss_takes_the_memory_of_a_mean(model, form, has_aux):
    takes = functools.partial(
        weighted.temp, model, form, on=jax.devices()[0], has_aux=has_aux
    )
    assert takes(weighted=True) <= 1.02 * takes(weighted=False)


@pytest.mark.parametrize("model", [losses.trunk, losses.heads])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("in_place", [True, False])
def test_three_losses_take_the_memory_of_the_costliest(model, parts, in_place):
    width = 128
    _, params, funs = model(width)
    x = jax.ShapeDtypeStruct((16 * width, width), jnp.float32)

    def of(fun):
        f = accumax.value_and_grad(fun, microbatches=parts, in_place=in_place)
        return temp(f, params, x)

    assert of(funs) <= 1.25 * of(funs[-1])
    joint = jax.value_and_grad(lambda p, x: sum(fun(p, x) for fun in funs))
    assert of(funs) <= 0.6 * temp(joint, params, x)


def test_a_smaller_last_microbatch_takes_no_memory_beside_the_others():
    params = forms.matrices(16, 128)

    def grad(size):
        return accumax.grad(forms.matrices_loss, microbatch_size=size)

    x = jax.ShapeDtypeStruct((640, 128), jnp.float32)
    one = jax.ShapeDtypeStruct((50, 128), jnp.float32)
    accumulator = 16 * 128 * 128 * 4
    alone = temp(jax.grad(forms.matrices_loss), params, one)
    assert temp(grad(50), params, x) <= 1.25 * alone + accumulator


@pytest.mark.parametrize("in_place", [True, False])
def test_a_contrastive_loss_takes_the_memory_of_a_microbatch_and_its_embeddings(
    in_place,
):
    width, rows = 64, 32
    params = forms.matrices(8, width)

    def embed(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x.mean(1)

    def grad(embed):
        def loss(params, x):
            features = embed(params, x)
            return jnp.mean(jax.nn.logsumexp(features @ features.T, 1))

        return jax.grad(loss)

    by_part = accumax.microbatch(embed, microbatch_size=rows, in_place=in_place)

    def of(embed, batch):
        x = jax.ShapeDtypeStruct((batch, width, width), jnp.float32)
        return temp(grad(embed), params, x)

    embeddings = 2 * 16 * rows * width * 4  # and their cotangents
    similarities = 2 * (16 * rows) ** 2 * 4
    most = of(by_part, 16 * rows)
    assert most <= 1.1 * of(by_part, 2 * rows) + embeddings + similarities
    assert most <= 0.2 * of(embed, 16 * rows)


@pytest.mark.slow
def test_a_policy_takes_no_more_memory_than_one_gradient_tree():
    size = transformer.Size(layers=4, width=256, vocabulary=1024, length=64)
    params = transformer.shapes(size)
    parameters = sum(x.size * 4 for x in jax.tree.leaves(params))
    loss = functools.partial(transformer.loss, size)
    tokens = jax.ShapeDtypeStruct((1, size.length + 1), jnp.int32)

    def of(nonfinite):
        tx = accumax.accumulate(ADAMW, EVERY, nonfinite=nonfinite)
        return memory(compiled(accumax.train_step(loss, tx), tx.init, params, tokens))

    for nonfinite in ("skip", "drop"):
        assert of(nonfinite) <= of("propagate") + 1.05 * parameters


@pytest.mark.parametrize("extra", [{}, {"weight": 3.0}, {"flush": True}])
def test_apply_gradients_copies_no_parameter_and_needs_no_memory(extra):
    tx = accumax.accumulate(ADAMW, EVERY)

    def step(params, state, grads):
        return accumax.apply_gradients(tx, params, state, grads, **extra)

    step = compiled(step, tx.init, MATRICES, MATRICES)
    assert copies(step) == 0
    assert step.memory_analysis().temp_size_in_bytes < 0.01 * MATRIX


def test_the_boundary_alone_copies_no_parameter():
    tx = accumax.accumulate(ADAMW, EVERY)
    step = compiled(functools.partial(accumax.flush, tx), tx.init, MATRICES)
    assert copies(step) == 0
    assert step.memory_analysis().temp_size_in_bytes < 0.01 * MATRIX


OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "clipped sgd": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "clipped adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "novograd": optax.novograd(1e-3),
    "lion": optax.lion(1e-3),
    "lamb": optax.lamb(1e-3),
    "adafactor": optax.adafactor(1e-3),
    "muon": optax.contrib.muon(1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stacked", [False, True])
def test_the_boundary_takes_the_memory_of_the_optimizer_alone(stacked, name):
    inner = OPTIMIZERS[name]
    params = [jax.ShapeDtypeStruct((128, 128), jnp.float32)] * 8
    if stacked:
        params = jax.ShapeDtypeStruct((8, 128, 128), jnp.float32)
    tx = accumax.accumulate(inner, EVERY)
    step, init_state = forms.applied(inner)
    alone = compiled(step, init_state, params, params)
    ours = compiled(functools.partial(accumax.flush, tx), tx.init, params)
    temps = [x.memory_analysis().temp_size_in_bytes for x in (ours, alone)]
    assert temps[0] <= temps[1] + 16_384  # scalars of each leaf


def test_a_cpu_can_arrange_a_step_with_clipping_for_the_least_memory():
    """As docs/cost.md says; by default XLA:CPU has the updates of all matrices."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), ADAMW)
    tx = accumax.accumulate(clipped, EVERY)

    def loss(params, x):
        for w in jax.tree.leaves(params):
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    step = programs.compiled(
        forms.Form(accumax.train_step(loss, tx), tx.init),
        MATRICES,
        jax.ShapeDtypeStruct((8, 1024), jnp.float32),
        jax.devices()[0],
        least=True,
    )
    assert step.temp * len(MATRICES) <= 1.5  # matrices


def test_train_step_copies_no_parameter():
    step, init_state = forms.train_steps(forms.matrices_loss)[forms.TRAIN_STEP]
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    assert copies(compiled(step, init_state, MATRICES, x)) == 0


def test_the_count_of_copies_sees_those_of_crossed_outputs():
    # The measure itself: donated inputs that come back in another order are copied.
    tx = accumax.accumulate(ADAMW, EVERY)

    def crossed(params, state, grads):
        return accumax.apply_gradients(tx, params, state, grads)[::-1]

    assert copies(compiled(crossed, tx.init, MATRICES, MATRICES)) > 0


def test_every_call_runs_what_the_first_one_traced():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    tx = accumax.accumulate(
        optax.adamw(optax.linear_schedule(0.1, 0.0, 9)), 3, averaged_args=("value",)
    )
    batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}
    for in_place in (True, False):
        traces.clear()
        step = jax.jit(accumax.train_step(loss, tx, in_place=in_place))
        params, state = init(), tx.init(init())
        params, state, _ = step(params, state, batch)
        first = len(traces)
        for _ in range(6):
            params, state, _ = step(params, state, batch)
        # JAX 0.10 is asked before where refs are safe, and whether a cast can move.
        before = 2 if in_place and jax.__version_info__ < (0, 11) else 0
        assert len(traces) == first == 1 + before
        assert step._cache_size() == 1

    update = jax.jit(tx.update)
    params, state = init(), tx.init(init())
    for i in range(7):
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = update(grads, state, params, value=jnp.float32(i))
    assert update._cache_size() == 1


def test_nothing_is_compiled_that_was_not_asked_for():
    # No check of finiteness where the policy is to propagate.
    tx = accumax.accumulate(optax.sgd(1.0), EVERY)
    state = jax.eval_shape(tx.init, MATRICES)
    checked = accumax.accumulate(optax.sgd(1.0), EVERY, nonfinite="skip")
    finite = "is_finite"
    one, other = (
        jax.jit(t.update).lower(MATRICES, state).as_text().count(finite)
        for t in (tx, checked)
    )
    assert one <= 1  # the weight
    assert other > len(MATRICES)


SLICED = {
    "dynamically": lambda p, x: jax.lax.scan(
        lambda h, i: (jnp.tanh(h @ p["w"][i]), None), x, jnp.arange(4)
    )[0],
    "in a checkpoint": lambda p, x: jax.lax.scan(
        jax.checkpoint(lambda h, w: (jnp.tanh(h @ w @ p["v"][:128]), None)), x, p["w"]
    )[0],
}


@pytest.mark.parametrize(("kind", "most"), [*zip(SLICED, (1.2, 0.8), strict=True)])
def test_a_slice_that_jax_adds_in_place_builds_no_gradient(kind, most):
    """Before JAX 0.11 those of other slices are built: 1.74 and 1.04 with these."""
    params = {"w": jnp.ones((4, 128, 128)), "v": jnp.ones((256, 128))}

    def loss(params, x):
        return jnp.mean(SLICED[kind](params, x))

    tx = accumax.accumulate(optax.sgd(0.1), 4)
    found = temp(
        accumax.train_step(loss, tx), params, tx.init(params), jnp.ones((4, 128))
    )
    assert found < most * sum(x.nbytes for x in params.values())
