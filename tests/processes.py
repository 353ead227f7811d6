"""Trains on two processes as on one, and goes on after one of them was killed.

    python tests/processes.py --victim 1 --place save

One run is a process of eight CPU devices, the other one two processes of four, which
find each other on the loopback interface. Each trains in several ways in turn (`WAYS`).
Both end with the same parameters, optimizer state, counters and open window, to the bit
and on every device. Then process `--victim` is killed (SIGKILL) in the middle: the
other one ends with an error instead of waiting for ever, and two new ones go on from
the newest Orbax checkpoint to the same end.
"""

import argparse
import faulthandler
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

DEVICES, EVERY, CALLS, ROWS = 8, 3, 7, 32
DIES = 6  # the call in which a victim dies, which closes a window

# What a run trains, one after the other in each call. All but "reals" are of numbers
# whose sums are exact; "divided" has its optimizer state in parts (ZeRO-1), and
# "groups" are two of four devices that hold the parameters once (HSDP).
WAYS = "integers", "reals", "divided", "groups"

# Where the victim is then, which waits there for its end: before the step, so that the
# other one is in a collective; before the save, so that it is in a barrier of Orbax; or
# while both still write, so that the checkpoint may be left half written.
PLACES = "step", "save", "write"

# Seconds. A collective waits for a dead process for ever, and what ends it is that the
# coordinator misses a heartbeat: within 3 to 6 seconds, where JAX's default is 100. The
# other bounds are for a busy machine, and for what ends without a death.
HEARTBEAT, NOTICE, PATIENCE = 5, 20, 120


def batch(way: str, call: int) -> Any:
    """All rows of a call, of which each process takes its part."""
    chance = np.random.default_rng(call)
    if way == "reals":
        x, y = chance.normal(size=(ROWS, 6)), chance.normal(size=(ROWS, 2))
    else:
        x, y = chance.integers(-3, 4, (ROWS, 6)), chance.integers(-9, 10, (ROWS, 2))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def start() -> Any:
    """The parameters of two layers."""
    chance = np.random.default_rng(0)
    return {
        "in": chance.integers(-8, 9, (6, 8)) / np.float32(8),
        "out": chance.integers(-8, 9, (8, 2)) / np.float32(8),
        "bias": np.zeros(2, np.float32),
    }


