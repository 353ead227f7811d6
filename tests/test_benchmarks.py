"""The benchmarks run. What they time at this size means nothing; see their headers."""

import accuracy
import forms
import pytest
import speed
import targets

import accumax


def test_the_compiled_figures_print_their_bars(capsys, monkeypatch):
    # The bars of the large matrices are in test_compiled.py.
    few = forms.matrices(2, 64)
    monkeypatch.setattr(forms, "matrices", lambda *_: few)
    targets.main(["cpu", "--size", "2,32,2,64,16", "--repeats", "1"])
    out = capsys.readouterr().out
    assert f"accumax {accumax.__version__}" in out
    assert "memory of train_step / plain" in out
    assert "copies in the fused steps of the matrices: 0, bar 0: met" in out


def test_the_inner_optimizer_runs_once_in_a_window_in_every_form():
    assert speed.inner_runs() == 1


def test_the_timed_figures_are_ratios_within_one_run():
    assert speed.optimizer_times(speed.QUICK) > 0


def test_the_error_stays_within_twice_that_of_the_big_batch():
    assert accuracy.table(seeds=1, windows=5) <= 2


def test_a_target_that_is_unknown_is_refused(capsys):
    with pytest.raises(SystemExit):
        targets.main(["abacus"])
    assert "abacus" in capsys.readouterr().err
