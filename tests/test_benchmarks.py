"""The benchmarks run. What they time at this size means nothing; see their headers."""

import accuracy
import adama
import devices
import flax_states
import forms
import info_nce
import jax
import jax.numpy as jnp
import losses
import many_devices
import models
import optax_notebook
import pytest
import results
import run
import speed
import targets
import transformer
import zoo

import accumax

pytestmark = pytest.mark.slow


def test_the_compiled_figures_print_their_bars(capsys, monkeypatch):
    # The bars of the large matrices are in test_compiled.py.
    of, divided = forms.matrices, forms.divided_steps
    ours = forms.VALUE_AND_GRAD, forms.WEIGHTED_GRADIENT, forms.DIVIDED
    monkeypatch.setattr(forms, "matrices", lambda n=2, width=64: of(n, width))
    monkeypatch.setattr(losses, "DEPTHS", (2, 3, 4))
    monkeypatch.setattr(info_nce, "LAYERS", 1)
    monkeypatch.setattr(info_nce, "BATCHES", (1, 2, 3))
    monkeypatch.setattr(  # those of others take as long to compile
        forms, "divided_steps", lambda *args: {k: divided(*args)[k] for k in ours}
    )
    targets.main(["cpu", "--size", "2,32,2,64,16", "--repeats", "1"])
    out = capsys.readouterr().out
    assert f"accumax {accumax.__version__}" in out
    assert "memory of train_step / plain" in out
    assert "copies in the fused steps of the matrices: 0, bar 0: met" in out
    for bar in (
        "memory of value_and_grad(weighted=True) / plain",
        "memory of train_step(microbatch_size) / plain",
        "temp of three losses / the costliest, one trunk",
        "temp of three losses / the costliest, a trunk and three heads",
        "temp of InfoNCE at 3 x, less embeddings, / 2 x",
    ):
        assert bar in out


def test_the_inner_optimizer_runs_once_in_a_window_in_every_form():
    assert speed.inner_runs() == 1


def test_the_timed_figures_are_ratios_within_one_run():
    assert speed.optimizer_times(speed.QUICK) > 0
    for what, ratio, _ in speed.within_a_call(speed.QUICK):
        assert ratio > 0, what


def test_the_small_models_of_the_timed_figures_learn():
    for model in (models.convolutions(2), models.stack(2, 8, 2)):
        grads = jax.jit(jax.grad(model.loss))(model.init(), model.batch)
        assert all(jnp.any(g != 0) for g in grads)


def test_the_error_stays_within_twice_that_of_the_big_batch():
    assert accuracy.table(seeds=1, windows=5) <= 2
    assert accuracy.gradient_table(seeds=1) <= 2
    assert accuracy.half_precision_table(seeds=1, sizes=(64,)) <= 2


def test_ones_in_bfloat16_have_a_mean_of_one():
    assert accuracy.ones_table() == 0


def test_every_model_of_the_zoo_has_a_gradient():
    for model in zoo.models(1 / 16):
        shapes = jax.eval_shape(jax.grad(model.loss), model.params, model.x)
        assert jax.tree.structure(shapes) == jax.tree.structure(model.params)


def test_the_smallest_run_writes_what_pages_can_quote(tmp_path):
    arguments = f"--tiny --output {tmp_path} --only"
    for only in ("memory/lora|hold|inner_runs|grows/k", "grows/parameters"):
        paths = run.main([*arguments.split(), only])
        assert all(path.exists() for path in paths)
    assert {path.suffix for path in paths} == {".json", ".md", ".png"}
    rows = results.load(tmp_path)
    assert rows.keys() >= {  # of both runs
        "memory/lora/adamw/cpu/train_step",
        "copies/lora/adamw/cpu/train_step",
        "hold/2x32x32/cpu/apply_gradients",
        "inner_runs/train_step",
        "grows/k/2/cpu/value_and_grad",
        "grows/parameters/1e6/cpu/train_step",
    }
    for row in rows.values():
        assert row.value is None or row.value >= 0, row
        assert row.unit
        assert row.command.startswith("python benchmarks/run.py --only ")
    # The base is frozen, which value_and_grad cannot know.
    behind = rows["memory/lora/adamw/cpu/value_and_grad"]
    assert "Differentiate only what is trained" in behind.note
    page = paths[1].read_text()
    assert behind.note in page
    assert f"{run.page.MARK} |" in page


def test_what_others_claim_is_measured(monkeypatch):
    on, size = devices.device("cpu"), transformer.Size(2, 32, 2, 64, 16, 2)
    monkeypatch.setattr(info_nce, "LAYERS", 1)
    monkeypatch.setattr(info_nce, "BATCHES", (1, 4))
    found = [
        *adama.rows(on, "cpu", size),
        *optax_notebook.memory(on, "cpu", size),
        *optax_notebook.times("cpu", 1, size),
        *info_nce.memory(64, on, "cpu"),
        *info_nce.time(64, "cpu", 1),
    ]
    rows = {row.name: row.value for row in found}
    assert len(rows) == len(found)
    assert all(value > 0 for value in rows.values())
    # The gradient tree that is not there, but for activations.
    assert rows["adama/cpu/train_step"] < rows["adama/cpu/tree"]
    memory = "optax_notebook/memory/cpu/"
    assert rows[memory + "train_step"] < rows[memory + "multisteps"]
    memory = "gradcache/memory/cpu/4/"
    assert rows[memory + "microbatch"] < rows[memory + "whole"]


def test_devices_reduce_a_gradient_once_a_window():
    size = transformer.Size(2, 32, 2, 64, 16)
    rows = {row.name: row.value for row in many_devices.grows("cpu", size, (2,))}
    case = "reductions/transformer/cpu/"
    assert rows[case + "value_and_grad"] == pytest.approx(1, abs=0.01)
    assert rows[case + "train_step_and_accumulate"] == pytest.approx(1, abs=0.01)
    assert rows[case + "multisteps"] >= forms.EVERY


def test_a_target_that_is_unknown_is_refused(capsys):
    with pytest.raises(SystemExit):
        targets.main(["abacus"])
    assert "abacus" in capsys.readouterr().err


def test_a_flax_step_costs_its_accumulator_and_copies_nothing():
    found = flax_states.figures(devices.device("cpu"))
    for name, (arguments, temp, copies) in found.items():
        model, step = name.split("/")
        plain = found[f"{model}/none"]
        if step != "none":
            assert copies == 0
            # Of "lora", a low-rank addition is trained. The step of NNX has an
            # accumulator in place of the average of the parameters.
            more = 1.01 if step.startswith("linen") else 0.02
            assert arguments - plain[0] <= more
            assert temp <= plain[1] + 0.001
