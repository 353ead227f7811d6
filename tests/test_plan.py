"""The largest microbatch that fits: the search, the limits, the errors, the page."""

import functools
import importlib.util
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accumax
from accumax._compiled import search
from accumax._compiled.command import plan_command
from accumax._compiled.limit import Limit
from accumax._compiled.peak import Peak

GIB = 2**30


def script(folder):
    """`plan.py` of examples or benchmarks: both folders have one of this name."""
    path = pathlib.Path(__file__).parents[1] / folder / "plan.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_plan", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fixed_memory(size):
    del size
    return 100


def found(memory, limit, candidates, refuse=math.inf):
    """The last curve, and how many sizes were measured."""

    def measure(size):
        total = None if memory(size) > refuse else memory(size)
        return Peak(size, total, fixed_memory(size), frozenset())

    curves = [*search.search(measure, candidates, lambda peak: limit)]
    return curves[-1].fits, len(curves)


def largest(memory, limit, candidates):
    return max((c for c in candidates if memory(c) <= limit), default=0)


def affine(n):
    return 1000 + 10 * n


def padded(n):
    """To 8 rows, as a TPU has it."""
    return 1000 + 10 * 8 * math.ceil(n / 8)


def with_constant(n):
    """The temporary memory of an optimizer, much more than that of a row."""
    return 100_000 + 3 * n


def bent(n):
    """The optimizer has the peak until the activations have it."""
    return max(5000, 200 + 20 * n)


def step_up(n):
    """An algorithm that needs more memory, from some size on."""
    return 1000 + 10 * n + (3000 if n > 300 else 0)


def square(n):
    return 1000 + n * n // 20


MEMORIES = affine, padded, with_constant, bent, step_up, square


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("fill", [0.001, 0.01, 0.1, 0.4, 0.9])
def test_any_size_is_within_five_percent_of_the_largest(memory, fill):
    for batch in (7, 64, 1000, 4096):
        candidates = range(1, batch + 1)
        limit = int(memory(1) + fill * (memory(batch) - memory(1)))
        size, compiles = found(memory, limit, candidates)
        best = largest(memory, limit, candidates)
        padding = 7 if memory is padded else 0
        assert 0.95 * best - padding <= size <= best, (batch, limit)
        near_linear = memory in (affine, with_constant)
        assert compiles <= (4 if near_linear else 12), (batch, limit)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("fill", [0.0, 0.003, 0.03, 0.3, 1.0])
def test_the_divisor_is_the_largest_that_fits(memory, fill):
    for batch in (1, 12, 97, 1024, 5040):
        candidates = search.divisors(batch)
        limit = int(memory(1) + fill * (memory(batch) - memory(1)))
        size, compiles = found(memory, limit, candidates)
        best = largest(memory, limit, candidates)
        assert 0.95 * best <= size <= best, (batch, limit)
        assert compiles <= (4 if memory in (affine, with_constant) else 11)


def test_a_prediction_that_misses_is_corrected():
    size, compiles = found(step_up, 5000, range(1, 4097))
    assert size == 300 - (300 - size) >= 285
    assert compiles > 3


def test_a_program_that_the_compiler_refuses_does_not_fit():
    for limit in (5000, 6000):  # the compiler refuses at 4000, whatever the limit
        size, compiles = found(affine, limit, range(1, 1025), refuse=4000)
        assert 285 <= size <= 300
        assert compiles <= 10
    assert found(affine, 5000, range(1, 1025), refuse=1)[0] == 0


def test_all_fits_and_nothing_fits_take_few_compiles():
    everything, compiles = found(affine, 10**9, search.divisors(1024))
    assert everything == 1024
    assert compiles <= 2
    nothing, compiles = found(affine, 500, search.divisors(1024))
    assert nothing == 0
    assert compiles <= 3


@functools.cache
def compiled(size):
    def step(w, x):
        return jnp.tanh(x @ w).sum()

    args = jax.ShapeDtypeStruct((64, 64), "float32"), jnp.zeros((size, 64))
    return jax.jit(step).lower(*args).compile()


