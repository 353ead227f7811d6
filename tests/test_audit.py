"""What `accumax.audit` reads from compiled programs, against counts by hand."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import accumax
from accumax._compiled import buffers, hlo, peak
from accumax._compiled.command import audit_command

D = 64
SHAPES = {"w": jax.ShapeDtypeStruct((D, D), jnp.float32)}
X = jax.ShapeDtypeStruct((8, D), jnp.float32)
ADAM = optax.adam(1e-3)


def loss_fn(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)


def stack_loss(params, x):
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return jnp.mean(jax.lax.scan(layer, x, params["w"])[0] ** 2)


def with_optax(tx, loss=loss_fn):
    def step(params, opt_state, x):
        grads = jax.grad(loss)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def crossed(params, opt_state, x):
    params, opt_state = with_optax(ADAM)(params, opt_state, x)
    return opt_state, params


def accumulated(inner=ADAM, **options):
    tx = accumax.accumulate(inner, 4)
    return tx, accumax.train_step(loss_fn, tx, **options)


def report_of(step, tx, params=SHAPES, x=X, donate=(0, 1)):
    state = jax.eval_shape(tx.init, params)
    return accumax.audit(step, params, state, x, donate_argnums=donate)


def texts(found):
    return " ".join(found.warnings)


def test_the_memory_is_what_the_compiler_says():
    tx, step = accumulated()
    state = jax.eval_shape(tx.init, SHAPES)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    want = jitted.lower(SHAPES, state, X).compile().memory_analysis()
    memory = accumax.audit(jitted, SHAPES, state, X).memory
    assert memory.arguments == want.argument_size_in_bytes
    assert memory.output == want.output_size_in_bytes
    assert memory.aliased == want.alias_size_in_bytes
    assert memory.temp == want.temp_size_in_bytes
    assert memory.total == memory.arguments + memory.output - memory.aliased + (
        memory.temp
    )


def test_memory_of_the_host_is_told_apart():
    """As XLA:TPU has it for `offload_optimizer`; a CPU has none of its own."""
    names = "argument", "output", "alias", "temp"
    told = {f"{name}_size_in_bytes": 1 for name in names}
    told |= {f"host_{name}_size_in_bytes": n for n, name in enumerate(names, 8)}
    program = types.SimpleNamespace(
        memory_analysis=lambda: types.SimpleNamespace(**told)
    )
    assert peak.sizes_of(program) == (1, 1, 1, 1, 8 + 9 - 10 + 11)
    tx, step = accumulated()
    report = report_of(step, tx)
    assert report.memory.host == 0
    assert "memory of the host" not in str(report)
    memory = report.memory._replace(host=2**21)
    page = str(dataclasses.replace(report, memory=memory))
    assert "host              2.00 MiB  in the memory of the host" in page


@pytest.mark.parametrize("loss", [loss_fn, stack_loss])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_the_schedule_is_near_the_memory_that_the_compiler_needs(loss, microbatch_size):
    shape = (D, D) if loss is loss_fn else (4, D, D)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    tx = accumax.accumulate(ADAM, 4)
    step = accumax.train_step(loss, tx, microbatch_size=microbatch_size)
    for form in ((step, tx), (with_optax(ADAM, loss), ADAM)):
        memory = report_of(*form, params).memory
        assert abs(memory.peak / memory.total - 1) < 0.03


def deep_loss(params, x):
    for w in params["w"]:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


INNER = {"adam": ADAM, "sgd": optax.sgd(0.1), "lion": optax.lion(1e-3)}
INNER["clip"] = optax.chain(optax.clip_by_global_norm(1.0), ADAM)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("form", ["plain", "multisteps", "apply_every", "accumulate"])
@pytest.mark.parametrize("loss", [deep_loss, stack_loss])
def test_a_copy_of_an_argument_takes_memory_and_is_counted(loss, form, inner):
    """XLA:CPU copies what a later instruction overwrites; each copy has memory."""
    layers = 4 * [SHAPES["w"]]
    stack = jax.ShapeDtypeStruct((4, D, D), jnp.float32)
    params = {"w": stack if loss is stack_loss else layers}
    tx = {
        "plain": lambda tx: tx,
        "multisteps": lambda tx: optax.MultiSteps(tx, 4),
        "apply_every": lambda tx: optax.chain(tx, optax.apply_every(4)),
        "accumulate": lambda tx: accumax.accumulate(tx, 4),
    }[form](INNER[inner])
    step = jax.jit(with_optax(tx, loss), donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), X).compile()
    report = accumax.audit(compiled)
    entry = compiled.as_text().partition("\nENTRY ")[2]
    # Of scalars and of rows they are not of a parameter's size.
    copied = re.findall(rf" = f32\[(?:4,)?{D},{D}\]\S* copy\((%\S+)\)", entry)
    assert len([x for x in report.copies if x.where == "outside"]) == len(copied)
    assert abs(report.memory.peak / report.memory.total - 1) < 0.12


MANY = {
    "loop": lambda w: jax.lax.fori_loop(0, 3, lambda i, w: jnp.tanh(w @ w), w),
    "nested": lambda w: jax.lax.fori_loop(
        0,
        3,
        lambda i, w: jax.lax.fori_loop(0, 2, lambda j, w: jnp.sin(w @ w), w) + w,
        w,
    ),
    "branches": lambda w: jax.lax.switch(
        jnp.int32(w[0, 0]), [jnp.sin, lambda w: w, lambda w: w @ w @ w], w
    ),
    "two": lambda w: jax.lax.scan(lambda c, _: (c @ c, c.sum()), w @ w, None, 4)[0],
    "swap": lambda w: jax.lax.fori_loop(
        0, 3, lambda i, c: (c[1] @ c[0], c[0]), (w, w + 1)
    ),
}


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("donate", [(), (0,)])
def test_the_schedule_is_near_in_loops_and_branches(kind, donate):
    memory = accumax.audit(MANY[kind], SHAPES["w"], donate_argnums=donate).memory
    assert abs(memory.peak / memory.total - 1) < 0.03


def test_values_that_change_places_are_warned_of():
    def swapped(params, x):
        del x
        return params[1], params[0]

    report = accumax.audit(swapped, [SHAPES["w"]] * 2, X, donate_argnums=0)
    assert len(report.copies) > 1
    assert "values that change places" in texts(report)


def test_what_is_alive_at_the_peak_has_a_path_a_kind_and_a_source():
    tx, step = accumulated()
    largest = report_of(step, tx).largest
    found = {x.path: x.kind for x in largest if x.path}
    assert found["params['w']"] == "parameters"
    assert found["opt_state.acc_grads['w']"] == "accumulator"
    assert found["opt_state.inner_opt_state[0].mu['w']"] == "optimizer state"
    assert {x.bytes for x in largest if "'w'" in x.path} == {D * D * 4}
    (gradient,) = [x for x in largest if x.kind == "gradients"]
    assert "transpose" in gradient.scope
    assert re.search(r"test_audit\.py:\d+$", gradient.source)


def test_an_optimizer_that_runs_in_every_call_is_found_and_ours_is_not():
    multi = optax.MultiSteps(ADAM, 4)
    found = report_of(with_optax(multi), multi)
    certain = [x for x in found.discarded if x.certain]
    assert sum(x.bytes for x in certain) == 2 * D * D * 4  # both moments
    assert "runs in every call" in texts(found)
    tx, step = accumulated()
    for form in (step, with_optax(tx)):
        found = report_of(form, tx)
        assert not any(x.certain for x in found.discarded)
        assert found.warnings == ()
    # Written as a conditional, which is one on a CPU.
    assert found.conditionals == (1, 1)


CHOOSING = {  # optimizers that choose between two results by a scalar
    "clip": optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "clip, sgd": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "lamb": optax.lamb(1e-3),
    "radam": optax.radam(1e-3),
    "optimistic": optax.chain(
        optax.clip_by_global_norm(1.0), optax.optimistic_gradient_descent(1e-3)
    ),
    "acprop": optax.contrib.acprop(1e-3),
}


def in_a_scan(tx):
    """A call with four updates."""
    step = with_optax(tx)

    def scanned(params, state, x):
        def body(carry, x):
            return step(*carry, x), None

        return jax.lax.scan(body, (params, state), jnp.stack([x] * 4))[0]

    return scanned


@pytest.mark.parametrize("name", CHOOSING)
def test_an_optimizer_whose_result_is_needed_is_not_taken_for_one_that_is_not(name):
    inner = CHOOSING[name]
    tx, step = accumulated(inner)
    for form in (
        (with_optax(inner), inner),
        (in_a_scan(inner), inner),
        (with_optax(tx), tx),
        (step, tx),
    ):
        found = report_of(*form)
        assert not any(x.certain for x in found.discarded)
        assert "runs in every call" not in texts(found)
    if name not in ("clip, sgd", "optimistic"):  # no new moment is of an old one
        multi = optax.MultiSteps(inner, 4).gradient_transformation()
        for flattened in (with_optax(multi), in_a_scan(multi)):
            assert "runs in every call" in texts(report_of(flattened, multi)), name


def test_a_sum_that_a_flag_keeps_is_not_taken_for_an_optimizer():
    tx = accumax.accumulate(ADAM, 4, nonfinite="skip")
    found = report_of(accumax.train_step(loss_fn, tx), tx)
    assert [x.certain for x in found.discarded].count(True) == 0
    assert "cannot be told" in str(found)


def test_crossed_arguments_and_their_copies_have_paths():
    found = report_of(crossed, ADAM)
    assert ("params['w']", "result[0][0].mu['w']") in found.crossed
    assert "in the order of the arguments" in texts(found)
    paths = {x.path for x in found.copies}
    assert "params['w']" in paths
    assert {x.bytes for x in found.copies} == {D * D * 4}
    right = report_of(with_optax(ADAM), ADAM)
    assert right.crossed == right.not_reused == right.copies == right.warnings == ()


def test_the_copy_of_an_activation_of_a_parameters_shape_is_no_warning():
    def loss(params, x):  # x has the shape of w
        hidden = jnp.tanh(x @ params["w"])
        return jnp.mean(jnp.sort(hidden.T @ hidden, axis=0) ** 2)

    tx = accumax.accumulate(ADAM, 4)
    found = report_of(accumax.train_step(loss, tx), tx, x=SHAPES["w"])
    assert all("jvp(" in x.scope for x in found.copies)
    assert not any(x.certain for x in found.copies)
    assert found.warnings == ()


def test_what_was_donated_in_vain_has_a_path():
    found = report_of(with_optax(ADAM), ADAM, donate=(0, 1, 2))
    assert found.not_reused == ("x",)
    assert "x. An output" in texts(found)
    nothing = report_of(with_optax(ADAM), ADAM, donate=())
    assert not nothing.donated
    assert "Nothing is donated" in texts(nothing)


def test_arguments_that_are_not_used_keep_the_others_paths():
    def step(unused, params, also_unused, x):
        return jax.tree.map(lambda p: p * x.sum(), params)

    shapes = {"a": X, "b": SHAPES["w"]}
    found = accumax.audit(step, X, shapes, (X, X), X, donate_argnums=(1, 3))
    assert found.not_reused == ("x",)
    assert found.crossed == ()
    assert {x.path for x in found.largest} >= {"params['a']", "params['b']", "x"}


def mesh_step(reduced):
    """A mean over the devices, in each of 4 microbatches or once."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = (
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))
        for s, spec in (
            (SHAPES["w"], P()),
            (jax.ShapeDtypeStruct((4, 8, D), jnp.float32), P(None, "data")),
        )
    )

    def local(w, x):
        def turn(sums, part):
            grad = jax.grad(lambda w: loss_fn({"w": w}, part))(w)
            return sums + (jax.lax.pmean(grad, "data") if reduced else grad), None

        zeros = jnp.zeros_like(w)
        grads = jax.lax.scan(turn, zeros, x)[0]
        return grads if reduced else jax.lax.pmean(grads, "data")

    step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(None, "data")),
        out_specs=P(),
        check_vma=False,
    )
    return accumax.audit(lambda w, x: w - step(w, x), params, x, donate_argnums=0)