def mesh_of(way: str) -> Any:
    """The devices, in order; as two groups, each of one process if there are two."""
    import jax
    from jax.sharding import AxisType

    if way == "groups":
        kinds = (AxisType.Auto, AxisType.Auto)
        return jax.make_mesh((2, DEVICES // 2), ("data", "shard"), axis_types=kinds)
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def training(way: str) -> tuple[Any, Any]:
    """A transformation, and the step of it."""
    import jax
    import optax

    import accumax

    # Lion moves a parameter by its rate, whatever the size of the gradient. From
    # integers all parameters then are multiples of 1/8, and sums of gradients are exact
    # in any order: gloo and XLA's own collective add in different ones.
    inner = optax.adamw(1e-2) if way == "reals" else optax.lion(1 / 8, weight_decay=0)
    over = accumax.DataParallel("data", shard_optimizer=way == "divided")
    tx = accumax.accumulate(inner, every=EVERY, reduce_axis=over)

    def loss_fn(params: Any, rows: Any) -> Any:
        hidden = jax.nn.relu(rows["x"] @ params["in"])
        error = hidden @ params["out"] + params["bias"][None] - rows["y"]
        return (error**2).sum(axis=1).mean()

    step = accumax.train_step(loss_fn, tx, microbatches=2)
    return tx, jax.jit(step, donate_argnums=(0, 1))


def shards(tree: Any) -> dict[str, np.ndarray]:
    """What each device of this process holds of each leaf, without a collective."""
    import jax

    places = {device: n for n, device in enumerate(jax.devices())}
    return {
        f"{jax.tree_util.keystr(path)} of {places[shard.device]}": np.asarray(
            shard.data
        )
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        for shard in x.addressable_shards
    }


def check_that_parts_are_not_read(tree: Any) -> None:
    """`check_update` names what a process cannot read, and reads what it can."""
    import jax
    import pytest

    from accumax._testing.evidence import numbers

    for x in jax.tree.leaves(tree):
        if x.is_fully_addressable or x.is_fully_replicated:
            assert numbers(x).shape == (x.size,)
            continue
        with pytest.raises(ValueError, match="process_allgather"):
            numbers(x)


def work(flags: argparse.Namespace) -> None:
    """One process of a run: from the newest checkpoint to the end."""
    # If nobody is left who would kill it.
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)

    import jax
    import orbax.checkpoint as ocp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    me, processes = flags.worker, flags.processes
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            flags.address,
            processes,
            me,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=flags.heartbeat,
            shutdown_timeout_seconds=PATIENCE,
            coordinator_bind_address=flags.address,  # and not on all interfaces
        )
    assert jax.device_count() == DEVICES
    assert jax.local_device_count() == DEVICES // processes
    mine = slice(ROWS * me // processes, ROWS * (me + 1) // processes)
    meshes = {way: mesh_of(way) for way in WAYS}

    def of_all(mesh: Any, local: np.ndarray) -> jax.Array:
        rows = NamedSharding(mesh, P(mesh.axis_names))
        return jax.make_array_from_process_local_data(rows, local[mine])

    steps, now = {}, {}
    for way, mesh in meshes.items():
        with jax.set_mesh(mesh):
            tx, steps[way] = training(way)
            specs = {"in": P(), "out": P(), "bias": P()}
            if "shard" in mesh.axis_names:
                specs |= {"in": P(None, "shard"), "out": P("shard")}
            params = {
                name: jax.device_put(x, NamedSharding(mesh, specs[name]))
                for name, x in start().items()
            }
            now[way] = params, tx.init(params), None

    # A file of its own: gloo writes to stdout, from many threads.
    with (
        (flags.folder / f"said{me}").open("w", buffering=1) as said,
        ocp.CheckpointManager(
            flags.steps, options=ocp.CheckpointManagerOptions(max_to_keep=2)
        ) as manager,
    ):

        def kept() -> Any:
            return {way: (params, state) for way, (params, state, _) in now.items()}

        first = manager.latest_step() or 0
        if first:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                kept(),
            )
            found = manager.restore(first, args=ocp.args.StandardRestore(like))
            now = {way: (*found[way], None) for way in WAYS}
        print("from", first, file=said)

        def may_die(place: str) -> None:
            if (n + 1, place) == (DIES, flags.place):
                if place != "write":
                    manager.wait_until_finished()  # the calls before are all saved
                print("dies", file=said)
                signal.pause()

        for n in range(first, CALLS):
            may_die("step")
            for way, mesh in meshes.items():
                with jax.set_mesh(mesh):
                    rows = jax.tree.map(functools.partial(of_all, mesh), batch(way, n))
                    params, state, _ = now[way]
                    now[way] = steps[way](params, state, rows)
            jax.block_until_ready(now)
            may_die("save")
            if n + 1 >= DIES - 1:  # what is older is not read again
                manager.save(n + 1, args=ocp.args.StandardSave(kept()))
            may_die("write")
        manager.wait_until_finished()
        np.savez(flags.folder / f"end{me}.npz", **shards(now))
    check_that_parts_are_not_read(now)
    if processes > 1:
        jax.distributed.shutdown()


