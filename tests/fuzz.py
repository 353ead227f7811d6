"""Random losses and random sequences of calls, against what defines them.

    python tests/fuzz.py losses --seed 0 --count 2000
    python tests/fuzz.py calls --seed 0 --count 200

A loss is a random program of scans, conditionals, calls, checkpoints and derivative
rules whose operands are parameters, values computed from parameters, constants and the
like. Its gradient by `value_and_grad` and by `train_step`, in place and carried, is to
be that of `jax.grad`. A sequence of calls is random in form, weight, flush and NaN; it
is to do what a few lines of NumPy do. What fails is printed with its seed, which alone
repeats it, and the command ends with 1.
"""

import argparse
import functools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax import lax

import accumax

ROWS, WIDTH, LENGTH = 4, 3, 3

# A program runs once, so what takes time is to compile it.
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}


# Random losses.


def parameters(rng):
    """Of few shapes, so that gradients that are swapped raise no error."""

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(WIDTH))

    return {
        "matrix": [leaf(WIDTH, WIDTH) for _ in range(3)],
        "stack": [leaf(LENGTH, WIDTH, WIDTH) for _ in range(3)],
        "vector": [leaf(WIDTH) for _ in range(2)],
        "vectors": [leaf(LENGTH, WIDTH) for _ in range(2)],
    }


DERIVED = {
    "raw": lambda x, other: x,
    "scaled": lambda x, other: 2.0 * x,
    "halved": lambda x, other: -x / 2.0,
    "tanh": lambda x, other: jnp.tanh(x),
    "cast": lambda x, other: x.astype(jnp.float32).astype(x.dtype),
    "transposed": lambda x, other: jnp.swapaxes(x, -1, -2) if x.ndim > 1 else x[::-1],
    "flipped": lambda x, other: jnp.flip(x, 0),
    "summed": lambda x, other: x + other,
    "stopped": lambda x, other: lax.stop_gradient(x),
    "masked": lambda x, other: jnp.where(jnp.arange(x.shape[-1]) > 0, x, 0.0),
    "gathered": lambda x, other: x[jnp.arange(x.shape[0])[::-1]],
    "sliced": lambda x, other: jnp.concatenate([x[1:], x[:1]]),
    "dynamic": lambda x, other: jnp.concatenate(
        [lax.dynamic_slice_in_dim(x, jnp.int32(1), x.shape[0] - 1), x[:1]]
    ),
    "padded": lambda x, other: jnp.pad(x, [(1, 0)] + [(0, 0)] * (x.ndim - 1))[:-1],
    "conjugated": lambda x, other: jnp.real(jnp.conj(x * (1 + 2j))),
    "constant": lambda x, other: jnp.ones_like(x) / 2,
    "integer": lambda x, other: jnp.ones(x.shape, jnp.int32),
    "jitted": lambda x, other: jax.jit(jnp.sin)(x),
    "same jitted": lambda x, other: jax.jit(lambda x: x)(x),
}
# The raw parameter is what matters beside all others.
KINDS = ["raw"] * len(DERIVED) + list(DERIVED)


