"""Long sequences, large vocabularies: a loss whose logits never exist at once.

A small language model learns the source of Python's standard library, word by word. Its
last layer is a matrix of vocabulary x width, so that the logits of one sequence are
length x vocabulary numbers: far more than all else, and needed twice. They belong to
one token each, so `accumax.microbatch` computes the loss of a few hundred tokens at a
time, and their logits again in the backward pass:

    losses = accumax.microbatch(token_losses, microbatch_size=256, batch_argnums=(1, 2))
    loss = losses(weights, hidden, labels).mean()

Others call this a fused linear cross entropy. Two ways, from the same seed and batches:
the loss as it is, and this one. Run it in the repository with

    pip install -e ".[examples]"
    python examples/long_sequences.py             # under a minute on two CPU cores
    python examples/long_sequences.py --vocabulary 50000 --length 8192 --width 256

The first prints what follows (with Python 3.11; other versions have another library),
and draws the loss and the memory in long_sequences.png:

                                         whole     accumax
    loss of the first batch            9.92108     9.92108
    held-out loss                      5.76549     5.76549
    temporary memory of the step         274.7        51.1 MiB
    time per update                       1439        1002 ms
    error of the first gradient                    5.5e-08 of its norm
    difference after the last update               7.8e-07
      moved by training                            4.6e-02

    The gradient at vocabulary 128000, length 8192, width 4096, bfloat16, compiled
    for cpu:
      the logits in float32                   4.19 GB
      temporary, whole                       10.49 GB
      temporary, 256 tokens at a time         6.43 GB
        beside the float32 sum of its gradient  4.33 GB

What is left on a CPU are copies of bfloat16 matrices in float32, which XLA multiplies
there. Compiled for an H100, the last three are 6.29, 2.17 and 0.07 GB
(`benchmarks/logits.py gpu`).
"""

import argparse
import collections
import re
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import accumax

MIB = 2**20
CONTEXT = 8  # words that a word is predicted from
HELD_OUT = 8  # sequences
SIZES = (64, 256, 1024)  # microbatches whose memory is looked at
# Of a language model with 8 billion parameters, and the tokens of one sequence.
LARGE = {"vocabulary": 128_000, "length": 8192, "width": 4096}

Losses: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Run(NamedTuple):
    """What one way of training gave."""

    moment: Any  # of Adam after the first update: a tenth of the first gradient
    params: Any  # after the last update
    losses: list[float]  # one per update
    held_out: float
    seconds: float  # per update, the median
    temp: int  # bytes of the compiled step, beside its arguments


def load(vocabulary: int, count: int) -> np.ndarray:
    """The first `count` words of the library, (count,) int32 below `vocabulary`.

    The most frequent words have numbers of their own, all others share the number 0.
    """
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text("utf-8", errors="replace")
        words += re.findall(r"\w+|[^\w\s]|\n", text)
        if len(words) >= count:
            break
    frequent = collections.Counter(words).most_common(vocabulary - 1)
    numbers = {word: n for n, (word, _) in enumerate(frequent, 1)}
    return np.array([numbers.get(word, 0) for word in words[:count]], np.int32)


def init(key: jax.Array, vocabulary: int, width: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 4)

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * shape[0] ** -0.5

    return {
        "words": normal(keys[0], vocabulary, width) * vocabulary**0.5,
        "context": normal(keys[1], CONTEXT * width, 4 * width),
        "down": normal(keys[2], 4 * width, width),
        "weights": normal(keys[3], width, vocabulary).T,
    }


def hidden_states(params: dict[str, jax.Array], words: jax.Array) -> jax.Array:
    """(length,) words to (length, width): each from the words before."""
    before = jnp.pad(words, (CONTEXT, 0))
    places = jnp.arange(len(words))[:, None] + jnp.arange(CONTEXT)[None]
    x = params["words"][before[places]].reshape(len(words), -1)
    return jax.nn.gelu(x @ params["context"]) @ params["down"]


