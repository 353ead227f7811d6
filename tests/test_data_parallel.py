"""The data-parallel example, in one process and in two, each with a small setting."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import data_parallel
import numpy as np
import pytest
from once import once

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]
WIDTH, EVERY, MICROBATCHES = 64, 2, 4
FLAGS = "--batch 256 --every 2 --microbatch 32 --steps 2 --width 64"
PATIENCE = 120  # seconds, for a busy machine: a quiet one takes a tenth
# The weights and the biases of the net, in float32.
GRADIENT = 4 * sum(
    (
        64 * WIDTH + WIDTH,
        4 * (2 * WIDTH + WIDTH * WIDTH + WIDTH),
        2 * WIDTH,
        WIDTH * 10 + 10,
    )
)


class Printed(NamedTuple):
    """What a process printed, and whether it drew."""

    text: str
    drew: bool

    def row(self, label):
        """The numbers of a row of the table."""
        found = re.search(rf"^ *{label}((?: +[-+.\de]+){{5}})", self.text, re.MULTILINE)
        assert found, self.text
        return [float(cell) for cell in found[1].split()]

    def collectives(self, way):
        """(times, op, bytes, where) of each collective of one way."""
        lines = self.text.split("are an update")[1].splitlines()
        pattern = r"  (\S.*?)? +(\d+) x (\S+) +([\d,]+) bytes (.*)"
        found, name = [], ""
        for line in filter(None, (re.fullmatch(pattern, line) for line in lines)):
            name = line[1] or name
            if name == way:
                size = int(line[4].replace(",", ""))
                found.append((int(line[2]), line[3], size, line[5]))
        return found


def run(*starts):
    """What processes print that are started so: (flags, environment) of each."""
    clean = {
        name: value
        for name, value in os.environ.items()
        # gRPC would ask a proxy for the coordinator.
        if name != "JAX_NUM_CPU_DEVICES" and not name.lower().endswith("_proxy")
    }
    # Compiled fast, as the tests are, but on as many devices as the example takes.
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    clean |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    clean["PYTHONPATH"] = os.pathsep.join([str(ROOT), clean.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "examples/data_parallel.py"), *FLAGS.split()]
    running, end = [], time.monotonic() + PATIENCE
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        try:
            for n, (flags, environment) in enumerate(starts):
                own = [*flags.split(), "--output", str(folder / f"{n}.png")]
                with (
                    (folder / f"{n}.out").open("wb") as out,
                    (folder / f"{n}.err").open("wb") as err,
                ):
                    process = subprocess.Popen(
                        command + own, env=clean | environment, stdout=out, stderr=err
                    )
                running.append(process)
            # All are asked: one whose other process has died waits for minutes.
            while any(process.poll() is None for process in running):
                if any(process.poll() for process in running) or time.monotonic() > end:
                    break
                time.sleep(0.05)
            codes = [process.poll() for process in running]
            errors = [(folder / f"{n}.err").read_text() for n in range(len(starts))]
            assert codes == [0] * len(starts), "\n".join(errors)
        finally:
            for process in running:
                process.kill()
            for process in running:
                process.wait()
        return [
            Printed((folder / f"{n}.out").read_text(), (folder / f"{n}.png").exists())
            for n in range(len(starts))
        ]


@pytest.fixture
def alone(tmp_path_factory):
    (printed,) = once(tmp_path_factory, "data_parallel", lambda: run(("", {})))
    return printed


def two():
    """Process 0, which is told where it is, and 1, which finds it as under Slurm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = {"JAX_NUM_CPU_DEVICES": "4"}
    job = {
        "JAX_COORDINATOR_PORT": port,
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
    }
    first = f"--coordinator 127.0.0.1:{port} --processes 2 --process 0"
    return run((first, count), ("--distributed", count | job))


