"""Two processes train as one does, and one that dies takes nothing with it."""

import signal

import numpy as np
import processes
import pytest
from once import once

pytestmark = pytest.mark.slow


@pytest.fixture
def undisturbed(tmp_path_factory):
    """The end of a run of this number of processes."""

    def undisturbed(number):
        def run():
            return processes.run(tmp_path_factory.mktemp("run") / "steps", number)

        return once(tmp_path_factory, f"processes{number}", run)

    return undisturbed


def of_all(shards, way, words):
    """What each device has of each leaf of a way whose path has these words."""
    found = {}
    for name, x in sorted(shards.items()):
        path, device = name.rsplit(" of ", 1)
        if path.startswith(f"['{way}']") and all(
            word in path for word in words.split()
        ):
            found.setdefault(path, {})[int(device)] = x
    devices = list(range(processes.DEVICES))
    assert found
    assert all(sorted(leaf) == devices for leaf in found.values())
    return {path: np.stack([leaf[n] for n in devices]) for path, leaf in found.items()}


def test_two_processes_of_four_devices_end_with_the_bits_of_one_of_eight(undisturbed):
    one, two = map(undisturbed, (1, 2))
    assert one.first == two.first == 0
    differ = processes.different(one.shards, two.shards)
    assert [name for name in differ if not name.startswith("['reals']")] == []


@pytest.mark.parametrize(
    ("way", "shape"),
    [("divided", (8, 1, 2)), ("groups", (8, 2, 2))],
)
def test_parts_of_a_state_are_those_of_whole_ones(way, shape, undisturbed):
    """Of (8, 2) numbers a row for each device, or two rows for each of a group."""
    shards = undisturbed(2).shards
    (whole,) = of_all(shards, "integers", "inner_opt_state mu['out']").values()
    (parts,) = of_all(shards, way, "inner_opt_state mu['out']").values()
    assert parts.shape == shape
    copies = parts.size // whole[0].size
    np.testing.assert_array_equal(parts.reshape(copies, 8, 2), [whole[0]] * copies)


@pytest.mark.parametrize("way", processes.WAYS)
def test_the_ends_that_are_compared_are_in_a_window_after_two_updates(way, undisturbed):
    """Else they would be the same for being empty, or for never having been summed."""
    shards = undisturbed(2).shards
    for words, count in [
        ("gradient_step", 2),
        ("mini_step", processes.CALLS % processes.EVERY),
    ]:
        (found,) = of_all(shards, way, words).values()
        np.testing.assert_array_equal(found, np.full(processes.DEVICES, count))
    for name, before in processes.start().items():
        (after,) = of_all(shards, way, f"[0]['{name}']").values()
        (sums,) = of_all(shards, way, f"acc_grads['{name}']").values()
        own = sums.reshape(processes.DEVICES, -1)
        if way == "groups":
            assert len(np.unique(own[::4], axis=0)) == 2  # each group its own
            np.testing.assert_array_equal(after[:4], after[4:])
            continue
        assert np.ptp(after, axis=0).max() == 0  # replicated
        assert (after[0] != before).any()
        if way != "divided":
            (momentum,) = of_all(shards, way, f"inner_opt_state mu['{name}']").values()
            assert np.ptp(momentum, axis=0).max() == 0
            assert momentum.any()
        assert sums.shape == (processes.DEVICES, 1, *before.shape)
        assert len(np.unique(own, axis=0)) == processes.DEVICES  # each its own


def test_two_processes_round_real_numbers_as_one_does(undisturbed):
    """gloo sums in another order than XLA, so their bits are not the same."""
    one, two = (undisturbed(number).shards for number in (1, 2))
    assert one.keys() == two.keys()
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("victim", "place"), [(0, "step"), (1, "write")])
def test_a_killed_process_ends_the_other_and_a_restart_loses_nothing(
    victim, place, undisturbed, tmp_path
):
    """Process 0 is the coordinator, whose death is another error than that of 1.

    The first dies while the other waits for it in a collective, the second while both
    write a checkpoint. `python tests/processes.py --victim N` takes all places.
    """
    steps = tmp_path / "steps"
    death = processes.kill(steps, victim, place)
    assert death.code not in (0, -signal.SIGKILL), death.log
    assert "another task died" in death.log, death.log
    # What was half written has another name, and is not taken for a checkpoint.
    newest = max(int(path.name) for path in steps.iterdir() if path.name.isdigit())
    last = processes.DIES - 1
    assert newest in ((last, last + 1) if place == "write" else (last,))
    end = processes.run(steps, 2)
    assert end.first == newest
    assert processes.different(undisturbed(2).shards, end.shards) == []
