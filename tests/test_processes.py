"""Two processes train as one does, and one that dies takes nothing with it."""

import functools
import pathlib
import signal
import tempfile

import numpy as np
import processes
import pytest

pytestmark = pytest.mark.slow


@functools.cache
def undisturbed(data, number):
    with tempfile.TemporaryDirectory() as folder:
        return processes.run(pathlib.Path(folder, "steps"), data, number)


def of_all(shards, words):
    """The shards, one for each device, of each leaf whose path has these words."""
    found = {}
    for name, x in sorted(shards.items()):
        path, device = name.rsplit(" of ", 1)
        if all(word in path for word in words.split()):
            found.setdefault(path, {})[int(device)] = x
    devices = list(range(processes.DEVICES))
    assert found
    assert all(sorted(leaf) == devices for leaf in found.values())
    return {path: np.stack([leaf[n] for n in devices]) for path, leaf in found.items()}


@pytest.mark.parametrize("data", ["integers", "divided"])
def test_two_processes_of_four_devices_end_with_the_bits_of_one_of_eight(data):
    one, two = (undisturbed(data, number) for number in (1, 2))
    assert one.first == two.first == 0
    assert processes.different(one.shards, two.shards) == []
    if data == "divided":  # the same bits as with whole states
        (parts,) = of_all(two.shards, "inner_opt_state mu['out']").values()
        whole = undisturbed("integers", 2).shards
        (momentum,) = of_all(whole, "inner_opt_state mu['out']").values()
        np.testing.assert_array_equal(parts.reshape(8, 2), momentum[0])


@pytest.mark.parametrize("data", ["integers", "reals"])
def test_the_ends_that_are_compared_are_in_a_window_after_two_updates(data):
    """Else they would be the same for being empty, or for never having been summed."""
    shards = undisturbed(data, 2).shards
    for words, count in [
        ("gradient_step", 2),
        ("mini_step", processes.CALLS % processes.EVERY),
    ]:
        (found,) = of_all(shards, words).values()
        np.testing.assert_array_equal(found, np.full(processes.DEVICES, count))
    for name, before in processes.start().items():
        (after,) = of_all(shards, f"['params']['{name}']").values()
        assert np.ptp(after, axis=0).max() == 0  # replicated
        assert (after[0] != before).any()
        (momentum,) = of_all(shards, f"inner_opt_state mu['{name}']").values()
        assert np.ptp(momentum, axis=0).max() == 0
        assert momentum.any()
        (sums,) = of_all(shards, f"acc_grads['{name}']").values()
        assert sums.shape == (processes.DEVICES, 1, *before.shape)
        rows = sums.reshape(processes.DEVICES, -1)
        assert len(np.unique(rows, axis=0)) == processes.DEVICES  # each its own


def test_two_processes_round_real_numbers_as_one_does():
    """gloo sums in another order than XLA, so their bits are not the same."""
    one, two = (undisturbed("reals", number).shards for number in (1, 2))
    assert one.keys() == two.keys()
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("victim", "place", "data"),
    [
        (0, "step", "reals"),
        (1, "step", "divided"),
        (1, "save", "reals"),
        (0, "write", "reals"),
        (1, "write", "divided"),
    ],
)
def test_a_killed_process_ends_the_other_and_a_restart_loses_nothing(
    victim, place, data, tmp_path
):
    """Process 0 is the coordinator, whose death is another error than that of 1."""
    steps = tmp_path / "steps"
    death = processes.kill(steps, data, victim, place)
    assert death.code not in (0, -signal.SIGKILL), death.log
    assert "another task died" in death.log, death.log
    # What was half written has another name, and is not taken for a checkpoint.
    newest = max(int(path.name) for path in steps.iterdir() if path.name.isdigit())
    last = processes.DIES - 1
    assert newest in ((last, last + 1) if place == "write" else (last,))
    end = processes.run(steps, data, 2)
    assert end.first == newest
    assert processes.different(undisturbed(data, 2).shards, end.shards) == []
