"""Flax NNX: BatchNorm and dropout, with an eighth of the batch in memory.

A small residual net learns scikit-learn's 8 x 8 digits three ways: with the whole batch
at once; with `accumax.nnx.Optimizer` and `accumax.nnx.train_step`, which is called with
an eighth of it and makes an update in every eighth call; and naively, with Flax's own
optimizer and optax.MultiSteps. Clipping, AdamW and the schedule are inside of both. Run
it in the repository with

    pip install -e ".[examples]"
    python examples/flax_nnx.py                   # under a minute on two CPU cores
    python examples/flax_nnx.py --checkpoints saved              # stop it at any time
    python examples/flax_nnx.py --checkpoints saved --resume     # and go on

The first prints what follows, and draws it over the updates in flax_nnx.png:

                                 whole batch      accumax        naive
    test accuracy                      98.89        99.17        99.17 %
      of averaged parameters           98.89        99.17        99.17 %
    optimizer updates                     60           60           60
    `step` of the state                   60           60          480
    temporary memory, a call            37.4          4.7          4.9 MiB
    running statistics: distance from the whole batch's
      images, first update           0.0e+00      6.5e-08      4.7e-01
      images, last update            0.0e+00      1.8e-07      6.0e-03
      deeper, first update           0.0e+00      8.9e-04      3.3e-01
      deeper, last update            0.0e+00      1.9e-01      1.9e-01

All runs have the same first parameters and batches. What to read in it:

- The statistics of the images depend on no parameter. With accumax they stay equal to
  the big batch's, to rounding; naively they move in every call, 8 times per update,
  and so does the average of the parameters.
- A layer normalises with its own microbatch, so deeper statistics, gradients and
  parameters are not those of the big batch, and accumulation cannot make them so. After
  the first update the deeper statistics are off by the little that this makes.
- The whole batch has other dropout masks, so it ends elsewhere too. Naive and accumax
  have the same, and the same gradients: their losses agree to rounding.
- The accuracies differ by a few of 360 test images, either way: one is 0.28 %. These
  images are easy, and naive statistics have settled, too, when the updates get small.
- Naively `step` counts calls and not updates; accumax has `step` and `microstep`.

A resumed run ends with the same bits, wherever in a window it was stopped: the
optimizer holds the open window, the model the counts of its dropout, and the batches
depend on nothing but the seed and the call. Only accumax's run is saved; the two that
it is compared with are trained anew.
"""

import contextlib
import copy
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import images
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import accumax.nnx

MOMENTUM = 0.9  # of all running means and variances
DECAY = 0.9  # of the moving average of the parameters
SAVES = 20  # calls from checkpoint to checkpoint: no multiple of the window's 8


class Block(nnx.Module):
    """A residual block."""

    def __init__(
        self, ins: int, outs: int, strides: int, *, rate: float, rngs: nnx.Rngs
    ):
        def conv(ins: int, size: int, strides: int) -> nnx.Conv:
            kernel = (size, size)
            return nnx.Conv(
                ins, outs, kernel, strides=strides, use_bias=False, rngs=rngs
            )

        def norm() -> nnx.BatchNorm:
            return nnx.BatchNorm(outs, momentum=MOMENTUM, rngs=rngs)

        self.first, self.first_norm = conv(ins, 3, strides), norm()
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.second, self.second_norm = conv(outs, 3, 1), norm()
        self.skip, self.skip_norm = conv(ins, 1, strides), norm()

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.dropout(nnx.relu(self.first_norm(self.first(x))))
        y = self.second_norm(self.second(y))
        return nnx.relu(y + self.skip_norm(self.skip(x)))


class Net(nnx.Module):
    """(rows, 8, 8, 1) images to (rows, 10) logits."""

    def __init__(self, *, rate: float = 0.2, rngs: nnx.Rngs):
        # These running statistics depend on no parameter.
        self.of_images = nnx.BatchNorm(1, momentum=MOMENTUM, rngs=rngs)
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.same = Block(16, 16, 1, rate=rate, rngs=rngs)
        self.half = Block(16, 32, 2, rate=rate, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(self.of_images(x)))
        return self.head(self.half(self.same(x)).mean(axis=(1, 2)))


def loss_fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def parameters(model: Any) -> Any:
    return nnx.as_pure(nnx.state(model, nnx.Param))


