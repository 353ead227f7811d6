"""Rows of docs/neighbours.md: inside, optimizers, their parts, their compositions."""

import jax
import jax.numpy as jnp
import optax
import pytest
import test_optimizers
from neighbours import (
    ADAM,
    NEWEST,
    OPTAX,
    SGD,
    STEPS,
    K,
    accumulated,
    is_exact,
    is_inside,
    table,
    value,
    with_window_gradient,
)
from problems import big_batch, data, distance, init, same_bits

import accumax
from accumax import accumulate

ROWS, inside = table()
contrib = optax.contrib

# Listed here so that the page is the same for every Optax; a test compares the two.
OPTIMIZERS = (
    "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad "
    "fromage lamb lars lion nadam nadamw novograd optimistic_adam_v2 "
    "optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3 yogi "
    "contrib.acprop contrib.ademamix contrib.simplified_ademamix contrib.adopt "
    "contrib.cocob contrib.dadapt_adamw contrib.dog contrib.dowg contrib.madgrad "
    "contrib.muon contrib.prodigy contrib.schedule_free_adamw "
    "contrib.schedule_free_sgd"
)
BLOCKS = (
    "scale scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan "
    "scale_by_amsgrad scale_by_belief scale_by_distance_over_gradients "
    "scale_by_factored_rms scale_by_learning_rate scale_by_lion "
    "scale_by_novograd scale_by_optimistic_gradient scale_by_param_block_norm "
    "scale_by_param_block_rms scale_by_radam scale_by_rms scale_by_rprop "
    "scale_by_rss scale_by_schedule scale_by_sign scale_by_sm3 scale_by_stddev "
    "scale_by_trust_ratio scale_by_yogi trace ema centralize normalize_by_update_norm "
    "identity contrib.normalize contrib.scale_by_acprop contrib.scale_by_ademamix "
    "contrib.scale_by_adopt contrib.scale_by_cocob contrib.scale_by_madgrad "
    "contrib.scale_by_simplified_ademamix"
)
ARGUMENTS = {
    "scale": (2.0,),
    "scale_by_learning_rate": (0.5,),
    "scale_by_schedule": (optax.linear_schedule(1.0, 0.1, 3),),
    "scale_by_rprop": (0.1,),
    "scale_by_distance_over_gradients": (0.1,),
    "trace": (0.9,),
    "ema": (0.9,),
    "contrib.scale_by_madgrad": (1.0,),
    # The last is a large eps: a small one amplifies rounding.
    "scale_by_rms": (0.9, 0.1),
    "scale_by_stddev": (0.9, 0.1),
    "contrib.scale_by_acprop": (0.9, 0.99, 0.1),
}


@inside("optimizers that take a gradient", optax_names=OPTIMIZERS + " optimistic_adam")
def _():
    """`accumulate(optax.adamw(3e-4), k)` | Moments, counts, schedules and decay advance
    once per window: {names}."""
    # test_optimizers.py runs all of them.
    assert set(test_optimizers.OPTIMIZERS) == OPTAX.keys() & OPTIMIZERS.split()
    for name in ("adamw", "contrib.prodigy"):
        is_inside(test_optimizers.make(name), form="train_step")
    with pytest.deprecated_call():
        inner = optax.optimistic_adam(0.01, optimism=0.01)
    is_inside(inner)


