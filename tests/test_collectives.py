"""What is sent between devices, counted in the program that XLA compiles for four CPUs.

XLA:CPU never moves a reduction out of a loop, so what holds here holds elsewhere too.
`benchmarks/collectives.py` repeats it for GPU and TPU.
"""

import re

import collectives
import exchanges
import forms
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scaling
import transformer
from exchanges import REDUCTIONS
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import accumax

MESH = Mesh(np.array(jax.devices()[:4]), ("data",))
PARTS, ROWS = 8, 4  # of a call; of a microbatch, over all devices
SMALL = 24  # bytes: a loss, its weight, what devices agree on; no gradient
WIDTH = 16
MATRICES = forms.matrices(3, WIDTH)
SIZE = transformer.Size(layers=3, width=16, heads=2, vocabulary=32, length=8)


def devices(mesh=MESH):
    return accumax.DataParallel("data", mesh=mesh)


def placed(tree, spec=None, mesh=MESH):
    sharding = NamedSharding(mesh, spec or P())
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
    )


def batch(rows=PARTS * ROWS, mesh=MESH):
    return placed(jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32), P("data"), mesh)


def tokens(rows=PARTS * ROWS):
    shape = jax.ShapeDtypeStruct((rows, SIZE.length + 1), jnp.int32)
    return placed(shape, P("data"))


def collectives_of(fun, *args):
    return exchanges.collectives(jax.jit(fun).lower(*args).compile().as_text())


def reductions(found, place=None, least=SMALL + 1):
    """Executions of those of at least `least` bytes."""
    return sum(
        x.executions
        for x in found
        if x.op in REDUCTIONS and x.bytes >= least and place in (None, x.place)
    )


def gradient_bytes(params, dtype=jnp.float32):
    return sum(p.size * jnp.dtype(dtype).itemsize for p in jax.tree.leaves(params))


def tied(params, x):
    for w in params:
        x = jnp.tanh(x @ w) @ w.T
    return jnp.mean(x * x)


def layers_loss(params, tokens):
    return transformer.loss(SIZE, params, tokens)


def untied(params, x):
    return sum(jnp.mean((x @ w) ** 2) for w in params)


HALF = [jax.ShapeDtypeStruct(p.shape, jnp.bfloat16) for p in MATRICES]
LAYERS = transformer.shapes(SIZE)
WITHIN = {
    "a plain body": (forms.matrices_loss, MATRICES, batch, {}),
    "the twin": (forms.matrices_loss, MATRICES, batch, {"in_place": False}),
    "a scan over layers": (layers_loss, LAYERS, tokens, {}),
    "tied weights": (tied, MATRICES, batch, {}),
    "bfloat16": (forms.matrices_loss, HALF, batch, {}),
    "weighted": (forms.weighted_matrices_loss, MATRICES, batch, {"weighted": True}),
    "two losses": ((forms.matrices_loss, untied), MATRICES, batch, {}),
}


@pytest.mark.parametrize("case", WITHIN)
def test_a_call_reduces_its_gradient_once_and_moves_no_row(case):
    loss, params, rows, options = WITHIN[case]
    f = accumax.value_and_grad(
        loss,
        microbatch_size=ROWS,
        reduce_axis=devices(),
        **options,
    )
    found = collectives_of(f, placed(params), rows())
    assert reductions(found, "loop", least=0) == 0
    assert all(x.op in REDUCTIONS for x in found)
    (gradient,) = [x for x in found if x.bytes > SMALL]
    assert (gradient.op, gradient.executions) == ("all-reduce", 1)
    assert 0 <= gradient.bytes - gradient_bytes(params) <= SMALL
    assert gradient.dtypes == {"f32"}
    assert gradient.groups == {frozenset(range(4))}


def test_bfloat16_gradients_are_reduced_in_float32_before_xla_has_a_say():
    # XLA:CPU makes float32 of every bfloat16 reduction.
    f = accumax.value_and_grad(
        forms.matrices_loss,
        microbatch_size=ROWS,
        reduce_axis=devices(),
    )
    text = jax.jit(f).lower(placed(HALF), batch()).as_text()
    reduced = re.findall(r"all_reduce.*?\}\) : \((.*?)\)", text, re.DOTALL)
    assert sum(f"{WIDTH}x{WIDTH}xf32" in types for types in reduced) >= 1
    assert "bf16" not in " ".join(reduced)


def test_the_count_sees_the_reductions_of_automatic_sharding():
    f = accumax.value_and_grad(layers_loss, microbatch_size=ROWS)
    found = collectives_of(f, placed(LAYERS), tokens())
    assert reductions(found, "loop") >= PARTS * SIZE.layers


def state_of(tx, params):
    state = jax.eval_shape(tx.init, params)
    return placed(state)._replace(acc_grads=placed(state.acc_grads, P("data")))