class Losses:
    """Draws the parts of a loss from `rng`. A part is drawn before it is traced.

    A part is `(h, values) -> h`, where `h` are the activations of the rows, and
    `values` are lists of matrices, stacks and vectors, some of them parameters.
    """

    def __init__(self, rng):
        self.rng = rng

    def choose(self, options):
        return options[self.rng.integers(len(options))]

    def operand(self, group):
        """`(values) -> array`."""
        i, j = self.rng.integers(8, size=2)
        derive = DERIVED[self.choose(KINDS)]

        def pick(values):
            found = values[group]
            return derive(found[i % len(found)], found[j % len(found)])

        return pick

    def block(self, depth):
        count = 1 + (self.rng.random() < 0.3)
        parts = [self.part(depth) for _ in range(count)]

        def run(h, values):
            for part in parts:
                h = part(h, values)
            return h

        return run

    def part(self, depth):
        leaves = [self.layer, self.scale]
        trees = [self.scan] * 4 + [
            self.conditional,
            self.switch,
            self.fori,
            self.vmapped,
            self.over_stack,
            self.jitted,
            self.checkpointed,
            self.custom_vjp,
            self.custom_jvp,
        ]
        return self.choose(leaves + trees)(depth - 1) if depth else self.layer(0)

    def layer(self, depth):
        pick = self.operand("matrix")
        return lambda h, values: jnp.sin(h @ pick(values) + h)

    def scale(self, depth):
        pick = self.operand("vector")
        return lambda h, values: h * jnp.broadcast_to(pick(values), h.shape) + 0.1

    def scan(self, depth):
        rng = self.rng
        consts = [self.operand("matrix") for _ in range(rng.integers(3))]
        consts_v = [self.operand("vector") for _ in range(rng.integers(2))]
        xs = [self.operand("stack") for _ in range(rng.integers(1, 3))]
        xs_v = [self.operand("vectors") for _ in range(rng.integers(2))]
        carried = self.operand("matrix") if rng.random() < 0.3 else None
        body = self.block(depth)
        length = self.choose([LENGTH] * 6 + [1, 0])
        activations, stacked, unused = map(int, rng.random(3) < 0.25)
        options = {
            "reverse": bool(rng.random() < 0.3),
            "unroll": int(self.choose([1, 1, 1, 2])),
        }

        def run(h, values):
            inside = {
                "matrix": [pick(values) for pick in consts],
                "vector": [pick(values) for pick in consts_v],
            }
            scanned = {
                "matrix": [pick(values)[:length] for pick in xs],
                "vector": [pick(values)[:length] for pick in xs_v],
            }
            if length == LENGTH:  # not even a slice that takes all
                scanned = {
                    "matrix": [pick(values) for pick in xs],
                    "vector": [pick(values) for pick in xs_v],
                }
            rows = (
                jnp.stack([jnp.cos(h) + i for i in range(length)])
                if (activations and length)
                else None
            )

            def turn(carry, x):
                h, w = carry
                x, row = x
                here = {
                    "matrix": inside["matrix"] + x["matrix"][unused:] + [w],
                    "vector": inside["vector"] + x["vector"] + [w[0]],
                    "stack": values["stack"],
                    "vectors": values["vectors"],
                }
                h = body(h, here)
                h = h if row is None else h + row
                for m in x["matrix"][unused:]:
                    h = jnp.sin(h @ m + h)
                return (h, w * 0.9), (h if stacked else None)

            w = jnp.eye(WIDTH) if carried is None else carried(values) * 1.0
            (h, _), ys = lax.scan(turn, (h, w), (scanned, rows), length, **options)
            return h if ys is None else h + jnp.sum(ys, 0)

        return run

    def conditional(self, depth):
        yes, no = self.block(depth), self.block(depth)
        picks = [self.operand("matrix"), self.operand("vector")]

        def run(h, values):
            handed = [pick(values) for pick in picks]
            here = {g: list(x) for g, x in values.items()}

            def branch(block):
                def inside(h, matrix, vector):
                    more = here | {
                        "matrix": [matrix, *here["matrix"]],
                        "vector": [vector, *here["vector"]],
                    }
                    return block(h, more)

                return inside

            pred = jnp.sum(values["vector"][0]) > 0
            return lax.cond(pred, branch(yes), branch(no), h, *handed)

        return run

    def switch(self, depth):
        blocks = [self.block(depth) for _ in range(3)]

        def run(h, values):
            index = jnp.int32(jnp.abs(values["matrix"][0][0, 0]) * 10) % 3
            branches = [lambda h, block=block: block(h, values) for block in blocks]
            return lax.switch(index, branches, h)

        return run

    def fori(self, depth):
        block = self.block(depth)
        pick = self.operand("stack")

        def run(h, values):
            stack = pick(values)

            def turn(i, h):
                more = values | {"matrix": [stack[i], *values["matrix"]]}
                return block(h, more)

            return lax.fori_loop(0, 2, turn, h)

        return run

    def vmapped(self, depth):
        block = self.block(depth)
        return lambda h, values: jax.vmap(lambda row: block(row[None], values)[0])(h)

    def over_stack(self, depth):
        pick, axis = self.operand("stack"), self.choose([0, 1])

        def run(h, values):
            each = jax.vmap(lambda w: jnp.sin(h @ w), in_axes=axis, out_axes=1)
            return h + jnp.sum(each(pick(values)), 1)

        return run

    def jitted(self, depth):
        block = self.block(depth)
        return lambda h, values: jax.jit(block)(h, values)

    def checkpointed(self, depth):
        block = self.block(depth)
        policies = jax.checkpoint_policies
        policy = self.choose(
            [None, policies.dots_saveable, policies.everything_saveable]
        )
        return lambda h, values: jax.checkpoint(block, policy=policy)(h, values)

    def custom_vjp(self, depth):
        block = self.block(depth)

        @jax.custom_vjp
        def run(h, values):
            return block(h, values)

        run.defvjp(
            lambda h, values: (block(h, values), (h, values)),
            lambda saved, ct: jax.vjp(block, *saved)[1](ct),
        )
        return run

    def custom_jvp(self, depth):
        block = self.block(depth)

        @jax.custom_jvp
        def run(h, values):
            return block(h, values)

        @run.defjvp
        def rule(primals, tangents):
            return jax.jvp(block, primals, tangents)

        return run


