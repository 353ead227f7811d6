"""What is costly to make, made once for all the processes of pytest-xdist."""

import fcntl
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, from whichever process of the tests comes first.

    The folder above a worker's own is one folder for all of a run. Without workers it
    would be that of all runs. (`xdist_group`, which is to keep tests in one worker, has
    no effect with pytest 9.2 and xdist 3.8.)
    """
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / f"{name}.pickle"
        if not file.exists():
            file.write_bytes(pickle.dumps(make()))
        return pickle.loads(file.read_bytes())