def peak_of(size):
    memory = compiled(size).memory_analysis()
    fixed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return fixed - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def test_the_plan_is_what_the_compiler_says():
    limit = peak_of(100)
    result = accumax.plan(compiled, 512, memory_limit=limit)
    assert (result.microbatch_size, result.microbatches) == (64, 8)
    assert result.peak_bytes == peak_of(64) <= limit == result.memory_limit
    assert 95 <= result.largest <= 105
    sizes = [row.size for row in result.rows]
    assert sizes == [2**n for n in range(10)]
    assert [row.microbatches for row in result.rows] == sizes[::-1]
    for row in result.rows:
        if row.source == "compiled":
            assert row.bytes == peak_of(row.size)
        elif row.size >= 64:  # a few rows are computed in another way
            assert row.bytes == pytest.approx(peak_of(row.size), rel=0.1)
    assert result.compiles == sum(row.source == "compiled" for row in result.rows) <= 4


def test_any_size_says_how_many_microbatches_and_a_prime_batch_has_few_divisors():
    limit = peak_of(100)
    result = accumax.plan(compiled, 509, memory_limit=limit, divisors_only=False)
    assert 95 <= result.microbatch_size <= result.largest <= 105
    assert result.microbatches == math.ceil(509 / result.microbatch_size)
    prime = accumax.plan(compiled, 509, memory_limit=limit)
    assert prime.microbatch_size == 1
    assert "divisors_only=False" in str(prime)


def test_a_step_may_be_a_function_with_arguments_or_lowered_or_compiled():
    def fun(x):
        return jnp.sin(x) @ x

    def args(size):
        return (jax.ShapeDtypeStruct((size,), "float32"),)

    steps = (
        lambda size: (fun, args(size)),
        lambda size: (jax.jit(fun), args(size)),
        lambda size: [fun, [np.zeros(size, np.float32)]],
        lambda size: jax.jit(fun).lower(*args(size)),
        lambda size: jax.jit(fun).lower(*args(size)).compile(),
    )
    for make_step in steps:
        result = accumax.plan(make_step, 8, memory_limit="1 MiB")
        assert result.microbatch_size == 8


def test_what_devices_send_is_in_the_table():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    reduce_axis = accumax.DataParallel("data", mesh=mesh)

    def make_step(size):
        grad = accumax.grad(
            lambda w, x: jnp.mean(x @ w), microbatch_size=size, reduce_axis=reduce_axis
        )
        w = jax.ShapeDtypeStruct((1024,), "float32")
        return grad, (w, jax.ShapeDtypeStruct((64, 1024), "float32", sharding=rows))

    plan = accumax.plan(make_step, 64, memory_limit="1MiB")
    sent = {row.sent for row in plan.rows if row.source == "compiled"}
    assert min(sent) >= 4096  # the gradient, once
    assert max(sent) < 2 * 4096
    assert "sent" in str(plan)
    assert all(row.sent is None for row in plan.rows if row.source == "predicted")


def test_the_memory_of_several_devices_is_that_of_one():
    mesh = jax.make_mesh((4,), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))

    def make_step(size):
        x = jax.ShapeDtypeStruct((size, 1024), "float32", sharding=rows)
        return jnp.sin, (x,)

    result = accumax.plan(make_step, 8, memory_limit="1 MiB")
    assert result.peak_bytes == pytest.approx(2 * 8 * 1024 * 4 / 4)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (123, 123),
        (np.int64(5), 5),
        ("16GiB", 16 * GIB),
        (" 16 GB ", 16 * 10**9),
        ("1.5MiB", 3 * 2**19),
        ("7 kB", 7000),
        ("12B", 12),
    ],
)
def test_a_limit_in_bytes(given, count):
    assert Limit(given).of([]) == count


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("16GiBs", ValueError, "GiB"),
        ("16", ValueError, "16GiB"),
        ("16 Gb", ValueError, "GB"),
        ("GiB", ValueError, "a number"),
        ("-1GiB", ValueError, "a number"),
        ("0GiB", ValueError, "at least 1 byte"),
        ("0%", ValueError, "above 0%"),
        ("120%", ValueError, "up to 100%"),
        (0, ValueError, "at least 1 byte"),
        (1.5e9, TypeError, "an integer"),
        (True, TypeError, "an integer"),
        (b"16GiB", TypeError, "an integer"),
        ("80%", ValueError, 'Pass bytes, or a string such as "16GiB"'),
        (None, ValueError, 'Pass bytes, or a string such as "16GiB"'),
    ],
)
def test_a_limit_that_is_none_says_what_is_accepted(given, error, words):
    with pytest.raises(error, match=words):
        accumax.plan(never, 8, memory_limit=given)


