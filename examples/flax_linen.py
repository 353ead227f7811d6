"""Flax Linen: BatchNorm and dropout, with an eighth of the batch in memory.

A small residual net learns scikit-learn's 8 x 8 digits three ways: with the whole batch
at once; with `accumax.linen.TrainState`, which is called with an eighth of it and makes
an update in every eighth call; and naively, with Flax's own state and optax.MultiSteps.
Clipping, AdamW and the schedule are inside of both. Run it in the repository with

    pip install -e ".[examples]"
    python examples/flax_linen.py                 # under a minute on two CPU cores
    python examples/flax_linen.py --checkpoints saved            # stop it at any time
    python examples/flax_linen.py --checkpoints saved --resume   # and go on
    python examples/flax_linen.py --sizes         # of microbatches; several minutes

The first prints what follows, and draws it over the updates in flax_linen.png:

                                 whole batch      accumax        naive
    test accuracy                      98.06        97.50        97.78 %
      of averaged parameters           98.33        97.78        97.78 %
    optimizer updates                     60           60           60
    `step` of the state                   60           60          480
    temporary memory, a call            37.4          4.7          4.8 MiB
    running statistics: distance from the whole batch's
      images, first update           0.0e+00      6.5e-08      4.7e-01
      images, last update            0.0e+00      1.8e-07      6.0e-03
      deeper, first update           0.0e+00      7.8e-04      3.4e-01
      deeper, last update            0.0e+00      1.8e-01      1.8e-01

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
- Naively `step` counts calls. That is right for `fold_in(key, state.step)`, as here,
  and wrong for what is meant once per update; accumax has `step` and `microstep`.

A resumed run ends with the same bits, wherever in a window it was stopped: the state
holds the open window, and the batches depend on nothing but the seed and the call.
Only accumax's run is saved; the two that it is compared with are trained anew.

--sizes, too, is with the flags above. The gradient is the first, without dropout:

                  first gradient    test accuracy
    microbatch        is off by    accumax      naive
             4           0.2341      98.06      98.06 %
             8           0.1584      98.33      98.33 %
            16           0.1160      97.78      98.06 %
            32           0.0828      98.06      98.61 %
            64           0.0623      97.50      97.78 %
           128           0.0423      98.33      98.61 %
           512           0.0000      98.06      98.06 %
"""

import contextlib
import copy
import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import images
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training import train_state

import accumax.linen

MOMENTUM = 0.9  # of all running means and variances
DECAY = 0.9  # of the moving average of the parameters
SAVES = 20  # calls from checkpoint to checkpoint: no multiple of the window's 8


class Block(nn.Module):
    """A residual block."""

    features: int
    strides: int
    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(not train, momentum=MOMENTUM)(x)

        def conv(x: jax.Array, size: int, strides: int) -> jax.Array:
            kernel = (size, size)
            return nn.Conv(self.features, kernel, strides=strides, use_bias=False)(x)

        y = nn.relu(norm(conv(x, 3, self.strides)))
        y = nn.Dropout(self.rate, deterministic=not train)(y)
        y = norm(conv(y, 3, 1))
        return nn.relu(y + norm(conv(x, 1, self.strides)))


class Net(nn.Module):
    """(rows, 8, 8, 1) images to (rows, 10) logits."""

    rate: float = 0.2  # of dropout

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        # Of the images: these running statistics depend on no parameter.
        norm = nn.BatchNorm(not train, momentum=MOMENTUM, name="of_images")
        x = nn.relu(nn.Conv(16, (3, 3))(norm(x)))
        x = Block(16, 1, self.rate)(x, train=train)
        x = Block(32, 2, self.rate)(x, train=train)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class PlainState(train_state.TrainState):
    """Flax's own, with the fields that such nets usually add."""

    batch_stats: Any
    key: jax.Array
    ema_params: Any


class State(accumax.linen.TrainState):
    """The same fields; the state also counts calls and holds the open window."""

    batch_stats: Any
    key: jax.Array
    ema_params: Any


def make_loss_fn(net: Net) -> Callable[..., Any]:
    """Of parameters, a batch and two fields, to the loss and the new statistics."""

    def loss_fn(
        params: Any, x: jax.Array, y: jax.Array, *, batch_stats: Any, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        logits, new = net.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), y)
        return losses.mean(), new

    return loss_fn


