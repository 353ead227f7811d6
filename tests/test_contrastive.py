"""The contrastive example runs on its real data, with a small setting."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.slow

# By path: `benchmarks`, which pytest has on its path too, has a module of this name.
PATH = Path(__file__).parents[1] / "examples" / "contrastive.py"


@pytest.fixture(scope="module")
def contrastive():
    spec = importlib.util.spec_from_file_location("contrastive_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contrastive_updates_as_the_whole_batch_and_the_naive_way_does_not(
    contrastive, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(contrastive, "MULTIPLES", (1, 16))  # compiling takes the time
    output = tmp_path / "contrastive.png"
    # Nor are the sizes small: XLA:CPU takes longer to compile for smaller ones.
    flags = f"--batch 256 --microbatch 16 --steps 6 --output {output}"
    figures = contrastive.main(flags.split())
    assert figures["loss_accumax"] == pytest.approx(figures["loss_whole"], rel=1e-6)
    assert figures["loss_naive"] < 0.6 * figures["loss_whole"]  # 15 negatives, not 255
    assert figures["error_accumax"] <= 2e-6
    assert figures["error_naive"] > 0.05
    for when in ("first", "final"):
        assert figures[f"difference_{when}_accumax"] <= 1e-4
        assert figures[f"difference_{when}_naive"] > 5e-3
    assert figures["movement_whole"] > 1e-2
    assert figures["held_out_accumax"] == pytest.approx(
        figures["held_out_whole"], rel=1e-5
    )
    # Of 360; rounding may turn a tie over.
    assert abs(figures["found_accumax"] - figures["found_whole"]) <= 2 / 360
    assert figures["found_whole"] > 4 / 360
    assert figures["temp_accumax"] < 0.2 * figures["temp_whole"]
    assert figures["memory_accumax"] < 0.3 * figures["memory_whole"]
    # 16 times the batch: 16 times the activations, or what is stored in a few copies.
    assert figures["temp_16_whole"] > 14 * figures["temp_1_whole"]
    grown = figures["temp_16_accumax"] - figures["temp_1_accumax"]
    assert grown < 4 * figures["temp_16_stored"] < 0.1 * figures["temp_16_whole"]
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "error of its gradient" in capsys.readouterr().out


def test_contrastive_takes_one_tower_for_both_sides_and_an_uneven_batch(contrastive):
    rng = np.random.default_rng(0)
    images, twins = contrastive.with_twins(rng.random((10, 8, 8, 1), np.float32), rng)
    tower = SimpleNamespace(apply=lambda w, x: jnp.tanh(x.reshape(-1, 64) @ w))
    w = rng.normal(scale=0.1, size=(64, 16)).astype(np.float32)
    params = {"towers": [w], "log_scale": jnp.float32(1)}
    ways = contrastive.make_ways(tower, microbatch=4)  # 4, 4 and 2 of 10 pairs
    whole, accumax = (
        jax.jit(ways[way])(params, images, twins) for way in ("whole", "accumax")
    )
    assert np.linalg.norm(whole[1]["towers"][0]) > 0.1
    for a, b in zip(jax.tree.leaves(accumax), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch 1", "from 2 to"),
        ("--batch 4000", "training images"),
        ("--microbatch 0", "from 1 to --batch 512"),
        ("--batch 64 --microbatch 65", "from 1 to --batch 64"),
        ("--steps 0", "at least 1"),
        ("--width 0", "at least 1"),
        ("--seed -1", "--seed"),
        ("--output /nowhere/x.png", "existing folder"),
    ],
)
def test_contrastive_refuses_bad_flags_with_a_message(
    flags, words, contrastive, capsys
):
    with pytest.raises(SystemExit):
        contrastive.main(flags.split())
    assert words in capsys.readouterr().err