def apart(mesh=MESH, **options):
    return accumax.accumulate(
        optax.adamw(1e-3),
        every=3,
        reduce_axis=devices(mesh),
        **options,
    )


def check_window(found, params, small=1):
    """One reduction of the gradient, of which a call that holds executes nothing.

    In each call `small` more, of at most `SMALL` bytes.
    """
    (gradient,) = [x for x in found if x.bytes > SMALL]
    assert (gradient.op, gradient.executions) == ("all-reduce", 1)
    assert gradient.place == "boundary"
    assert gradient.bytes == gradient_bytes(params)
    assert gradient.dtypes == {"f32"}
    others = [x for x in found if x is not gradient]
    assert [x[:3] for x in others] == [("all-reduce", "outside", 1)] * small
    assert all(x.dtypes == {"f32"} for x in others)  # also of what they agree on


ACROSS = {
    "a plain body": ({}, forms.matrices_loss, MATRICES, batch, {}),
    "bfloat16": ({}, forms.matrices_loss, HALF, batch, {}),
    "a scan over layers": ({}, layers_loss, LAYERS, tokens, {}),
    "divided": ({}, layers_loss, LAYERS, tokens, {"microbatch_size": ROWS}),
    "weighted": ({}, forms.weighted_matrices_loss, MATRICES, batch, {"weighted": True}),
    "drop": ({"nonfinite": "drop"}, forms.matrices_loss, MATRICES, batch, {}),
    "skip": ({"nonfinite": "skip"}, forms.matrices_loss, MATRICES, batch, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ACROSS)
def test_a_window_reduces_its_gradient_once_where_it_closes(case):
    kept, loss, params, rows, options = ACROSS[case]
    tx = apart(**kept)
    step = accumax.train_step(loss, tx, **options)
    found = collectives_of(step, placed(params), state_of(tx, params), rows())
    # The loss, and whether all devices accept the call.
    check_window(found, params, small=1 + ("nonfinite" in kept))


@pytest.mark.slow
def test_a_plain_state_is_reduced_once_in_each_call():
    tx = accumax.accumulate(optax.adamw(1e-3), every=3)
    step = accumax.train_step(layers_loss, tx, reduce_axis=devices())
    params = placed(LAYERS)
    state = placed(jax.eval_shape(tx.init, LAYERS))
    found = collectives_of(step, params, state, tokens(ROWS))
    assert reductions(found) == reductions(found, "outside") == 1
    assert all(x.op in REDUCTIONS for x in found)


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_forms_reduce_once_where_the_window_closes(fused):
    tx = apart()

    def on_device(params, state, x):
        own = jax.lax.pcast(params, "data", to="varying")
        grads = jax.grad(forms.matrices_loss)(own, x)
        if fused:
            return accumax.apply_gradients(tx, params, state, grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = state_of(tx, MATRICES)
    specs = jax.tree.map(lambda _: P(), state)._replace(acc_grads=P("data"))
    step = jax.shard_map(
        on_device,
        mesh=MESH,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs),
    )
    found = collectives_of(step, placed(MATRICES), state, batch(ROWS))
    check_window(found, MATRICES, small=2)


@pytest.mark.parametrize("across", [False, True])
def test_beside_tensor_parallelism_only_its_own_reductions_are_in_the_loop(across):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    over_data = {frozenset({0, 2}), frozenset({1, 3})}
    over_model = {frozenset({0, 1}), frozenset({2, 3})}
    specs = {"in": P(None, "model"), "out": P("model", None)}
    params = {
        name: jax.device_put(jnp.ones((WIDTH, WIDTH)), NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - x) ** 2)

    if across:
        tx = apart(mesh=mesh)
        f = accumax.train_step(loss, tx, microbatch_size=ROWS)
        args = params, tx.init(params), batch(mesh=mesh)
    else:
        f = accumax.value_and_grad(
            loss,
            microbatch_size=ROWS,
            reduce_axis=devices(mesh),
        )
        args = params, batch(mesh=mesh)
    found = collectives_of(f, *args)
    assert all(x.op in REDUCTIONS for x in found)
    inside = [x for x in found if x.place == "loop"]
    assert inside
    assert all(x.groups == over_model for x in inside)
    (gradient,) = [x for x in found if x.place != "loop" and x.bytes > SMALL]
    assert gradient.place == ("boundary" if across else "outside")
    assert gradient.groups == over_data
    assert 0 <= gradient.bytes - gradient_bytes(params) // 2 <= SMALL


def shard(p):
    """How a parameter is divided: along its last axis that can be."""
    last = max(i for i, n in enumerate(p.shape) if n % MESH.size == 0)
    return P(*[None] * last, "data")


def divided(tree, like):
    """`tree` with the leaves of the shapes of parameters divided as these are."""
    specs = {p.shape: shard(p) for p in jax.tree.leaves(like)}
    return jax.tree.map(lambda s: placed(s, specs.get(s.shape)), tree)


def fsdp(loss, params, rows, across, once):
    """A call with `PARTS` microbatches, lowered."""
    specs = jax.tree.map(shard, params)
    axis = accumax.FSDP("data", specs, once=once, mesh=MESH)
    options = {"microbatch_size": ROWS, "reduce_axis": axis}
    if not across:
        f = accumax.value_and_grad(loss, **options)
        return jax.jit(f).lower(divided(params, params), rows())
    tx = accumax.accumulate(optax.adamw(1e-3), every=3)
    state = divided(jax.eval_shape(tx.init, params), params)
    step = jax.jit(accumax.train_step(loss, tx, **options), donate_argnums=(0, 1))
    return step.lower(divided(params, params), state, rows())


HALVES = forms.matrices_loss, HALF, batch
SHARDED = {
    "bfloat16": (*HALVES, False),
    "a scan over layers": (layers_loss, LAYERS, tokens, False),
    "across calls": (*HALVES, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_shards_are_gathered_and_reduced_once(case):
    lowered = fsdp(*SHARDED[case], True)
    found = exchanges.collectives(lowered.compile().as_text())
    params = SHARDED[case][1]
    for op in ("all-gather", "reduce-scatter"):
        these = [x for x in found if x.op == op]
        assert len(these) == len(jax.tree.leaves(params))
        assert {(x.place, x.executions) for x in these} == {("outside", 1)}
        # XLA:CPU makes float32 of what is bfloat16.
        assert sum(x.bytes for x in these) == gradient_bytes(params)
    (other,) = [x for x in found if x.op not in ("all-gather", "reduce-scatter")]
    assert other[:3] == ("all-reduce", "outside", 1)
    assert other.bytes <= SMALL


@pytest.mark.parametrize("across", [False, True])
def test_bfloat16_shards_are_gathered_as_such_and_reduced_in_float32(across):
    text = fsdp(*HALVES, across, True).as_text()

    def dtypes(op, end):
        found = re.findall(rf"stablehlo\.{op}\b.*?{end} : \((.*?)\)", text, re.DOTALL)
        assert found
        return set(re.findall(r"bf16|f32", " ".join(found)))

    assert dtypes("all_gather", "") == {"bf16"}
    assert dtypes("reduce_scatter", r"\}\)") == {"f32"}


@pytest.mark.slow
@pytest.mark.parametrize("across", [False, True])
def test_layer_by_layer_a_device_has_neither_parameters_nor_sums_whole(across):
    once, each = (
        fsdp(layers_loss, LAYERS, tokens, across, how).compile()
        for how in (True, False)
    )
    temps = [x.memory_analysis().temp_size_in_bytes for x in (once, each)]
    # Of two trees, parameters and sums, a device has a quarter instead of all.
    assert temps[0] - temps[1] >= 2 * 3 / 4 * gradient_bytes(LAYERS)
    found = exchanges.collectives(each.as_text())
    assert max(x.bytes for x in found) < gradient_bytes(LAYERS) / SIZE.layers


@pytest.mark.slow
def test_the_figures_print_their_bars(capsys, monkeypatch):
    def only(name, cases):
        monkeypatch.setattr(  # the others take as long to compile
            collectives, cases.__name__, lambda *args: {name: cases(*args)[name]}
        )

    only(collectives.REDUCED, collectives.within_a_call)
    only(collectives.APART, collectives.across_calls)
    only(collectives.ONCE, collectives.sharded)
    monkeypatch.setattr(collectives, "MATRICES", (2, 16, 4))
    collectives.main(["cpu", "--size", "1,16,2,32,8"])
    out = capsys.readouterr().out
    assert f"accumax {accumax.__version__}" in out
    for line in (
        "gradients reduced in a window, value_and_grad(reduce_axis): 1",
        "gradients reduced in a loop, accumulate(reduce_axis): 0, bar",
        "gathered or reduced once, 2 matrices of 16 x 16, not scanned: 1.00",
        "Sharded: 2 matrices of 16 x 16, not scanned, a window of 8 calls",
    ):
        assert line in out


def test_what_more_devices_send_is_in_rings_over_fast_and_slow_links(
    capsys, monkeypatch
):
    def found(cases, model, mesh):
        assert {collectives.REDUCED, "sharded: FSDP(once=True)"} < set(cases)
        whole = exchanges.Collective(
            "all-reduce", "outside", 1, 10**9, frozenset(), frozenset()
        )
        return {"a form": exchanges.Found(3, 1, 0, 10**9, 1, [whole])}

    monkeypatch.setattr(scaling, "every", found)
    scaling.main(["cpu"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line[2:] for line in lines if line[:2] == ["a", "form"]]
    assert rows[0] == ["1,750", "1,969", "1,996", "2,000"]
    assert rows[1][:2] == ["3.9", "8.3"]  # 1.75 / 450; and 1.75 / 8 / 50 between nodes