def test_gradients_that_a_loop_reduces_are_counted_and_warned_of():
    found = mesh_step(reduced=True)
    (reduction,) = found.collectives
    assert reduction[:4] == ("all-reduce", D * D * 4, 4, "loop")
    assert (reduction.gradient, reduction.repeats) == (True, 4)
    assert f"up to 4 times a call, {4 * D * D * 4 / 2**10:.2f} KiB" in texts(found)
    once = mesh_step(reduced=False)
    assert [x[:4] for x in once.collectives] == [
        ("all-reduce", D * D * 4, 1, "outside")
    ]
    assert "reduced within a loop" not in texts(once)


def test_our_reductions_are_in_the_boundary_or_once_a_call():
    mesh = jax.make_mesh((4,), ("data",))
    with jax.set_mesh(mesh):
        tx = accumax.accumulate(ADAM, 4, reduce_axis="data")
        params = jax.device_put({"w": jnp.ones((D, D))}, NamedSharding(mesh, P()))
        x = jax.device_put(jnp.ones((8, D)), NamedSharding(mesh, P("data")))
        step = accumax.train_step(loss_fn, tx, microbatch_size=4)
        found = accumax.audit(step, params, tx.init(params), x, donate_argnums=(0, 1))
    large = [x for x in found.collectives if x.gradient]
    assert [x[:4] for x in large] == [("all-reduce", D * D * 4, 1, "branch")]
    assert "reduced within a loop" not in texts(found)


