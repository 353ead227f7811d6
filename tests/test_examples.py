"""Each example runs on its real data, with a small setting."""

import digits
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "every", "tolerance"), [("float32", 4, 2e-5), ("bfloat16", 2, 1e-2)]
)
def test_digits_ends_with_the_parameters_of_the_big_batch(
    dtype, every, tolerance, tmp_path, capsys
):
    output = tmp_path / "digits.png"
    flags = f"--batch 256 --every {every} --steps 6 --dtype {dtype} --output {output}"
    figures = digits.main(flags.split())
    assert figures["difference_first"] <= tolerance
    assert figures["difference_final"] <= tolerance < figures["movement"]
    assert figures["updates_whole"] == figures["updates_accumulated"] == 6
    assert figures["accuracy_whole"] > 0.5  # of ten classes, after six updates
    assert abs(figures["accuracy_whole"] - figures["accuracy_accumulated"]) < 0.02
    # The activations of a part, and an accumulator beside the parameters.
    assert figures["temp_accumulated"] < 1.6 / every * figures["temp_whole"]
    assert figures["memory_accumulated"] < figures["memory_whole"]
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch 100 --every 8", "divisible by --every 8"),
        ("--batch 4000", "the training set"),
        ("--every 0", "at least 1"),
        ("--steps 0", "at least 1"),
        ("--seed -1", "--seed"),
        ("--output /nowhere/x.png", "existing folder"),
    ],
)
def test_digits_refuses_bad_flags_with_a_message(flags, words, capsys):
    with pytest.raises(SystemExit):
        digits.main(flags.split())
    assert words in capsys.readouterr().err
