"""The example runs on its real data, with a small setting."""

import long_sequences
import pytest

pytestmark = pytest.mark.slow


def test_long_sequences_trains_as_with_all_logits_at_once(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(long_sequences, "SIZES", (64,))
    output = tmp_path / "long_sequences.png"
    flags = "--vocabulary 4096 --length 512 --microbatch 64 --width 32 --steps 4"
    figures = long_sequences.main([*flags.split(), "--output", str(output)])
    assert figures["loss_accumax"] == pytest.approx(figures["loss_whole"], rel=1e-6)
    assert figures["held_out_accumax"] == pytest.approx(
        figures["held_out_whole"], rel=1e-5
    )
    assert figures["error"] < 1e-6
    assert figures["difference"] < 1e-4 < figures["movement"]
    # Of 512 tokens, 64 at a time; the gradient of the weights is in both.
    assert figures["temp_accumax"] < 0.4 * figures["temp_whole"]
    # Whole, the logits are there in float32; in both, the weights once more.
    assert figures["large_whole"] > 2 * figures["large_logits"]
    spared = figures["large_whole"] - figures["large_accumax"]
    assert spared > 0.9 * figures["large_logits"]
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "tokens at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--vocabulary 1", "at least 2"),
        ("--length 0", "at least 1"),
        ("--microbatch 0", "from 1 to --length 2048"),
        ("--length 64 --microbatch 65", "from 1 to --length 64"),
        ("--steps 0", "at least 1"),
        ("--seed -1", "--seed"),
        ("--output /nowhere/x.png", "existing folder"),
    ],
)
def test_long_sequences_refuses_bad_flags_with_a_message(flags, words, capsys):
    with pytest.raises(SystemExit):
        long_sequences.main(flags.split())
    assert words in capsys.readouterr().err


def test_long_sequences_says_how_many_words_there_are():
    with pytest.raises(SystemExit, match="the library has"):
        long_sequences.main("--length 100000 --steps 100000".split())