def test_a_stage_is_audited_as_it_is():
    jitted = jax.jit(with_optax(ADAM), donate_argnums=(0, 1))
    lowered = jitted.lower(SHAPES, jax.eval_shape(ADAM.init, SHAPES), X)
    reports = [accumax.audit(x) for x in (lowered, lowered.compile())]
    assert reports[0].memory == reports[1].memory
    assert reports[0].conditionals == (0, 0)
    assert reports[1].conditionals == (None, 0)  # not known any more
    assert "unknown" in str(reports[1])


def test_the_report_is_a_page_a_picture_and_json(tmp_path):
    found = report_of(crossed, ADAM)
    page = str(found)
    assert "copies as large as a parameter: " in page
    for line in found.warnings:
        assert line in page
    back = json.loads(json.dumps(found.to_dict()))
    assert back["memory"]["temp"] == found.memory.temp
    assert back["copies"][0]["path"]
    totals = [sum(now) for now in zip(*found.schedule.values(), strict=True)]
    assert max(totals) == found.memory.peak
    figure = found.plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    labels = {x.get_text() for x in figure.axes[0].get_legend().get_texts()}
    assert {"parameters", "optimizer state", "compiler's total"} <= labels


# One of each form that XLA writes for a GPU or a TPU and a CPU has not.
TPU = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

