"""What is costly to make, made once for all the processes of pytest-xdist."""

import fcntl
import pickle
from collections.abc import Callable
from typing import Any

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, from whichever process of the tests comes first.

    The folder above a worker's own is one folder for all. (Keeping the tests in one
    worker, which `xdist_group` is for, fails with pytest 9.2: every worker runs them.)
    """
    folder = factory.getbasetemp().parent
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / f"{name}.pickle"
        if not file.exists():
            file.write_bytes(pickle.dumps(make()))
        return pickle.loads(file.read_bytes())