def token_losses(weights: jax.Array, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross entropy of each token: (rows, width) and (rows,) to (rows,)."""
    logits = (hidden @ weights.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def divided(microbatch: int) -> Losses:
    return accumax.microbatch(
        token_losses, microbatch_size=microbatch, batch_argnums=(1, 2)
    )


def make_step(losses: Losses, tx: optax.GradientTransformation) -> Callable[..., Any]:
    def loss_fn(params: dict[str, jax.Array], words: jax.Array) -> jax.Array:
        return losses(params["weights"], hidden_states(params, words), words).mean()

    def step(params: Any, opt_state: Any, words: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, words)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def compiled(step: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes


def train(
    name: str,
    losses: Losses,
    params: Any,
    tx: optax.GradientTransformation,
    batches: np.ndarray,
) -> Run:
    """Trains with an update for each row of `batches`, but for those held out."""
    params = jax.tree.map(jnp.copy, params)  # the other run starts from the same
    opt_state, held_out = tx.init(params), batches[:HELD_OUT]
    step = compiled(make_step(losses, tx), params, opt_state, batches[0])
    history, seconds, moment = [], [], None
    progress = tqdm(batches[HELD_OUT:], desc=f"{name:>7}", unit="update")
    for words in progress:
        start = time.perf_counter()
        params, opt_state, loss = step(params, opt_state, words)
        jax.block_until_ready((params, opt_state))
        seconds.append(time.perf_counter() - start)
        history.append(float(loss))
        progress.set_postfix(loss=f"{history[-1]:.3f}")
        if moment is None:
            moment = jax.tree.map(np.asarray, optax.tree.get(opt_state, "mu"))

    @jax.jit
    def measure(words: jax.Array) -> jax.Array:
        return losses(params["weights"], hidden_states(params, words), words).mean()

    mean = float(np.mean([measure(words) for words in held_out]))
    median = statistics.median(seconds[1:] or seconds)  # the first one warms up
    return Run(moment, params, history, mean, median, temp_bytes(step))


def large_memory(microbatch: int) -> dict[str, int]:
    """Temporary bytes of the gradient at the sizes of a large model, in bfloat16.

    Nothing runs. "accumulator" is part of "accumax": the float32 sum for the weights.
    """

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    vocabulary, length, width = LARGE.values()
    args = array(vocabulary, width), array(length, width), array(length, dtype="int32")

    def temp(losses: Losses) -> int:
        def loss_fn(*args: jax.Array) -> jax.Array:
            return losses(*args).mean()

        gradient = jax.value_and_grad(loss_fn, argnums=(0, 1))
        return temp_bytes(jax.jit(gradient).lower(*args).compile())

    return {
        "logits": 4 * vocabulary * length,
        "whole": temp(token_losses),
        "accumax": temp(divided(microbatch)),
        "accumulator": 4 * vocabulary * width,
    }


def distance(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    off = jax.tree.map(lambda x, y: float(np.abs(np.subtract(x, y)).max()), a, b)
    return max(jax.tree.leaves(off))


def relative(a: Any, b: Any) -> float:
    """The distance of `a` from `b`, over the norm of `b`."""
    off = optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
    return float(off / optax.tree.norm(b))


def draw(runs: dict[str, Run], temps: dict[int, int], path: Path) -> None:
    """The losses of both runs, and the memory by microbatch."""
    figure = Figure(figsize=(11, 4), layout="constrained")  # no pyplot, so no display
    left, right = figure.subplots(1, 2)
    whole, ours = runs.values()
    updates = range(1, len(whole.losses) + 1)
    style: dict[str, Any] = {"color": "#9ecae1", "linewidth": 6}
    left.plot(updates, whole.losses, label="all logits at once", **style)
    left.plot(updates, ours.losses, color="#d9480f", label="accumax.microbatch")
    left.set(title="Loss, in nats per word", xlabel="update")
    sizes = [str(n) for n in temps]
    right.bar(sizes, [n / MIB for n in temps.values()], color="#d9480f")
    right.axhline(whole.temp / MIB, color="#9ecae1", linewidth=6)
    right.set(
        title="Temporary memory of a step, in MiB",
        xlabel="tokens in a microbatch; line: all at once",
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def report(runs: dict[str, Run], figures: dict[str, float]) -> str:
    whole, ours = runs.values()
    lines = [f"{'':30}{'whole':>12}{'accumax':>12}"]
    for label, values, form, unit in (
        ("loss of the first batch", [r.losses[0] for r in (whole, ours)], ".5f", ""),
        ("held-out loss", [whole.held_out, ours.held_out], ".5f", ""),
        ("temporary memory of the step", [whole.temp, ours.temp], ".1f", "MiB"),
        ("time per update", [whole.seconds, ours.seconds], ".0f", "ms"),
    ):
        scale = {"MiB": 1 / MIB, "ms": 1e3}.get(unit, 1)
        cells = "".join(f"{value * scale:12{form}}" for value in values)
        lines.append(f"{label:30}{cells} {unit}".rstrip())
    lines += [
        f"error of the first gradient {figures['error']:26.1e} of its norm",
        f"difference after the last update {figures['difference']:21.1e}",
        f"  moved by training {figures['movement']:34.1e}",
    ]
    return "\n".join(lines)


def report_large(figures: dict[str, float], microbatch: int) -> str:
    sizes = ", ".join(f"{name} {n}" for name, n in LARGE.items())
    where = jax.devices()[0].device_kind
    gb = {name: figures[f"large_{name}"] / 1e9 for name in ("whole", "accumax")}
    beside = gb["accumax"] - figures["large_accumulator"] / 1e9
    return (
        f"\nThe gradient at {sizes}, bfloat16, compiled\nfor {where}:\n"
        f"  the logits in float32 {figures['large_logits'] / 1e9:22.2f} GB\n"
        f"  temporary, whole {gb['whole']:27.2f} GB\n"
        f"  temporary, {microbatch} tokens at a time {gb['accumax']:12.2f} GB\n"
        f"    beside the float32 sum of its gradient {beside:5.2f} GB"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked before anything is trained."""
    parser = argparse.ArgumentParser(
        description="A loss whose logits never exist at once.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--vocabulary", type=int, default=16384, help="words with numbers")
    add("--length", type=int, default=2048, help="words of a sequence")
    add("--microbatch", type=int, default=256, help="words of a microbatch")
    add("--width", type=int, default=64, help="of the model")
    add("--steps", type=int, default=15, help="updates")
    add("--seed", type=int, default=0, help="of the parameters")
    path = Path("long_sequences.png")
    add("--output", type=Path, default=path, help="the figure, a PNG")
    flags = parser.parse_args(argv)
    for name in ("length", "width", "steps"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} {getattr(flags, name)} must be at least 1.")
    if flags.vocabulary < 2:
        parser.error(f"--vocabulary {flags.vocabulary} must be at least 2.")
    if not 1 <= flags.microbatch <= flags.length:
        parser.error(
            f"--microbatch {flags.microbatch} must be from 1 to --length "
            f"{flags.length}."
        )
    if not 0 <= flags.seed < 2**32:
        parser.error(f"--seed {flags.seed} must be from 0 to 2**32 - 1.")
    if flags.output.is_dir() or not flags.output.parent.is_dir():
        parser.error(f"--output {flags.output} must be a file in an existing folder.")
    return flags


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains both ways, prints the tables and draws the figure.

    Returns:
      Ending in "_whole" and "_accumax": "loss" of the first batch, "held_out" loss,
      "temp" bytes of the step, "seconds" per update. "error" of the first gradient
      over its norm; "difference", the largest between the parameters of both after the
      last update; "movement", the largest by training. Beginning with "large_", what
      `large_memory` returns.
    """
    flags = parse(argv)
    count = HELD_OUT + flags.steps
    words = load(flags.vocabulary, count * flags.length)
    if len(words) < count * flags.length:
        raise SystemExit(
            f"--steps {flags.steps} with --length {flags.length} takes "
            f"{count * flags.length} words; the library has {len(words)}."
        )
    batches = words.reshape(count, flags.length)
    params = init(jax.random.key(flags.seed), flags.vocabulary, flags.width)
    # eps: with the usual 1e-8, Adam's first update blows rounding errors up.
    tx = optax.adamw(3e-3, eps=1e-6)
    ways = {"whole": token_losses, "accumax": divided(flags.microbatch)}
    runs = {name: train(name, f, params, tx, batches) for name, f in ways.items()}
    whole, ours = runs.values()
    figures = {
        "error": relative(ours.moment, whole.moment),
        "difference": distance(ours.params, whole.params),
        "movement": distance(whole.params, params),
    }
    for name, run in runs.items():
        figures[f"loss_{name}"] = run.losses[0]
        figures[f"held_out_{name}"] = run.held_out
        figures[f"temp_{name}"] = run.temp
        figures[f"seconds_{name}"] = run.seconds
    print(report(runs, figures))

    opt_state = tx.init(params)
    sizes = [n for n in SIZES if n <= flags.length]
    temps = {
        n: temp_bytes(
            compiled(make_step(divided(n), tx), params, opt_state, batches[0])
        )
        for n in tqdm(sizes, desc="compiling", unit="size")
    }
    large = large_memory(flags.microbatch)
    figures |= {f"large_{name}": size for name, size in large.items()}
    print(report_large(figures, flags.microbatch))
    draw(runs, temps, flags.output)
    return figures


if __name__ == "__main__":
    main()