@inside("the parts of optimizers", optax_names=BLOCKS)
def _():
    """`accumulate(optax.chain(optax.scale_by_adam(), ...), k)` | As in the big batch:
    {names}."""
    names = OPTAX.keys() & BLOCKS.split()
    if not NEWEST:  # Optax 0.2.5 takes the root of a gradient there: NaN.
        names -= {"scale_by_distance_over_gradients"}
    parts = {
        name: optax.chain(OPTAX[name](*ARGUMENTS.get(name, ())), optax.scale(-0.01))
        for name in sorted(names)
    }
    # All side by side in one program, each with a matrix of its own.
    start = init()["layer"]["w"][:, :2]
    params = dict.fromkeys(parts, start)
    together = optax.partition(parts, {name: name for name in parts})

    def loss(params, batch):
        each = [(batch["x"] @ params[name] - batch["y"]) ** 2 for name in parts]
        return jnp.sum(jnp.mean(jnp.stack(each), axis=1))

    with jax.numpy_rank_promotion("allow"):  # for scale_by_distance_over_gradients
        got, _ = accumulated(accumulate(together, K), params, loss)
        want = big_batch(together, params, data(STEPS), loss=loss)
        big = big_batch(together, params, data(STEPS), jnp.float32, loss)
    for name in parts:
        moved = distance(want[name], start)
        assert moved > 1e-5, name
        limit = 2 * distance(big[name], want[name]) + 1e-6 * max(1, moved)
        assert distance(got[name], want[name]) <= limit, name


@inside(
    "`contrib.muon`, `contrib.galore`",
    optax_names="contrib.scale_by_muon contrib.galore contrib.scale_by_galore",
)
def _():
    """`accumulate(optax.contrib.muon(0.02), k)` | The mean is orthogonalised, or
    projected, once per window; Muon uses Adam for parameters that are not matrices.
    GaLore does not accept None among the parameters, in Optax alone either."""
    is_inside(contrib.muon(0.02), form="apply_gradients")
    if galore := OPTAX.get("contrib.galore"):
        params = init() | {"out": init()["out"][:1]}
        is_inside(galore(0.1, rank=2, update_proj_gap=2), params=params)


@inside(
    "clipping",
    optax_names="clip clip_by_global_norm clip_by_block_rms adaptive_grad_clip",
)
def _():
    """`accumulate(optax.chain(clip, adam), k)` | Clips the big batch's gradient:
    `clip`, `clip_by_global_norm`, `clip_by_block_rms`, `adaptive_grad_clip`."""
    is_inside(optax.chain(optax.clip(0.05), optax.clip_by_block_rms(0.02), SGD))
    clips = optax.adaptive_grad_clip(0.05), optax.clip_by_global_norm(0.03)
    is_inside(optax.chain(*clips, SGD))


@inside(
    "decay, projection, freezing, flattening",
    optax_names="add_decayed_weights keep_params_nonnegative set_to_zero freeze "
    "selective_transform flatten",
)
def _():
    """`accumulate(optax.chain(adam, optax.add_decayed_weights(1e-2)), k)` | Once per
    window: `add_decayed_weights`, `keep_params_nonnegative`, `freeze`, `set_to_zero`,
    `selective_transform`, `flatten`. A frozen parameter does not change by a bit. It
    has no accumulator if its gradient is not used; the moments of an `adam` before a
    `freeze` use it."""
    is_inside(
        optax.chain(
            optax.flatten(optax.trace(0.9)),
            optax.add_decayed_weights(0.1),
            optax.scale(-0.1),
            optax.keep_params_nonnegative(),
        ),
        params=jax.tree.map(jnp.abs, init()),
    )
    mask = {"layer": True, "out": False, "scale": False}
    selective = optax.transforms.selective_transform(SGD, freeze_mask=mask)
    inner = optax.chain(selective, optax.transforms.freeze(mask))
    got, _ = accumulated(accumulate(inner, K))
    is_exact(got, inner)
    assert same_bits(got["layer"], init()["layer"])