def random_loss(seed):
    """`(loss, weighted, params, batch)`, all from `seed`; a mean over the rows."""
    rng = np.random.default_rng(seed)
    block = Losses(rng).block(1 + (rng.random() < 0.5))
    params = parameters(rng)
    batch = jnp.asarray(rng.normal(size=(ROWS, WIDTH)))
    weighted = bool(rng.random() < 0.25)

    def each(params, x):
        return jnp.sum(block(x, params) ** 2, axis=-1)

    def loss(params, x):
        if weighted:
            counts = jnp.where(x[:, 0] > -1, 1.0, 0.0)
            return jnp.sum(each(params, x) * counts), jnp.sum(counts)
        return jnp.mean(each(params, x))

    return loss, weighted, params, batch


def gradients(seed):
    """The gradient of one loss in all ways, the big batch's own first."""
    loss, weighted, params, batch = random_loss(seed)

    def whole(params):
        if not weighted:
            return loss(params, batch)
        value, weight = loss(params, batch)
        return value / weight

    def within(params):
        return accumax.grad(loss, microbatch_size=ROWS // 2, **options)(params, batch)

    def across(params):
        tx = accumax.accumulate(optax.sgd(1.0), 2, accumulator_dtype=jnp.float64)
        step = accumax.train_step(loss, tx, weighted=weighted)

        def call(carry, rows):
            return step(*carry, rows)[:2], None

        calls = batch.reshape(2, ROWS // 2, WIDTH)
        (new, _), _ = lax.scan(call, (params, tx.init(params)), calls)
        return jax.tree.map(jnp.subtract, params, new)

    options = {"weighted": weighted, "accumulator_dtype": jnp.float64}
    ways = {"jax.grad": jax.grad(whole), "value_and_grad": within, "train_step": across}
    found = jax.jit(lambda params: {name: way(params) for name, way in ways.items()})
    return jax.device_get(found.lower(params).compile(FAST)(params))


def wrong_gradients(seed):
    """What is wrong with the loss of this seed: a list of lines, empty if nothing."""
    with jax.enable_x64(True), warnings.catch_warnings():
        # A tree that has to be built is no fault here.
        warnings.filterwarnings("ignore", message="JAX .* in place")
        found = gradients(seed)
    want = found.pop("jax.grad")
    lines = []
    for name, got in found.items():
        for (path, w), g in zip(
            jax.tree_util.tree_leaves_with_path(want),
            jax.tree.leaves(got),
            strict=True,
        ):
            # A cast to float32 rounds each microbatch's gradient by itself.
            if not np.allclose(g, w, rtol=1e-5, atol=1e-6 * max(1, np.abs(w).max())):
                lines.append(
                    f"loss {seed}: {name} is off at {jax.tree_util.keystr(path)} by "
                    f"{np.abs(g - w).max():.3g} of {np.abs(w).max():.3g}"
                )
    return lines


# Random sequences of calls.

EVERY = {
    "1": 1,
    "3": 3,
    "2, 4, 1, ...": lambda step: jnp.array([2, 4, 1])[step % 3],
}


@functools.cache
def forms(reduction, nonfinite, every):
    """`(tx, ways)`: jitted calls `(params, state, grad, weight, flush)`."""
    tx = accumax.accumulate(
        optax.sgd(0.5), EVERY[every], reduction=reduction, nonfinite=nonfinite
    )

    def update(params, state, grad, weight, flush):
        updates, state = tx.update(grad, state, params, weight=weight, flush=flush)
        return optax.apply_updates(params, updates), state

    def apply(params, state, grad, weight, flush):
        return accumax.apply_gradients(
            tx, params, state, grad, weight=weight, flush=flush
        )

    def carried(params, state, grad, weight, flush):
        step = accumax.train_step(jnp.vdot, tx)
        return step(params, state, grad, weight=weight, flush=flush)[:2]

    def weighted(params, state, grad, weight, flush):
        # The gradient of the sum of the items' losses.
        total = weight if reduction == "mean" else 1.0
        step = accumax.train_step(
            lambda p, g: (jnp.vdot(p, g) * total, weight), tx, weighted=True
        )
        return step(params, state, grad, flush=flush)[:2]

    ways = [update, apply, carried] + [weighted] * (reduction != "sum")
    return tx, [jax.jit(way) for way in ways]


def wrong_calls(seed):
    """What is wrong with the calls of this seed, against the contract in NumPy."""
    rng = np.random.default_rng(seed)

    def choose(options):
        return options[rng.integers(len(options))]

    reduction = choose(["mean", "sum", "mean_of_sums"])
    nonfinite, every = choose(["propagate", "skip", "drop"]), choose(list(EVERY))
    tx, ways = forms(reduction, nonfinite, every)
    params = jnp.asarray(rng.normal(size=2), jnp.float32)
    state, want = tx.init(params), np.asarray(params, np.float64)
    total, items, seen, steps, skipped = np.zeros(2), 0.0, 0, 0, 0
    length = (lambda step: int(every)) if every.isdigit() else EVERY[every]
    for n in range(16):
        grad = np.round(rng.normal(size=2), 3)
        if nonfinite != "propagate" and rng.random() < 0.2:
            grad[0] = choose([np.nan, np.inf])
        weight = choose([1.0, 1.0, 2.0, 0.25, 0.0])
        close = bool(rng.random() < 0.1)
        params, state = choose(ways)(
            params, state, jnp.float32(grad), jnp.float32(weight), jnp.bool_(close)
        )

        refused = weight > 0 and not np.isfinite(grad).all()
        if weight > 0 and not refused:
            total = total + grad * (weight if reduction == "mean" else 1)
            items += weight
        skipped += refused
        seen += not (refused and nonfinite == "skip")
        closes = close or seen >= length(steps)
        applies = closes and items > 0
        if applies:
            want = want - 0.5 * total / (1 if reduction == "sum" else items)
            steps += 1
        if closes:
            total, items, seen = np.zeros(2), 0.0, 0
        got = params, state.gradient_step, state.mini_step, state.skipped
        counts = [int(x) for x in got[1:]]
        right = np.allclose(params, want, rtol=1e-5, atol=1e-5)
        if not right or counts != [steps, seen, skipped] or state.emitted != applies:
            return [
                f"calls {seed}: after call {n} of {reduction}, {nonfinite}, {every} "
                f"got {params}, {counts}, {state.emitted}; expected {want}, "
                f"{[steps, seen, skipped]}, {applies}"
            ]
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["losses", "calls"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    check = {"losses": wrong_gradients, "calls": wrong_calls}[args.what]
    failed = 0
    for seed in tqdm.trange(args.seed, args.seed + args.count, mininterval=10):
        lines = check(seed)
        failed += bool(lines)
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    print(f"jax {jax.__version__}: {failed} of {args.count} {args.what} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
