"""The Flax examples train on their real images, with a small setting."""

import functools

import flax.linen as nn
import flax_linen
import flax_nnx
import images
import jax
import numpy as np
import pytest
from flax import nnx

pytestmark = pytest.mark.slow

EXAMPLES = pytest.mark.parametrize("example", [flax_linen, flax_nnx])
SMALL = "--batch 64 --every 8 --steps 3".split()  # 24 calls; 20 is within a window


class SmallLinen(nn.Module):
    """As `flax_linen.Net`, without the convolutions, which take long to compile."""

    rate: float = 0.2

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(not train, momentum=0.9, name="of_images")(x)
        x = nn.BatchNorm(not train, momentum=0.9)(x.reshape(len(x), -1))
        return nn.Dense(10)(nn.Dropout(self.rate, deterministic=not train)(x))


class SmallNNX(nnx.Module):
    def __init__(self, *, rngs):
        self.of_images = nnx.BatchNorm(1, momentum=0.9, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.linear = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.of_images(x).reshape(len(x), -1))
        return self.linear(self.dropout(x))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(flax_linen, "Net", SmallLinen)
    monkeypatch.setattr(flax_nnx, "Net", SmallNNX)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


@EXAMPLES
def test_the_images_have_the_running_statistics_of_the_big_batch_but_not_naively(
    example, monkeypatch, tmp_path, capsys
):
    block = example.Block  # of two, the one with strides: compiling takes the time
    monkeypatch.setattr(
        example,
        "Block",
        lambda *args, **kw: block(*args, **kw) if 2 in args else lambda x, train=1: x,
    )
    output, every = tmp_path / "figure.png", 4
    flags = f"--batch 128 --every {every} --steps 3 --output {output}"
    runs = example.main(flags.split())

    # By the definition, from the images themselves.
    parsed = images.parse(flags.split(), name="any")
    mean, var = 0.0, 1.0
    for update in range(3):
        x = np.asarray(images.batch(parsed, update, 1)[0], np.float64)
        mean, var = 0.9 * mean + 0.1 * x.mean(), 0.9 * var + 0.1 * x.var()
        for way, tolerance in (("whole", 1e-6), ("accumax", 1e-6)):
            found = runs[way].statistics[update]["of_images"]
            np.testing.assert_allclose(found["mean"], [mean], rtol=tolerance)
            np.testing.assert_allclose(found["var"], [var], rtol=tolerance)
        assert abs(runs["naive"].statistics[update]["of_images"]["var"] - var) > 0.1

    whole, accumax, naive = (runs[way].figures for way in ("whole", "accumax", "naive"))
    for when in ("first", "last"):
        assert accumax[f"images_{when}"] <= 1e-6
        assert naive[f"images_{when}"] > 0.1
    # Each microbatch has been normalised by itself, so these are not equal.
    assert 1e-5 < accumax["deeper_first"] < 0.1 * naive["deeper_first"]
    assert [way["updates"] for way in (whole, accumax, naive)] == [3, 3, 3]
    assert [way["step"] for way in (whole, accumax, naive)] == [3, 3, 3 * every]
    assert accumax["temp"] < 1.4 / every * whole["temp"]
    # The same masks and the same gradients: the statistics are what differs.
    np.testing.assert_allclose(runs["accumax"].losses, runs["naive"].losses, rtol=1e-3)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "images, first update" in capsys.readouterr().out