FileNames
1 "train.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=2 end_column=5}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%cond (s: (s32[], f32[100,100])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[100,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %n = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (t: (s32[], f32[100,100])) -> (s32[], f32[100,100]) {
  %t = (s32[]{:T(128)}, f32[100,100]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%t), index=0
  %a = f32[100,100]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %start = f32[100,100]{1,0:T(8,128)} all-reduce-start(%a), to_apply=%add
  %done = f32[100,100]{1,0:T(8,128)} all-reduce-done(%start)
  ROOT %r = (s32[]{:T(128)}, f32[100,100]{1,0:T(8,128)}) tuple(%j, %done)
}

ENTRY %main (p: f32[100,100]) -> (f32[100,100], f32[100,100]) {
  %p = f32[100,100]{1,0:T(8,128)} parameter(0), metadata={op_name="p[\\'w\\']"}
  %copy-start = (f32[100,100]{1,0:T(8,128)S(1)}, f32[100,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[100,100]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[100,100]{1,0:T(8,128)}), f32[1,100]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:1], [0:100]}
  %slice-done = f32[1,100]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %b = bf16[100,100]{1,0:T(8,128)(2,1)} convert(%copy-done), metadata={op_name="jit(f)/jvp(x)/convert" stack_frame_id=1}
  %c = f32[100,100]{1,0:T(8,128)} convert(%b), backend_config={"text":"(unclosed"}
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, /*index=1*/f32[100,100]{1,0:T(8,128)}) tuple(%zero, %c)
  %w = (s32[]{:T(128)}, f32[100,100]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body
  %out = f32[100,100]{1,0:T(8,128)} get-tuple-element(%w), index=1
  %new = f32[100,100]{1,0:T(8,128)} negate(%p)
  ROOT %result = (f32[100,100]{1,0:T(8,128)}, f32[100,100]{1,0:T(8,128)}) tuple(%new, %out)
}
"""  # noqa: E501


def test_the_forms_of_other_backends_are_read():
    module = hlo.parse(TPU)
    whole = 104 * 128 * 4  # padded to its tiles
    main = module.computations["main"].by_name
    assert hlo.arrays(main["b"].type)[0].bytes == whole // 2
    assert [a.space for a in hlo.arrays(main["copy-start"].type)] == [1, 0, 2]
    assert module.source(main["b"]) == "train.py:7"
    assert module.parameters[0].scope == "p['w']"
    assert module.trips(main["w"]) == 3
    assert module.aliases == {(0,): 0}
    program = buffers.timeline(module)
    # The argument and its new value; the other output, in which the loop's sum is.
    assert max(program.totals()) == 2 * whole + whole // 2
    (reduction,) = [
        x for x in program.executions if x.instruction.op == "all-reduce-start"
    ]
    assert (reduction.where, reduction.times) == ("loop", 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: accumax.audit(3), TypeError, "must be a function"),
        (
            lambda: accumax.audit(jax.jit(jnp.sin), 1.0, donate_argnums=0),
            TypeError,
            "jitted already",
        ),
        (
            lambda: accumax.audit(jax.jit(jnp.sin).lower(1.0), 1.0),
            TypeError,
            "Call audit",
        ),
        (lambda: accumax.audit(jnp.sin, 1.0, donate=0), TypeError, "donate"),
        (lambda: hlo.parse("nothing"), ValueError, "no HLO program"),
    ],
)
def test_wrong_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


SCRIPT = """
import jax, jax.numpy as jnp

