"""All figures in one command: accumax beside today's peers, on unlike models.

    python benchmarks/run.py --quick               # minutes
    python benchmarks/run.py                       # under half an hour on two CPU cores
    python benchmarks/run.py --device gpu          # on the accelerator that is here
    python benchmarks/run.py --target gpu          # compiled for an H100 that is not
    python benchmarks/run.py --target tpu          # or for a TPU v5e: hours
    python benchmarks/run.py --only memory/lora    # the rows whose names match

It writes `benchmarks/results/DATE-CHIP.json`, the same as a page, `.md`, and pictures,
`CHIP-*.png`. Names of rows: `memory/MODEL/OPTIMIZER/TARGET/FORM` and so on. The models
are in `zoo.py`, the forms in `peers.py`; `notes.py` says why, where a peer is ahead.
With --only, rows are added to the results of the day.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import accuracy
import adama
import audited
import devices
import flax_states
import floors
import growth
import info_nce
import jax
import logits
import losses
import notes
import offload
import optax
import optax_notebook
import page
import pictured
import pictures
import report
import results
import timing
import weighted
import zoo
from devices import CHIPS
from results import Row

import accumax

HERE = pathlib.Path(__file__).resolve().parent
# The models that run, how much smaller than those that are compiled.
TIMED = {"mlp": 1 / 8, "transformer": 1 / 8, "lstm": 1 / 2, "resnet": 1 / 4}
TIMED |= {"leaves": 1}
COMPILED = "mlp", "transformer", "leaves"
# Compiled once more, as `programs.LEAST` has it. A TPU takes minutes for each.
SCHEDULED = {
    "cpu": ("mlp", "transformer"),
    "tpu": ("mlp", "transformer", "transformer_unscanned", "transformer_bf16"),
}
QUICK = "mlp", "transformer", "lora"


class Job(NamedTuple):
    """Attributes:
    names: what the names of its rows begin with.
    rows: computes them.
    """

    names: tuple[str, ...]
    rows: Callable[[], list[Row]]


class Scale(NamedTuple):
    """How much is measured."""

    models: tuple[str, ...] = ()  # all
    turns: int = 8
    compiles: int = 2
    matrices: tuple[int, int] = (16, 1024)
    seeds: int = 20
    windows: int = 50
    half_sums: tuple[int, ...] = (16, 256, 4096)
    parameters: tuple[int, ...] = (6, 7, 8, 9, 10)
    k: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    leaves: tuple[int, ...] = (10, 100, 1000, 10_000)
    devices: str = "1,2,4,8"
    width: float = 1


SMALL = Scale(
    models=QUICK,
    turns=3,
    compiles=1,
    matrices=(16, 512),
    seeds=5,
    windows=10,
    half_sums=(16, 256),
    parameters=(6, 8, 10),
    k=(1, 16, 256),
    leaves=(10, 100, 1000),
    devices="8",
)
# For tests: seconds, and numbers that mean nothing.
TINY = Scale(
    models=("lora",),
    turns=1,
    compiles=1,
    matrices=(2, 32),
    seeds=1,
    windows=2,
    half_sums=(2,),
    parameters=(6,),
    k=(1, 2),
    leaves=(2,),
    devices="2",
    width=1 / 16,
)


def model(name: str, width: float) -> zoo.Model:
    return next(m for m in zoo.models(width) if m.name == name)


def compiled_jobs(on: devices.Device, target: str, scale: Scale) -> list[Job]:
    """What is read from programs compiled for `on`, there or not."""
    jobs = []
    for each in zoo.work(scale.width):
        other = each.optimizer != "adamw" and each.name != "mlp"
        if scale.models and (other or each.name not in scale.models):
            continue
        case = f"{each.name}/{each.optimizer}/{target}"
        names = tuple(f"{group}/{case}" for group in ("memory", "copies", "floor"))
        jobs.append(Job(names, functools.partial(floors.rows, each, on, target)))
        if each.name in SCHEDULED.get(target, ()):
            names = (f"scheduled/{each.name}/{each.optimizer}",)
            jobs.append(Job(names, functools.partial(floors.scheduled, each, on)))
    growing: dict[str, Callable[[], list[Row]]] = {
        "parameters": lambda: growth.parameters(on, target, scale.parameters),
        "k": lambda: growth.microbatches(on, target, scale.k),
    }
    jobs += [Job((f"grows/{name}",), rows) for name, rows in growing.items()]
    if scale.width == 1:  # what others claim, too large for tests
        width = 512
        claims: dict[str, Callable[[], list[Row]]] = {
            "logits": lambda: logits.rows(on, target),
            "adama": lambda: adama.rows(on, target),
            "optax_notebook/memory": lambda: optax_notebook.memory(on, target),
            "gradcache/memory": lambda: info_nce.memory(width, on, target),
            "pictures": lambda: pictured.rows(on, target),
            "flax": lambda: flax_states.rows(on, target),
            "losses": lambda: losses.rows(on, target),
            "weighted": lambda: weighted.rows(on, target),
            f"audit/{target}": lambda: audited.rows(on, target),
        }
        if target == "tpu":
            claims["offload"] = lambda: offload.rows(on, target)
        jobs += [Job((name,), rows) for name, rows in claims.items()]

    def many(part: str) -> list[Row]:
        counts = "8" if target == "tpu" else scale.devices  # its topology has 8
        command = [sys.executable, str(HERE / "many_devices.py"), target]
        command += ["--counts", counts, "--parts", part]
        # This process has the library for TPUs loaded, too.
        env = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        pipe = subprocess.PIPE
        out = subprocess.run(command, check=True, stdout=pipe, text=True, env=env)
        return [Row(**json.loads(line)) for line in out.stdout.splitlines()]

    if on.platform == "cpu" or on not in jax.devices():
        parts = {"grows": ("reductions", "grows/devices")}
        if scale.width == 1 and not scale.models:
            parts |= {
                "devices": ("devices", "scaling"),
                "maxtext_5039": ("maxtext_5039",),
            }
        if scale.width == 1 and target == "cpu":
            parts |= {"wire": ("wire",), "dispatch": ("dispatch",)}
        for part, names in parts.items():
            jobs.append(Job(names, functools.partial(many, part)))
    return jobs


def timed_jobs(target: str, scale: Scale) -> list[Job]:
    """What needs a device that is here."""
    on, jobs, turns = jax.devices()[0], [], scale.turns
    for name, width in TIMED.items():
        if scale.models and name not in scale.models:
            continue
        timed = model(name, width * scale.width)
        rows = functools.partial(timing.windows, timed, target, turns)
        jobs.append(Job((f"time/{name}",), rows))
    for name in COMPILED:
        if scale.models and name not in scale.models:
            continue
        compiled = model(name, TIMED[name] * scale.width)
        rows = functools.partial(
            timing.compile_rows, compiled, on, target, scale.compiles, floors.MAIN
        )
        jobs.append(Job((f"trace/{name}", f"compile/{name}"), rows))
    others: dict[str, Callable[[], list[Row]]] = {
        "hold": lambda: timing.hold(target, *scale.matrices, turns),
        "host": lambda: growth.dispatch(target, (10, 100), turns),
        "inner_runs": timing.inner_runs,
        "error": lambda: accuracy.rows(scale.seeds, scale.windows),
        "half_sums": lambda: accuracy.half_sums_rows(scale.half_sums),
        "grows/leaves": lambda: growth.leaves(on, target, scale.leaves),
    }
    if scale.width == 1:
        others |= {
            "optax_notebook/time": lambda: optax_notebook.times(target, turns),
            "gradcache/time": lambda: info_nce.time(128, target, turns),
        }
    return jobs + [Job((name,), rows) for name, rows in others.items()]


def run(jobs: Sequence[Job], only: str, command: str) -> list[Row]:
    """The rows of the jobs that have some whose names match; fewer if interrupted."""
    found: list[Row] = []
    chosen = [job for job in jobs if any(_matches(only, name) for name in job.names)]
    for n, job in enumerate(chosen, 1):
        start = time.perf_counter()
        try:
            rows = job.rows()
        except KeyboardInterrupt:
            print(
                f"interrupted: without {', '.join(x.names[0] for x in chosen[n - 1 :])}"
            )
            break
        for row in rows:
            case = row.name.rpartition("/")[0] or row.name
            only_it = f"{command} --only {case}"
            found.append(dataclasses.replace(row, command=only_it))
        seconds = time.perf_counter() - start
        print(f"{n}/{len(chosen)} {job.names[0]}: {seconds:.0f} s", flush=True)
    return found


def _matches(only: str, name: str) -> bool:
    """Whether rows that begin with `name` may match: `only` may be more particular."""
    return bool(re.search(only, name)) or only.startswith(name)


def facts(target: str, here: bool, seconds: float, quick: bool) -> dict[str, Any]:
    if target in CHIPS and not here:
        chip = f"{CHIPS[target]}, compiled for and not run"
    else:
        kind = jax.devices()[0].device_kind
        chip = report.host().rpartition(",")[0] if kind == "cpu" else kind
    versions = {"jax": jax, "optax": optax, "accumax": accumax}
    if "keras" in sys.modules:
        versions["keras"] = sys.modules["keras"]
    return {
        "date": str(datetime.date.today()),
        "chip": chip,
        "host": report.host(),
        "versions": {name: module.__version__ for name, module in versions.items()},
        "python": sys.version.split()[0],
        "quick": quick,
        "seconds": round(seconds),
    }


def write(
    rows: Sequence[Row], facts: dict[str, Any], folder: pathlib.Path, stem: str
) -> list[pathlib.Path]:
    """Writes all files; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['date']}-{stem}.json"
    results.save(rows, facts, path)
    path.with_suffix(".md").write_text(page.text(rows, facts))
    return [path, path.with_suffix(".md"), *pictures.draw(rows, folder, stem)]


