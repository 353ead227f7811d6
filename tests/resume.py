"""Kills a training at random moments of its windows, and finishes it: nothing is lost.

    python tests/resume.py --form nnx --devices 8 --kills 100

Each attempt is a process of its own, which restores the newest Orbax checkpoint,
trains, saves after every call, and is killed (SIGKILL) while it trains or saves. The
last one ends with parameters, optimizer state, statistics, keys and counters that are,
to the bit, those of a run that was never stopped.
"""

import argparse
import hashlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

EVERY, WIDTH = 3, 16


def batch(call: int) -> Any:
    """The rows of a call, of which the number of the call is all that counts."""
    import nets

    return nets.rows(16, seed=call)


def linen(every: int = EVERY) -> tuple[Any, Any]:
    """A state, and what takes it through a call: BatchNorm, dropout, an average."""
    import jax
    import nets
    import optax

    import accumax.linen

    class State(accumax.linen.TrainState):
        batch_stats: Any
        key: Any
        ema_params: Any

    model = nets.Linen(rate=0.3, width=WIDTH)
    variables = model.init(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, batch(0)["x"]
    )
    state = State.create(
        apply_fn=model.apply,
        tx=optax.adamw(optax.cosine_decay_schedule(0.01, 500)),
        every=every,
        momentum=nets.MOMENTA,
        key=jax.random.key(2),
        ema_params=jax.tree.map(jax.numpy.copy, variables["params"]),
        **variables,
    )

    def loss_fn(params: Any, rows: Any, batch_stats: Any, key: Any) -> Any:
        y, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            rows["x"],
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return ((y - rows["y"]) ** 2).mean(), new

    step = State.train_step(loss_fn, mutable="batch_stats", rngs="key")

    def call(state: Any, rows: Any) -> Any:
        state, _ = step(state, rows)
        average = accumax.linen.ema(
            state.ema_params, state.params, state.opt_state, 0.9
        )
        return state.replace(ema_params=average)

    return state, call


def nnx(every: int = EVERY) -> tuple[Any, Any]:
    """The same for a module and its optimizer, as a dict of their values."""
    import nets
    import optax
    from flax import nnx

    import accumax.nnx

    model = nets.NNX(nnx.Rngs(0), rate=0.3, width=WIDTH)
    tx = optax.adamw(optax.cosine_decay_schedule(0.01, 500))
    optimizer = accumax.nnx.Optimizer(model, tx, wrt=nnx.Param, every=every)
    graphdef, state = nnx.split((model, optimizer))
    step = accumax.nnx.train_step(
        lambda model, rows: ((model(rows["x"]) - rows["y"]) ** 2).mean()
    )

    def call(values: Any, rows: Any) -> Any:
        both = nnx.merge(graphdef, values)
        step(*both, rows)
        return nnx.as_pure(nnx.state(both))

    return nnx.as_pure(state), call


FORMS = {"linen": linen, "nnx": nnx}


def sharded(state: Any, devices: int, last: bool = False) -> Any:
    """`state`, with an axis of each array over the devices, where one is divisible."""
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def place(x: Any) -> Any:
        axes = [n for n, size in enumerate(x.shape) if size % devices == 0]
        spec: list[str | None] = [None] * x.ndim
        if axes:
            spec[axes[-1 if last else 0]] = "data"
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    return jax.tree.map(place, state)


def abstract(state: Any) -> Any:
    """The shapes, dtypes and shardings to restore into."""
    import jax

    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def digest(state: Any) -> str:
    """All bits of a state."""
    import jax
    import numpy as np

    found = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        found.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
        found.update(np.asarray(x).tobytes())
    return found.hexdigest()


def begin(form: str, devices: int) -> tuple[Any, Any]:
    """A sharded state, and what takes it through the call of a number."""
    import jax

    state, call = FORMS[form]()
    state = sharded(state, devices)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(call, donate_argnums=0, out_shardings=shardings)
    return state, lambda state, n: step(state, sharded(batch(n), devices))


def undisturbed(form: str, devices: int, calls: int) -> str:
    """The digest of a training that nobody stops, in this process."""
    state, step = begin(form, devices)
    for n in range(calls):
        state = step(state, n)
    return digest(state)


def work(form: str, devices: int, calls: int, folder: str) -> None:
    """One attempt: from the newest checkpoint to the end."""
    import orbax.checkpoint as ocp

    state, step = begin(form, devices)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        start = manager.latest_step()
        if start is not None:
            args = ocp.args.StandardRestore(abstract(state))
            state = manager.restore(start, args=args)
        print("from", start or 0, flush=True)
        for n in range(start or 0, calls):
            state = step(state, n)
            manager.save(n + 1, args=ocp.args.StandardSave(state))
            print("call", n + 1, flush=True)
        manager.wait_until_finished()
    print("done", digest(state), flush=True)


def sample(folder: pathlib.Path) -> None:
    """Writes what `test_resume.py` reads: each form in the middle of its window."""
    import jax
    import orbax.checkpoint as ocp

    for form in FORMS:
        state, call = FORMS[form]()
        for n in range(EVERY + 2):
            state = jax.jit(call)(state, batch(n))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve() / form, state)
        # It says where the folder was, and nothing reads it.
        (folder / form / "commit_success.txt").unlink()
        (folder / f"{form}.sha256").write_text(digest(state) + "\n")


def attempt(
    form: str, devices: int, calls: int, folder: str, kill: random.Random | None
) -> str | None:
    """Starts a process and, with `kill`, ends it a few calls later; else its digest."""
    here = pathlib.Path(__file__).resolve()
    command = [sys.executable, str(here), "--worker", folder]
    command += ["--form", form, "--devices", str(devices), "--calls", str(calls)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    paths = [str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    left = kill.randint(0, 6) if kill else -1
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            word, value = line.split()
            if word == "done":
                return value
            if kill and word in ("from", "call"):
                left -= 1
                if left < 0:
                    time.sleep(kill.uniform(0, 0.1))  # in a step, or in a save
                    process.kill()
                    print(f"killed after {word} {value}")
                    return None
    raise RuntimeError(f"The training ended with {process.returncode}.")


def run(form: str, devices: int, kills: int, calls: int, seed: int = 0) -> None:
    """Raises AssertionError if anything is lost."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(kills):
            found = attempt(form, devices, calls, folder, chance)
            assert found is None, "It ended before it could be killed: more calls."
        found = attempt(form, devices, calls, folder, None)
    want = undisturbed(form, devices, calls)
    assert found == want, f"{found} is not {want}: something was lost."
    print(
        f"{form}, {devices} devices: {kills} kills in {calls} calls, and all is there"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=sorted(FORMS), default="linen")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--calls", type=int, help="in all; 7 for each kill by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sample", type=pathlib.Path, help="write checkpoints there, and no more"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    calls = flags.calls or 7 * flags.kills + 8
    if flags.sample:
        sample(flags.sample)
    elif flags.worker:
        work(flags.form, flags.devices, calls, flags.worker)
    else:
        count = f"--xla_force_host_platform_device_count={flags.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
        run(flags.form, flags.devices, flags.kills, calls, flags.seed)


if __name__ == "__main__":
    main()