@inside(
    "`chain`, `named_chain`, `masked`, `partition`, `multi_transform`",
    optax_names="chain named_chain masked partition multi_transform "
    "with_extra_args_support stateless stateless_with_tree_map",
)
def _():
    """`accumulate(optax.partition({'a': adam, 'b': sgd}, labels), k)` | Any
    composition, also of your own `optax.stateless`."""
    labels = {"layer": "a", "out": "b", "scale": "b"}
    mask = {"layer": True, "out": False, "scale": True}
    inner = optax.named_chain(
        ("half", optax.stateless_with_tree_map(lambda g, p: g / 2)),
        ("masked", optax.masked(optax.scale(3.0), mask)),
        ("both", optax.partition({"a": ADAM, "b": SGD}, labels)),
        ("twice", optax.stateless(lambda g, p: jax.tree.map(lambda x: 2 * x, g))),
    )
    is_inside(inner)


@inside(
    "`inject_hyperparams`", optax_names="inject_hyperparams inject_stateful_hyperparams"
)
def _():
    """`accumulate(optax.inject_hyperparams(optax.adam)(learning_rate=schedule), k)` |
    Schedules are read once per window. Set a value by `optax.tree.set(state,
    learning_rate=...)`; the window uses the value at its last call."""
    schedule = optax.linear_schedule(0.1, 0.01, 3)
    injected = optax.inject_hyperparams(optax.sgd)
    is_inside(injected(learning_rate=schedule), form="train_step")
    tx = accumulate(injected(learning_rate=1.0), 2)
    state, params = tx.init(0.0), 0.0
    for rate in (9.0, 0.5):
        state = optax.tree.set(state, learning_rate=jnp.float32(rate))
        params, state = accumax.apply_gradients(tx, params, state, 2.0)
    assert params == -1.0


@inside(
    "what reads the loss: `reduce_on_plateau`, `polyak_sgd`, `momo`, `momo_adam`",
    optax_names="contrib.reduce_on_plateau polyak_sgd scale_by_polyak contrib.momo "
    "contrib.momo_adam",
)
def _():
    """`accumulate(..., k, averaged_args=('value',))` | Pass `value=` in every call of
    `tx.update`; the optimizer gets the window's mean. `train_step` passes `value=` by
    itself. Without `averaged_args` the optimizer gets the value of the last
    microbatch."""
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.9)
    is_inside(optax.chain(SGD, plateau), value, averaged_args=("value",))
    is_inside(contrib.momo(0.1), form="train_step", averaged_args=("value",))
    last, _ = accumulated(accumulate(optax.polyak_sgd(), K), extra=value)
    assert distance(last, big_batch(optax.polyak_sgd(), init(), data(STEPS))) > 1e-3


@inside(
    "line searches: `lbfgs`, `scale_by_zoom_linesearch`, "
    "`scale_by_backtracking_linesearch`",
    works="with a note",
    optax_names="lbfgs scale_by_lbfgs scale_by_zoom_linesearch "
    "scale_by_backtracking_linesearch",
)
def _():
    """`accumulate(with_window_gradient(optax.lbfgs()), k, averaged_args=('value',))` |
    Exact if the search sees the window: `value=` is averaged, `value_fn=` must be the
    loss of the whole window, and `grad=` the gradient of that loss, which no caller has
    (see below). With `grad=` and `value_fn=` of the last call, it searches on the rows
    of that call alone."""

    def loss(w, batch):
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    def of_the_window(value, call, window):
        return {"value": value, "value_fn": lambda params: loss(params, window)}

    def of_the_call(value, call, window):
        return {"value": value, "value_fn": lambda params: loss(params, call)}

    backtracking = optax.scale_by_backtracking_linesearch(15, max_learning_rate=9.0)
    searches = optax.lbfgs(memory_size=2), optax.chain(optax.sgd(3.0), backtracking)
    start = init()["layer"]["w"][:, :2]
    for search, form in zip(searches, ("update", "apply_gradients"), strict=True):
        inner = with_window_gradient(search)
        tx = accumulate(inner, K, averaged_args=("value",))
        got, _ = accumulated(tx, start, loss, of_the_window, form)
        is_exact(got, search, loss=loss, params=start)
    wrong, _ = accumulated(accumulate(inner, K), start, loss, of_the_call)
    assert distance(wrong, got) > 1e-2