def merged(
    rows: Sequence[Row], facts: dict[str, Any], path: pathlib.Path
) -> tuple[list[Row], dict[str, Any]]:
    """With the other rows of the results at `path`, if they are of the same code."""
    if not path.exists():
        return list(rows), facts
    before = json.loads(path.read_text())
    if before["code"] != results.fingerprint():
        return list(rows), facts
    facts = facts | {
        "quick": before["quick"] or facts["quick"],
        "seconds": before["seconds"] + facts["seconds"],
    }
    old = {name: Row(name, **row) for name, row in before["rows"].items()}
    for name, row in old.items():
        if row.value is not None:  # else the note says why there is no number
            old[name] = dataclasses.replace(row, note="")
    return list((old | {row.name: row for row in rows}).values()), facts


def main(argv: Sequence[str] | None = None) -> list[pathlib.Path]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer models and repeats")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)
    add("--device", default="cpu", choices=("cpu", *CHIPS), help="what to run on")
    add("--target", choices=tuple(CHIPS), help="what to compile for; nothing runs")
    add("--only", default="", metavar="PATTERN", help="of the names of rows")
    add("--output", type=pathlib.Path, default=results.FOLDER, help="a folder")
    flags = parser.parse_args(argv)
    scale = TINY if flags.tiny else SMALL if flags.quick else Scale()
    start, command = time.perf_counter(), "python benchmarks/run.py"
    if flags.target:
        target, chip = flags.target, CHIPS[flags.target]
        jobs = compiled_jobs(devices.device(target), target, scale)
        command += f" --target {target}"
    else:
        target = flags.device
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(target, target))
        on, chip = jax.devices()[0], jax.devices()[0].device_kind
        jobs = compiled_jobs(on, target, scale) + timed_jobs(target, scale)
        command += "" if target == "cpu" else f" --device {target}"
    stem = re.sub(r"\W+", "-", chip.lower())
    rows = notes.explained(run(jobs, flags.only, command))
    ran = facts(target, not flags.target, time.perf_counter() - start, flags.quick)
    path = flags.output / f"{ran['date']}-{stem}.json"
    if flags.only:
        rows, ran = merged(rows, ran, path)
        rows = notes.explained(rows)
    paths = write(rows, ran, flags.output, stem)
    ahead = sum(bool(row.note) for row in rows)
    print(f"{len(rows)} rows, {ahead} with a note, in {ran['seconds']} s:")
    print("\n".join(str(path) for path in paths))
    return paths


if __name__ == "__main__":
    main()