class Workers:
    """The processes of a run; those left are killed at the end of the `with`."""

    def __init__(
        self,
        steps: pathlib.Path,
        processes: int,
        victim: int | None = None,
        place: str = "",
    ):
        self.steps, self.number = steps, processes
        self.victim, self.place = victim, place
        self.running: list[subprocess.Popen] = []

    def __enter__(self) -> "Workers":
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self.temporary.name)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        here = pathlib.Path(__file__).resolve()
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags = [x for x in flags if "device_count" not in x]
        count = DEVICES // self.number
        flags.append(f"--xla_force_host_platform_device_count={count}")
        paths = [str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
        # Without proxies, of which gRPC would ask for the coordinator.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.lower().endswith("_proxy")
        }
        environment |= {
            "XLA_FLAGS": " ".join(flags),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        beat = PATIENCE if self.victim is None else HEARTBEAT
        command = [sys.executable, str(here), "--address", address]
        command += ["--processes", str(self.number), "--heartbeat", str(beat)]
        command += ["--folder", str(self.folder), "--steps", str(self.steps)]
        for n in range(self.number):
            own = ["--worker", str(n)]
            if n == self.victim:
                own += ["--place", self.place]
            with (self.folder / f"log{n}").open("wb") as log:
                worker = subprocess.Popen(
                    command + own, env=environment, stdout=log, stderr=log
                )
            self.running.append(worker)

    def __exit__(self, *_: object) -> None:
        for worker in self.running:
            worker.kill()
        for worker in self.running:
            worker.wait()
        self.temporary.cleanup()

    def read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text(errors="replace") if file.exists() else ""

    def until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Waits, but neither for ever nor for a process that has failed."""
        end = time.monotonic() + seconds
        while not ready():
            codes = [worker.poll() for worker in self.running]
            logs = "\n".join(self.read(f"log{n}") for n in range(self.number))
            assert all(code in (None, 0) for code in codes), f"{codes=}\n{logs}"
            assert time.monotonic() < end, f"nothing in {seconds} seconds\n{logs}"
            time.sleep(0.005)


class End(NamedTuple):
    """How a run ended: the call that it went on from, and what each device held."""

    first: int
    shards: dict[str, np.ndarray]


def run(steps: pathlib.Path, processes: int) -> End:
    """A run that nobody disturbs, from the newest of the checkpoints in `steps`."""
    with Workers(steps, processes) as workers:

        def ended() -> bool:
            return all(worker.poll() == 0 for worker in workers.running)

        workers.until(ended, PATIENCE)
        found: dict[str, np.ndarray] = {}
        for n in range(processes):
            with np.load(workers.folder / f"end{n}.npz") as file:
                assert not found.keys() & file.keys()
                found |= file
        firsts = {int(workers.read(f"said{n}").split()[1]) for n in range(processes)}
    (first,) = firsts
    return End(first, found)


class Death(NamedTuple):
    """How the other process ended: its exit code, its log, and after how long."""

    code: int
    log: str
    seconds: float


def kill(steps: pathlib.Path, victim: int, place: str) -> Death:
    """Kills one of two processes when it is at `place`, and waits for the other one."""
    with Workers(steps, 2, victim, place) as workers:
        other = workers.running[1 - victim]
        workers.until(lambda: "dies" in workers.read(f"said{victim}"), PATIENCE)
        workers.running[victim].kill()
        begin = time.monotonic()
        try:
            code = other.wait(NOTICE)
        except subprocess.TimeoutExpired:
            log = workers.read(f"log{1 - victim}")
            raise AssertionError(f"it hangs after {NOTICE} seconds\n{log}") from None
        seconds = time.monotonic() - begin
        return Death(code, workers.read(f"log{1 - victim}"), seconds)


def different(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """The leaves, and the devices, on which two ends are not the same bits."""

    def bits(end: dict[str, np.ndarray], name: str) -> Any:
        x = end.get(name)
        return None if x is None else (x.dtype, x.shape, x.tobytes())

    return sorted(n for n in one | other if bits(one, n) != bits(other, n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victim", type=int, choices=[0, 1], default=1)
    parser.add_argument("--place", choices=PLACES, default="")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--heartbeat", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker is not None:
        return work(flags)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        one, two = (run(folder / str(n), n) for n in (1, 2))
        print("one process and two differ in", different(one.shards, two.shards))
        for place in [flags.place] if flags.place else PLACES:
            steps = folder / place
            death = kill(steps, flags.victim, place)
            print(death.log)
            print(f"{place}: {death.code} after {death.seconds:.1f} seconds")
            print("left:", sorted(path.name for path in steps.iterdir()))
            end = run(steps, 2)
            lost = different(two.shards, end.shards)
            print(f"{place}: from call {end.first}, other bits in {lost}")


if __name__ == "__main__":
    main()
