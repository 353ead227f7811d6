"""No device waits for what another one leaves out."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("stuck.py")


@pytest.mark.parametrize("form", ["value_and_grad", "own_shard_map", "train_step"])
def test_a_device_without_weight_joins_in_what_the_loss_exchanges(form):
    # Before the fix, the losses that exchange in their backward pass alone hung here.
    done = subprocess.run(
        [sys.executable, SCRIPT, form],
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("right\n"), done.stderr[-2000:]