def check(printed, devices):
    """That all three ways agree, and that one of them reduces once in an update."""
    assert f"a call on {devices} devices; {EVERY} are an update" in printed.text
    itself, *others, _ = printed.row("off the first way by")
    assert itself == 0
    assert 0 < max(others) <= 2e-5
    movements = printed.row("parameters moved by")
    assert min(movements) > 100 * max(others)
    assert np.ptp(printed.row("test accuracy, %")) < 1
    one, *several = printed.row("memory of a device, MiB")
    assert max(several) < one / 2
    _, whole, divided, _ = several
    assert divided < 0.8 * whole

    def total(way, place):
        found = printed.collectives(way)
        ops = {op for _, op, _, _ in found}
        zero = {"all-reduce", "reduce-scatter", "all-gather"}
        assert ops == (zero if way == "ZeRO-1" else {"all-reduce"})
        return sum(times * size for times, _, size, where in found if place in where)

    scalars = 64  # bytes at most, the loss and the weights
    loop = total("automatic", "loop")
    assert 0 <= loop - MICROBATCHES * GRADIENT <= MICROBATCHES * scalars
    assert total("reduce_axis", "window") == GRADIENT
    assert total("reduce_axis", "loop") == 0
    for way in ("automatic", "reduce_axis"):
        assert total(way, "in a call") <= scalars
    ((times, *_),) = [x for x in printed.collectives("reduce_axis") if "window" in x[3]]
    assert times == 1
    assert total("ZeRO-1", "in a call") <= scalars
    sent = np.array(printed.row("sent per update, MiB")) * 2**20 / GRADIENT
    # A ring; the numbers have two decimals, and small arrays cross whole.
    ring = 2 * (devices - 1) / devices
    want = [0, EVERY * MICROBATCHES * ring, ring, ring, ring / 2]
    np.testing.assert_allclose(sent, want, atol=0.1)


def test_data_parallel_ends_with_the_parameters_of_the_big_batch(alone):
    check(alone, devices=8)  # which it has made itself
    assert alone.drew


def test_data_parallel_in_two_processes_prints_what_one_does(alone):
    first, second = two()
    check(first, devices=8)
    assert first.collectives("automatic") == alone.collectives("automatic")
    assert first.collectives("reduce_axis") == alone.collectives("reduce_axis")
    for label in ("test accuracy, %", "parameters moved by"):
        assert first.row(label) == pytest.approx(alone.row(label), rel=0.02)
    assert first.drew
    assert "test accuracy" not in second.text
    assert not second.drew


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch 0", "--batch 0 must be at least 1"),
        ("--every 0", "--every 0 must be at least 1"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--width 0", "--width 0 must be at least 1"),
        ("--seed -1", "--seed -1 must be at least 0"),
        ("--output /nowhere/x.png", "existing folder"),
        ("--process 0", "--coordinator goes with"),
        ("--processes 2", "--coordinator goes with"),
        ("--coordinator x:1 --process 2 --processes 2", "a --process below that"),
        ("--coordinator x:1 --process 0 --distributed", "without --distributed"),
    ],
)
def test_data_parallel_refuses_bad_flags_with_a_message(flags, words, capsys):
    with pytest.raises(SystemExit):
        data_parallel.main(flags.split())
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--microbatch 30", "--batch 500", "--every 3"])
def test_data_parallel_refuses_rows_that_the_devices_do_not_divide(flags):
    with pytest.raises(SystemExit, match="must be divisible by devices=4"):
        data_parallel.main(flags.split())


def test_data_parallel_has_every_image_once_in_an_epoch_and_devices_without_weight():
    data, _ = data_parallel.load()
    flags = data_parallel.parse("--batch 512 --steps 6".split())
    batches = data_parallel.epochs(data, flags)
    assert len(batches) == 6
    for epoch in (batches[:3], batches[3:]):
        seen = sum(batch.weights.sum() for batch in epoch)
        assert seen == data.weights.sum()
        assert sum((batch.weights > 0).sum() for batch in epoch) == len(data.labels)
    last = data_parallel.parts(batches[2], 4)[-1]
    weights = [rows.weights.sum() for rows in data_parallel.parts(last, 8)]
    assert min(weights) == 0 < max(weights)
    first = data_parallel.parts(batches[0], 32)
    assert len({rows.weights.sum() for rows in first}) > 4