@EXAMPLES
@pytest.mark.usefixtures("small")
def test_a_run_stopped_within_a_window_goes_on_to_the_same_bits(
    example, tmp_path, monkeypatch, capsys
):
    flags = [*SMALL, "--output", str(tmp_path / "figure.png")]
    folder, train, batch = tmp_path / "checkpoints", example.train, images.batch
    calls, until = [], 24

    @functools.cache
    def whole():
        return train("whole", images.parse(flags, name="any"), 1)

    def train_accumax(way, *args):  # compiling the other ways takes the time
        return train(way, *args) if way == "accumax" else whole()

    def batch_until(flags, call, every):
        if every == 8:
            calls.append(call)
            if call == until:
                raise KeyboardInterrupt
        return batch(flags, call, every)

    monkeypatch.setattr(example, "train", train_accumax)
    monkeypatch.setattr(images, "batch", batch_until)
    monkeypatch.setattr(images, "draw", lambda runs, path: None)
    want, saving = (
        example.main(flags)["accumax"],
        [*flags, "--checkpoints", str(folder)],
    )
    until = 22
    with pytest.raises(KeyboardInterrupt):
        example.main(saving)
    assert sorted(int(path.name) for path in folder.iterdir()) == [1, 20]

    # Not with another batch, and not by mistake on top of a run.
    with pytest.raises(SystemExit, match=r"--seed 1 is not the 0 .* pass --seed 0"):
        example.main([*saving, "--resume", "--seed", "1"])
    with pytest.raises(SystemExit):
        example.main(saving)
    assert "pass --resume" in capsys.readouterr().err

    until, calls = 24, []
    run = example.main([*saving, "--resume"])["accumax"]
    assert calls == [0, 20, 21, 22, 23]  # 0 is compiled with
    calls = []
    finished = example.main([*saving, "--resume"])["accumax"]
    assert calls == [0]
    for again in (run, finished):
        assert_same_bits(again.params, want.params)
        np.testing.assert_array_equal(again.losses, want.losses)
        np.testing.assert_array_equal(again.distances, want.distances)
        for key in ("accuracy", "averaged", "updates", "step", "images_first"):
            assert again.figures[key] == want.figures[key]
    assert_same_bits(run.statistics[-1], want.statistics[-1])


@pytest.mark.usefixtures("small")
def test_smaller_microbatches_have_gradients_further_from_the_big_batch(
    monkeypatch, tmp_path, capsys
):
    trained = []

    def train(way, flags, every):
        trained.append((way, every))
        return images.Run(None, [], np.zeros(1), np.zeros((1, 2)), {"accuracy": 0.5})

    monkeypatch.setattr(flax_linen, "train", train)
    flax_linen.main(f"--sizes --batch 32 --output {tmp_path / 'x.png'}".split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == [4, 8, 16, 32]
    assert trained == [(way, n) for n in (8, 4, 2, 1) for way in ("accumax", "naive")]
    off = [float(row[1]) for row in rows]
    assert off == sorted(off, reverse=True)
    assert off[-1] == 0.0
    assert off[-2] > 0.01


def test_the_calls_of_an_update_share_its_batch_without_a_row_twice():
    flags = images.parse(["--batch", "64"], name="any")
    for update in (0, 1):
        whole = images.batch(flags, update, 1)
        calls = [images.batch(flags, 4 * update + n, 4) for n in range(4)]
        for x, parts in zip(whole, zip(*calls, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), x)
        assert len(np.unique(whole[0], axis=0)) == 64


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch 100 --every 8", "divisible by --every 8"),
        ("--batch 4000", "training images"),
        ("--every 0", "at least 1"),
        ("--steps 0", "at least 1"),
        ("--seed -1", "--seed"),
        ("--output /nowhere/x.png", "existing folder"),
        ("--resume", "needs the --checkpoints"),
        ("--resume --checkpoints /nowhere", "no checkpoint to --resume"),
        (f"--checkpoints {__file__}", "must be a folder"),
    ],
)
@EXAMPLES
def test_bad_flags_are_refused_with_a_message(example, flags, words, capsys):
    with pytest.raises(SystemExit):
        example.main(flags.split())
    assert words in capsys.readouterr().err


def test_sizes_are_refused_with_a_folder_that_they_would_not_use(tmp_path, capsys):
    with pytest.raises(SystemExit):
        flax_linen.main(["--sizes", "--checkpoints", str(tmp_path)])
    assert "leave --checkpoints out" in capsys.readouterr().err