def plain_step(model: Any, optimizer: Any, average: Any, *batch: jax.Array) -> Any:
    """The step as it is usually written, with Flax and Optax alone."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, *batch)
    optimizer.update(model, grads)
    return optax.incremental_update(parameters(model), average, 1 - DECAY), loss


train_step = accumax.nnx.train_step(loss_fn)


def step(model: Any, optimizer: Any, average: Any, *batch: jax.Array) -> Any:
    """The step with accumax."""
    loss = train_step(model, optimizer, *batch)
    params, opt_state = parameters(model), optimizer.opt_state
    return accumax.nnx.ema(average, params, opt_state, DECAY), loss


@nnx.jit
def accuracy(model: Any, x: Any, y: Any) -> jax.Array:
    return jnp.mean(jnp.argmax(model(x), axis=1) == y)


def begin(way: str, flags: Namespace, every: int) -> tuple[Any, Any]:
    """The model and the optimizer of "whole", "accumax" or "naive"."""
    model = Net(rngs=nnx.Rngs(flags.seed))
    schedule = optax.cosine_decay_schedule(1e-2, decay_steps=flags.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    if way == "accumax":
        return model, accumax.nnx.Optimizer(model, tx, wrt=nnx.Param, every=every)
    if way == "naive":
        tx = optax.MultiSteps(tx, every).gradient_transformation()
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def checkpoints(flags: Namespace) -> Any:
    """Saves in every `SAVES`-th call, wherever in a window that is. Or nothing."""
    if flags.checkpoints is None:
        return contextlib.nullcontext()
    options = ocp.CheckpointManagerOptions(save_interval_steps=SAVES, max_to_keep=3)
    return ocp.CheckpointManager(flags.checkpoints.absolute(), options=options)


def train(
    way: str,
    flags: Namespace,
    every: int,
    reference: Sequence[Any] = (),
    manager: ocp.CheckpointManager | None = None,
) -> images.Run:
    """One run.

    Args:
      way: "whole", "accumax" or "naive".
      flags: those of the command line.
      every: the calls in an update; 1 for the whole batch at once.
      reference: the running statistics of the big batch after each update.
      manager: of the checkpoints; it goes on from the newest, if there is one.
    """
    model, optimizer = begin(way, flags, every)
    average = jax.tree.map(jnp.copy, parameters(model))
    history, start, calls = images.begin(flags), 0, flags.steps * every
    if manager is not None and (newest := manager.latest_step()) is not None:
        start = newest
        # What was just made says what is to be read, and where it goes.
        state = nnx.state((model, optimizer)), average
        parts: dict[str, Any] = {"state": ocp.args.StandardRestore(state)}
        parts["history"] = ocp.args.JsonRestore()
        saved: Any = manager.restore(start, args=ocp.args.Composite(**parts))
        (modules, average), history = saved.state, saved.history
        nnx.update((model, optimizer), modules)
        images.check_same(flags, history)

    # Compiled once, for the memory figure and for the run.
    jitted = nnx.jit(step if way == "accumax" else plain_step, donate_argnums=(0, 1, 2))
    example = images.batch(flags, 0, every)
    compiled: Any = jitted.lower(model, optimizer, average, *example).compile()
    statistics = []
    progress = images.progress(way, start, calls)
    for call in progress:
        x, y = images.batch(flags, call, every)
        average, loss = compiled(model, optimizer, average, x, y)
        history["losses"].append(float(loss))
        if (call + 1) % every == 0:
            progress.set_postfix(loss=f"{np.mean(history['losses'][-every:]):.4f}")
            found = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            statistics.append(jax.tree.map(np.array, found))
            if reference:
                away = images.distances(statistics[-1], reference[call // every])
                history["distances"].append(away)
        if manager is not None:
            state = nnx.state((model, optimizer)), average
            parts = {"state": ocp.args.StandardSave(state)}
            # A copy, because it is written while the training goes on.
            parts["history"] = ocp.args.JsonSave(copy.deepcopy(history))
            last = call + 1 == calls  # is always saved
            manager.save(call + 1, args=ocp.args.Composite(**parts), force=last)

    # One number, or this line fails: Adam and the schedule have counted the same.
    counts = optax.tree.get_all_with_path(nnx.as_pure(optimizer.opt_state), "count")
    (updates,) = {int(count) for _, count in counts}
    memory: Any = compiled.memory_analysis()
    figures = {
        "updates": updates,
        "step": int(optimizer.step[...]),
        "temp": memory.temp_size_in_bytes,
    }
    params = parameters(model)
    for name, values in (("accuracy", params), ("averaged", average)):
        network = nnx.clone(model)
        nnx.update(network, values)
        network.eval()
        figures[name] = float(accuracy(network, *images.load("test")))
    return images.finish(params, statistics, history, every, figures)


def main(argv: Sequence[str] | None = None) -> dict[str, images.Run]:
    """Trains all three ways, prints the table and draws the figure."""
    flags = images.parse(argv, name="flax_nnx")
    runs = {"whole": train("whole", flags, 1)}
    reference = runs["whole"].statistics
    with checkpoints(flags) as manager:
        runs["accumax"] = train("accumax", flags, flags.every, reference, manager)
    runs["naive"] = train("naive", flags, flags.every, reference)
    print(images.report(runs))
    images.draw(runs, flags.output)
    return runs


if __name__ == "__main__":
    main()