def make():
    return jnp.sin, (jax.ShapeDtypeStruct((4, 4), jnp.float32),)

def lowered():
    return jax.jit(jnp.cos).lower(1.0)
"""


def test_the_command_line_prints_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "steps_to_audit.py").write_text(SCRIPT)
    audit_command(["steps_to_audit:make"])
    assert "arguments             64 B" in capsys.readouterr().out
    audit_command(["steps_to_audit:lowered", "--json", "--plot", "memory.png"])
    assert json.loads(capsys.readouterr().out)["memory"]["arguments"] == 4
    assert (tmp_path / "memory.png").exists()
    for wrong in ("steps_to_audit", "steps_to_audit:no", "no_such_module:x"):
        with pytest.raises(SystemExit):
            audit_command([wrong])
        assert wrong.split(":")[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_of_the_command_line_is_no_second_audit(tmp_path):
    (tmp_path / "steps_to_audit.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "error", "-m", "accumax.audit"]
    command.append("steps_to_audit:make")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accumax.audit: one call" in done.stdout
    with pytest.raises(ImportError, match="from accumax import audit"):
        __import__("accumax.audit")
    assert callable(accumax.audit)


def layers_of(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean((x - 1) ** 2)


@pytest.mark.parametrize("each", [True, False])
def test_reductions_that_xla_combines_are_counted(each):
    """Eight microbatches in a Python loop: one operation with 32 gradients, or 4."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params = [jnp.full((32, 32), 0.01 + i) for i in range(4)]
    rows = jnp.ones((8, 4, 32))

    def on_device(params, rows):
        own = jax.lax.pcast(params, "data", to="varying")
        total = jax.tree.map(jnp.zeros_like, params if each else own)
        for x in rows:
            grads = jax.grad(layers_of)(own, x)
            grads = jax.lax.pmean(grads, "data") if each else grads
            total = jax.tree.map(jnp.add, total, grads)
        total = total if each else jax.lax.pmean(total, "data")
        return jax.tree.map(lambda p, g: p - g / 8, params, total)

    step = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P()
    )
    report = accumax.audit(step, params, rows, donate_argnums=0)
    reduced = [c for c in report.collectives if c.gradient]
    assert sum(c.repeats for c in reduced) == (8 if each else 1)
    told = any("up to 8 times a call" in text for text in report.warnings)
    assert told == each


