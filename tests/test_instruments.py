"""The examples of the instruments run, each with a small setting."""

import audit
import noise_scale
import pytest

pytestmark = pytest.mark.slow


def test_the_audited_ways_make_one_update_and_only_multisteps_wastes(tmp_path, capsys):
    output = tmp_path / "audit.png"
    flags = "--every 2 --microbatch 1 --layers 2 --width 32 --length 24"
    figures = audit.main([*flags.split(), "--output", str(output)])
    assert figures.keys() == {"MultiSteps", "by hand", "accumax", "whole batch"}
    assert figures["MultiSteps"]["discarded"] > 0
    for name in ("by hand", "accumax", "whole batch"):
        assert figures[name]["discarded"] == 0
    # Of two biases and an activation, which in so small a net are a hundredth of the
    # largest parameter.
    assert figures["accumax"]["copies"] <= 3 < figures["MultiSteps"]["copies"]
    assert figures["accumax"]["temp"] < figures["by hand"]["temp"]
    for figure in figures.values():
        assert figure["off"] <= 2e-5  # of a step of Adam, 1e-3
    out = capsys.readouterr().out
    assert out.count("accumax.audit: one call") == 3
    assert output.read_bytes().startswith(b"\x89PNG")


def test_the_noise_scale_is_near_its_definition(tmp_path, capsys, monkeypatch):
    output = tmp_path / "noise_scale.png"
    monkeypatch.setattr(noise_scale, "WINDOWS", 200)
    figures = noise_scale.main(["--updates", "20", "--output", str(output)])
    assert abs(figures["tracked"] / figures["exact"] - 1) < 0.3
    assert figures["off"] <= 1e-5
    assert figures["movement"] > 5e-4
    assert "by its definition" in capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("example", "flags", "words"),
    [
        (audit, "--every 0", "--every 0 must be at least 1"),
        (audit, "--every 100000", "the paragraphs"),
        (audit, "--width 30", "multiple of 4"),
        (audit, "--output /nowhere/x.png", "existing folder"),
        (noise_scale, "--rows 0", "--rows 0 must be from 1 to"),
        (noise_scale, "--updates 0", "--updates 0 must be at least 1"),
        (noise_scale, "--seed -1", "--seed"),
        (noise_scale, "--output /nowhere/x.png", "existing folder"),
    ],
)
def test_bad_flags_are_refused_with_a_message(example, flags, words, capsys):
    with pytest.raises(SystemExit):
        example.main(flags.split())
    assert words in capsys.readouterr().err