def never(size):
    raise AssertionError(f"{size} was compiled")


class Device:
    """Of a backend that tells its memory."""

    def memory_stats(self):
        return {"bytes_limit": 1000}


def test_a_share_is_of_the_memory_of_the_device(monkeypatch):
    device = Device()
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert Limit(None).of([]) == 1000
    assert Limit("80%").of([device]) == 800
    with pytest.raises(ValueError, match="does not know"):
        Limit("80%").of([Device()])  # one that is not here


@pytest.mark.parametrize(
    ("batch_size", "error"), [(0, ValueError), (-8, ValueError), (8.0, TypeError)]
)
def test_a_batch_size_that_is_none(batch_size, error):
    with pytest.raises(error, match=f"batch_size={batch_size}"):
        accumax.plan(never, batch_size, memory_limit=1)


def test_nothing_fits_says_how_much_is_missing_at_one_row():
    missing = 100
    with pytest.raises(ValueError, match=f"{missing} B are missing"):
        accumax.plan(compiled, 512, memory_limit=peak_of(1) - missing)
    with pytest.raises(ValueError, match=r"arguments and results alone take 16\."):
        accumax.plan(compiled, 512, memory_limit="1KiB")


def test_a_step_that_fails_names_the_size():
    def fails(size):
        if size > 20:
            raise ZeroDivisionError("no such size")
        return compiled(size)

    words = "microbatch_size=.* failed: ZeroDivisionError: no such size"
    with pytest.raises(RuntimeError, match=words) as info:
        accumax.plan(fails, 1024, memory_limit="1GiB")
    assert isinstance(info.value.__cause__, ZeroDivisionError)

    def does_not_trace(size):
        return (lambda x, y: x @ y), (jnp.ones(size), jnp.ones(3))

    with pytest.raises(RuntimeError, match=r"microbatch_size=4 failed: TypeError"):
        accumax.plan(does_not_trace, 16, memory_limit="1GiB")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (None, "NoneType"),
        (jnp.sin, "a function alone"),
        ((jnp.sin,), "a tuple"),
        ((jnp.sin, 3), "a tuple"),
        ((3, ()), "a tuple"),
    ],
)
def test_nothing_to_lower_says_what_to_return(step, words):
    with pytest.raises(TypeError, match=f"{words}.*must return \\(function, args\\)"):
        accumax.plan(lambda size: step, 8, memory_limit="1GiB")
    with pytest.raises(TypeError, match="make_step"):
        accumax.plan(3, 8, memory_limit="1GiB")  # type: ignore[arg-type]