def test_a_state_that_is_not_donated_is_told():
    adam, params, x = optax.adam(1e-3), [jnp.ones((64, 64))] * 2, jnp.ones((4, 64))

    def step(params, opt_state, x):
        grads = jax.grad(layers_of)(params, x)
        updates, opt_state = adam.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    args = params, adam.init(params), x
    report = accumax.audit(step, *args, donate_argnums=0)
    assert len(report.not_donated) == 4
    assert "4 arrays of an optimizer's state are not donated" in report.warnings[0]
    report = accumax.audit(step, *args, donate_argnums=(0, 1))
    assert report.not_donated == ()
    (text,) = report.warnings  # XLA:CPU copies one of the two, all the same
    assert "1 copies" in text
    assert "Donated arguments are reused, in their order." in text
    # A gradient is no new value of its argument.
    (text,) = accumax.audit(jax.grad(layers_of), params, x).warnings
    assert "a gradient is not" in text


def test_the_order_of_twins_is_not_known():
    """An average has the tree of the parameters: which output is whose, none tells."""
    params = [jnp.full((64, 64), float(i)) for i in range(4)]

    def step(params, average, x):
        grads = jax.grad(layers_of)(params, x)
        params = jax.tree.map(lambda p, g: p - g, params, grads)
        return params, jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)

    def swapped(*args):
        return step(*args)[::-1]

    args = params, [p + 1 for p in params], jnp.ones((4, 64))
    right = accumax.audit(step, *args, donate_argnums=(0, 1))
    wrong = accumax.audit(swapped, *args, donate_argnums=(0, 1))
    assert right.crossed is wrong.crossed is None
    assert 0 < len(right.copies) < len(wrong.copies)  # XLA:CPU copies some in any case
    assert "keep their order in the result" in wrong.warnings[0]


def test_a_conditional_that_is_no_more_is_told_although_nothing_is_found():
    tx = optax.MultiSteps(optax.sgd(0.1), 4)
    params = [jnp.ones((64, 64))] * 2

    def step(params, state, x):
        updates, state = tx.update(jax.grad(layers_of)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    args = params, tx.init(params), jnp.ones((4, 64))
    report = accumax.audit(step, *args, donate_argnums=(0, 1))
    assert report.conditionals == (1, 0)
    assert "conditionals that became selects: 1" in str(report)


def test_a_function_that_ran_under_debug_nans_is_told_of_the_flag():
    """JAX keeps what it lowered then, in which nothing is donated."""
    tx, step = accumulated()
    step = jax.jit(step, donate_argnums=(0, 1))
    params, x = {"w": jnp.ones((D, D))}, jnp.ones((8, D))
    with jax.debug_nans(True):
        step(params, tx.init(params), x)
        report = accumax.audit(step, params, tx.init(params), x)
    assert report.memory.aliased == 0
    assert "without that flag" in report.warnings[0]


@pytest.mark.parametrize("flag", ["jax_disable_jit", "jax_debug_nans"])
def test_flags_of_debugging_do_not_change_what_is_compiled(flag):
    """JAX unrolls loops without jit, and donates nothing where it checks for NaN."""
    tx, step = accumulated(microbatch_size=2)

    def make_step(size):
        divided = accumax.value_and_grad(loss_fn, microbatch_size=size)
        return divided, (SHAPES, X)

    def figures():
        report = report_of(step, tx)
        plan = accumax.plan(make_step, batch_size=8, memory_limit="1GiB")
        return report.memory, report.warnings, plan.peak_bytes

    want = figures()
    with getattr(jax, flag.removeprefix("jax_"))(True):
        assert figures() == want
