"""The language model trains on its real text, with a small setting."""

import language_model
import pytest

pytestmark = pytest.mark.slow


def test_language_model_updates_as_the_big_batch_and_the_mean_of_means_does_not(
    tmp_path, capsys
):
    output = tmp_path / "language_model.png"
    # Eight paragraphs as 3, 3 and 2: uneven in rows too, not only in bytes.
    flags = "--batch 8 --microbatch 3 --steps 3 --layers 2 --width 16 --length 128"
    figures = language_model.main([*flags.split(), "--output", str(output)])

    def off(key, way):
        return abs(figures[f"{key}_{way}"] - figures[f"{key}_whole"])

    assert off("loss", "accumulated") <= 1e-5  # of 9 bits per byte, in float32
    assert off("loss", "naive") > 100 * off("loss", "accumulated")
    assert off("loss", "naive") > 1e-3
    assert off("held_out", "accumulated") <= 1e-4 < off("held_out", "naive")
    assert figures["gradient_error_accumulated"] <= 2e-6
    assert figures["gradient_error_naive"] > 1e-2
    for when in ("first", "final"):
        assert figures[f"difference_{when}_accumulated"] <= 5e-5
        assert figures[f"difference_{when}_naive"] > 1e-3
    assert figures["movement_whole"] > 5e-3
    # The activations of 3 paragraphs of 8, and an accumulator.
    assert figures["temp_3"] == figures["temp_accumulated"]
    assert figures["temp_8"] == figures["temp_whole"]
    assert figures["temp_accumulated"] < 0.5 * figures["temp_whole"]
    assert figures["memory_accumulated"] < 0.5 * figures["memory_whole"]
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "held-out loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch 0", "--batch 0 must be from 1 to"),
        ("--batch 1000000", "the paragraphs"),
        ("--microbatch 0", "--microbatch 0 must be from 1 to 16"),
        ("--batch 4 --microbatch 5", "from 1 to 4, --batch"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--layers 0", "--layers 0 must be at least 1"),
        ("--length 0", "--length 0 must be at least 1"),
        ("--width 0", "multiple of 4"),
        ("--width 30", "multiple of 4"),
        ("--seed -1", "--seed"),
        ("--output /nowhere/x.png", "existing folder"),
    ],
)
def test_language_model_refuses_bad_flags_with_a_message(flags, words, capsys):
    with pytest.raises(SystemExit):
        language_model.main(flags.split())
    assert words in capsys.readouterr().err


def test_language_model_reads_the_same_text_in_every_run_and_holds_some_out():
    training, held_out = language_model.load()
    assert (training, held_out) == language_model.load()
    lengths = {len(paragraph) for paragraph in training}
    assert min(lengths) < 10
    assert max(lengths) > 256
    text = language_model.pad(training[:2], length=8)
    assert text.shape == (2, 8)
    assert bytes(b for b in text[1] if b != language_model.PAD) == training[1][:8]