def test_a_backend_that_does_not_tell_is_an_error(monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    with pytest.raises(ValueError, match="does not tell its memory"):
        accumax.plan(compiled, 8, memory_limit="1GiB")


def test_a_compiler_that_refuses_is_not_a_step_that_fails(monkeypatch):
    def refuse(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of hbm")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)

    def make_step(size):
        return jnp.sin, (jnp.ones(size),)

    with pytest.raises(ValueError, match="the compiler refused the step"):
        accumax.plan(make_step, 8, memory_limit="1GiB")


def test_the_page_and_the_picture(tmp_path, monkeypatch):
    result = accumax.plan(compiled, 512, memory_limit=peak_of(100))
    page = str(result)
    assert page.startswith("microbatch_size=64: 8 microbatches of a batch of 512\n")
    assert "does not fit" in page
    assert "predicted" in page
    assert page.count("<-") == 1
    path = tmp_path / "plan.png"
    result.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"accumax\[examples\]"):
        result.plot()


def test_the_page_of_many_divisors_shows_those_next_to_the_answer():
    rows = tuple(
        accumax._compiled.plan.Row(d, 55440 // d, d, "predicted")
        for d in search.divisors(55440)
    )
    page = str(accumax._compiled.plan.Plan(240, 55440, 250, 250, rows))
    assert "240" in page
    assert len(page.splitlines()) == 4 + 20


def test_the_page_says_where_memory_does_not_grow_with_the_size(monkeypatch):
    def sawtooth(make_step, size):
        return Peak(size, 1024 * (size + 70 * (size < 32)), 0, frozenset())

    monkeypatch.setattr(accumax._compiled.plan, "measure", sawtooth)
    result = accumax.plan(lambda size: size, 128, memory_limit="110KiB")
    less, more = result.uneven
    assert less.size < 32 <= more.size
    assert less.bytes > more.bytes
    assert f"everywhere: {less.size} rows {less.size + 70:.2f} KiB" in str(result)
    straight = accumax.plan(compiled, 512, memory_limit=peak_of(100))
    assert straight.uneven is None
    assert "everywhere" not in str(straight)


def test_no_progress_bar_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert accumax.plan(compiled, 8, memory_limit="1GiB").microbatch_size == 8


@pytest.mark.slow
@pytest.mark.parametrize("which", range(3))
def test_the_plan_of_a_train_step_is_near_the_true_largest(which):
    benchmark = script("benchmarks")
    model = benchmark.all_models()[which]._replace(rows=256)
    result = benchmark.measure(model, jax.devices()[0], 0.3)
    assert result.met, result


@pytest.mark.slow
def test_the_example_trains_within_its_limit(tmp_path, capsys):
    example = script("examples")
    output = tmp_path / "plan.png"
    flags = f"--batch 256 --memory 1.5MiB --width 8 --steps 3 --output {output}"
    figures = example.main(flags.split())
    assert figures["memory_planned"] <= figures["limit"] < figures["memory_whole"]
    assert figures["planned"] == pytest.approx(figures["memory_planned"], rel=1e-3)
    assert figures["difference"] < 1e-4 < figures["movement"]
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "peak memory of the step" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        example.main(["--batch", "0"])


STEP = """
import jax, jax.numpy as jnp
def make_step(size):
    return jnp.sin, (jax.ShapeDtypeStruct((size, 64), "float32"),)
"""


def test_the_command_prints_the_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "planned.py").write_text(STEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    flags = "planned:make_step --batch-size 64 --memory 16KiB --plot planned.png"
    plan_command(flags.split())
    assert capsys.readouterr().out.startswith("microbatch_size=32: 2 microbatches")
    assert (tmp_path / "planned.png").exists()
    for words, message in (
        ("nowhere_at_all:f --batch-size 8", "no module 'nowhere_at_all'"),
        ("planned:f --batch-size 8", "no function 'f'"),
        ("planned --batch-size 8", "module:function"),
        ("planned:make_step --batch-size 0 --memory 1GiB", "batch_size=0"),
        ("planned:make_step --batch-size 8 --memory 1Gi", "1Gi"),
        ("planned:make_step --batch-size 8 --memory 100", "are missing"),
    ):
        with pytest.raises(SystemExit):
            plan_command(words.split())
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_and_the_name_stays_the_function(tmp_path):
    (tmp_path / "planned.py").write_text(STEP)
    run = [sys.executable, "-W", "error", "-m", "accumax.plan"]
    run += "planned:make_step --batch-size 64 --memory 16KiB".split()
    out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("microbatch_size=32")
    assert not out.stderr
    code = "import accumax.plan"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "accumax.plan is a function" in out.stderr