def make_plain_step(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The step as it is usually written, with Flax and Optax alone."""

    def step(state: PlainState, x: jax.Array, y: jax.Array) -> Any:
        key = jax.random.fold_in(state.key, state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        fields = {"batch_stats": state.batch_stats, "key": key}
        (loss, new), grads = grad_fn(state.params, x, y, **fields)
        state = state.apply_gradients(grads=grads, **new)
        average = optax.incremental_update(state.params, state.ema_params, 1 - DECAY)
        return state.replace(ema_params=average), loss

    return step


def make_step(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The step with accumax."""
    train_step = State.train_step(loss_fn, mutable=("batch_stats",), rngs=("key",))

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        state, loss = train_step(state, x, y)
        average = accumax.linen.ema(
            state.ema_params, state.params, state.opt_state, DECAY
        )
        return state.replace(ema_params=average), loss

    return step


@functools.partial(jax.jit, static_argnums=0)
def init(net: Net, key: jax.Array) -> Any:
    """The parameters and the running statistics."""
    return net.init(key, jnp.zeros((1, 8, 8, 1)), train=False)


@functools.partial(jax.jit, static_argnums=0)
def accuracy(net: Net, variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = jnp.asarray(net.apply(variables, x, train=False))
    return jnp.mean(jnp.argmax(logits, axis=1) == y)


def begin(way: str, flags: Namespace, every: int) -> tuple[Any, Callable[..., Any]]:
    """The state and the step of "whole", "accumax" or "naive"."""
    net, keys = Net(), jax.random.split(jax.random.key(flags.seed))
    variables = init(net, keys[0])
    # A copy, because a buffer that two fields hold cannot be donated.
    average = jax.tree.map(jnp.copy, variables["params"])
    fields = {"apply_fn": net.apply, "key": keys[1], "ema_params": average, **variables}
    schedule = optax.cosine_decay_schedule(1e-2, decay_steps=flags.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    loss_fn = make_loss_fn(net)
    if way == "accumax":
        state = State.create(tx=tx, every=every, momentum=MOMENTUM, **fields)
        return state, make_step(loss_fn)
    if way == "naive":
        tx = optax.MultiSteps(tx, every).gradient_transformation()
    return PlainState.create(tx=tx, **fields), make_plain_step(loss_fn)


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
    state, step = begin(way, flags, every)
    history, start, calls = images.begin(flags), 0, flags.steps * every
    if manager is not None and (newest := manager.latest_step()) is not None:
        start = newest
        # The state that was just made says what is to be read, and where it goes.
        parts: dict[str, Any] = {"state": ocp.args.StandardRestore(state)}
        parts["history"] = ocp.args.JsonRestore()
        saved: Any = manager.restore(start, args=ocp.args.Composite(**parts))
        state, history = saved.state, saved.history
        images.check_same(flags, history)

    # Compiled once, for the memory figure and for the run.
    jitted = jax.jit(step, donate_argnums=0)
    compiled = jitted.lower(state, *images.batch(flags, 0, every)).compile()
    statistics = []
    progress = images.progress(way, start, calls)
    for call in progress:
        x, y = images.batch(flags, call, every)
        state, loss = compiled(state, x, y)
        history["losses"].append(float(loss))
        if (call + 1) % every == 0:
            progress.set_postfix(loss=f"{np.mean(history['losses'][-every:]):.4f}")
            statistics.append(jax.tree.map(np.array, state.batch_stats))
            if reference:
                away = images.distances(statistics[-1], reference[call // every])
                history["distances"].append(away)
        if manager is not None:
            parts = {"state": ocp.args.StandardSave(state)}
            # A copy, because it is written while the training goes on.
            parts["history"] = ocp.args.JsonSave(copy.deepcopy(history))
            last = call + 1 == calls  # is always saved
            manager.save(call + 1, args=ocp.args.Composite(**parts), force=last)

    # One number, or this line fails: Adam and the schedule have counted the same.
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    (updates,) = {int(count) for _, count in counts}
    memory: Any = compiled.memory_analysis()
    figures = {
        "updates": updates,
        "step": int(state.step),
        "temp": memory.temp_size_in_bytes,
    }
    for name, params in (("accuracy", state.params), ("averaged", state.ema_params)):
        variables = {"params": params, "batch_stats": state.batch_stats}
        figures[name] = float(accuracy(Net(), variables, *images.load("test")))
    return images.finish(state.params, statistics, history, every, figures)


def compare_sizes(flags: Namespace) -> str:
    """What it matters that each microbatch normalises by itself."""
    state, _ = begin("whole", flags, 1)
    loss_fn = make_loss_fn(Net(rate=0.0))  # masks would be another difference
    fields = {"batch_stats": state.batch_stats, "key": state.key}
    grad_fn = jax.jit(jax.grad(loss_fn, has_aux=True))

    def gradient(every: int) -> Any:
        """The mean over the first batch's microbatches."""
        batches = (images.batch(flags, n, every) for n in range(every))
        grads = [grad_fn(state.params, *batch, **fields)[0] for batch in batches]
        return jax.tree.map(lambda *parts: sum(parts) / every, *grads)

    whole = gradient(1)
    lines = ["              first gradient    test accuracy", ""]
    lines[1] = "microbatch        is off by    accumax      naive"
    for size in sorted({4, 8, 16, 32, 64, 128, flags.batch}):
        if size <= flags.batch and flags.batch % size == 0:
            every = flags.batch // size
            cells = f"{size:10}{images.distance(gradient(every), whole):17.4f}"
            for way in ("accumax", "naive"):
                cells += f"{100 * train(way, flags, every).figures['accuracy']:11.2f}"
            lines.append(f"{cells} %")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, images.Run]:
    """Trains all three ways, prints the table and draws the figure; or --sizes."""
    flags = images.parse(argv, name="flax_linen", sizes=True)
    if flags.sizes:
        print(compare_sizes(flags))
        return {}
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
