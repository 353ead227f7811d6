"""Tests of a training step, ours or anyone's: is its update that of the big batch?

    import accumax.testing

    accumax.testing.check_update(step, params, opt_state, microbatches, reference=...)

`check_update` compares one window of a step with the big batch. `coefficients` looks at
an accumulated gradient, and says how much each microbatch counts in it.
"""

import dataclasses
import functools
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from ._testing import reference as references
from ._testing import sentences, update
from ._testing.checks import (
    check_alternatives,
    check_count,
    check_gradients,
    check_weights,
    non_finite,
)
from ._testing.evidence import Evidence, by_path, gather
from ._testing.faults import Context, diagnose
from ._testing.update import Distance
from ._types import PyTree


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """How much each microbatch counts in an accumulated gradient. Prints as a table.

    Attributes:
      values: (k,) float64, by least squares over all leaves; NaN where the gradients
        do not determine one.
      expected: (k,) float64, those of the weighted mean.
      residual: the norm of what `values` do not explain, over that of the gradient.
        Every leaf counts in the scale of its own gradients.
      by_leaf: for each tree path the (k,) coefficients of this leaf alone, or None
        where it has too few numbers or its gradients are too alike.
      fault: a short name; see `coefficients`.
      diagnosis: what was seen and what to do.
    """

    values: np.ndarray
    expected: np.ndarray
    residual: float
    by_leaf: dict[str, np.ndarray | None]
    fault: str
    diagnosis: str

    def __str__(self) -> str:
        lines = ["microbatch   expected      found      ratio"]
        for i, (want, got) in enumerate(zip(self.expected, self.values, strict=True)):
            got = 0.0 if abs(got) < 1e-9 else got
            ratio = f"{got / want:10.4g}" if want else f"{'':10}"
            lines.append(f"{i:10d} {want:10.4g} {got:10.4g} {ratio}")
        lines += [f"residual: {self.residual:.3g}", f"fault: {self.fault}"]
        return "\n".join([*lines, *textwrap.wrap(self.diagnosis, 72)])


def coefficients(
    accumulated: PyTree,
    microbatch_gradients: Sequence[PyTree],
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    tolerance: float = 1e-4,
    devices: int | None = None,
    window: int | None = None,
    alternatives: Mapping[str, Sequence[PyTree]] | None = None,
) -> Coefficients:
    r"""Finds how much each microbatch counts in an accumulated gradient.

    Solves :math:`G \approx \sum_i c_i g_i` for the coefficients :math:`c_i` by least
    squares in float64, and compares them with those of the weighted mean,
    :math:`w_i / \sum_j w_j`. Names the fault that they show:

    - "none": the weighted mean, to rounding.
    - "mean of means": 1/k each, although the weights differ. A last microbatch that is
      smaller but counts as a full one is this fault.
    - "sum for a mean": k times the mean, or 1 each, or the sum over all items.
    - "reduced twice over devices": an integer multiple. "divided twice": 1/k or
      1/devices of the mean. "partial window": what was seen was divided by the calls
      of a full window. "wrong scale": any other factor.
    - "lost tail": the last microbatches do not count. "left out": others do not count,
      or none does. "counted twice": some count double. The rest may be divided by all
      weights or by those that count.
    - "over-weighted tail": the last microbatch alone counts too much.
    - "clipped each": the gradient of each microbatch was clipped to one norm.
    - "half-precision accumulation": bfloat16 or float16 lost a part of the sum.
    - "leaves differ": some leaves are right and others are not, as with swapped or
      stale gradients; the diagnosis names them.
    - a key of `alternatives`, such as "repeated dropout mask".
    - "too alike": the gradient is wrong, but the microbatches are too alike.
    - "non-finite": there is a NaN or an infinity. "unknown": none of these.

    Some faults look the same. On k devices, a sum for a mean and a gradient that was
    reduced twice are both k times the mean; so are, for two microbatches, a gradient
    that counts twice and one that lacks the other. A wrong factor and the clipping of
    the whole gradient look the same, too. With bfloat16 leaves and few microbatches, a
    sum in bfloat16 may be as exact as a right one that is rounded in the end.

    Args:
      accumulated: the gradient that a program accumulated, a tree of arrays. Integer,
        float0 and None leaves are ignored.
      microbatch_gradients: k trees with the same leaves: the mean gradient of each
        microbatch, at the same parameters, in the order of the program.
      weights: (k,) the items (examples, tokens) of each microbatch; equal by default.
      tolerance: what counts as rounding, relative to the gradients of a leaf. The
        default is for float32; half-precision leaves get more by themselves. Pass 1e-2
        if the step has matrix products in bfloat16 or TF32.
      devices: the number of devices over which gradients are reduced, if any.
      window: the calls of a full window, if the microbatches are a part of one.
      alternatives: by name, other gradients of the same microbatches. If those explain
        the accumulated gradient and `microbatch_gradients` do not, the fault is their
        name. For example `{"repeated dropout mask": [...]}`, computed with one key.

    Returns:
      A `Coefficients`.

    Raises:
      TypeError, ValueError: an argument is wrong; the trees differ; or there are fewer
        numbers than microbatches. The message names it.

    >>> import accumax.testing, optax
    >>> import jax.numpy as jnp
    >>> grads = [jnp.array([1.0, 0.0]), jnp.array([0.0, 8.0])]
    >>> tx = optax.MultiSteps(optax.identity(), 2)
    >>> state = tx.init(grads[0])
    >>> for grad in grads:
    ...     accumulated, state = tx.update(grad, state)
    >>> print(accumax.testing.coefficients(accumulated, grads, weights=[3, 1]))
    microbatch   expected      found      ratio
             0       0.75        0.5     0.6667
             1       0.25        0.5          2
    residual: 0
    fault: mean of means
    Each microbatch counts 0.5, although their weights are (3, 1). Multiply
    each mean by its weight, add, and divide once by the sum of the weights.
    """
    gradients = check_gradients(accumulated, microbatch_gradients)
    k = len(gradients)
    counts = check_weights(weights, k)
    if not 0 < tolerance < 1:
        raise ValueError(
            f"{tolerance=} must be between 0 and 1: what counts as rounding, relative "
            "to the gradient. 1e-4 is for float32."
        )
    others = check_alternatives(accumulated, alternatives or {}, k)
    expected = counts / np.sum(counts)
    bad = non_finite(accumulated, gradients, others)
    if bad is not None:
        unknown = np.full(k, np.nan)
        by_leaf = dict.fromkeys(by_path(accumulated))
        return Coefficients(unknown, expected, np.nan, by_leaf, *bad)
    seen = gather(accumulated, gradients, expected, tolerance)
    context = Context(
        weights=counts,
        devices=check_count("devices", devices, 1),
        window=check_count("window", window, k),
        alternatives={
            name: gather(accumulated, trees, expected, tolerance)
            for name, trees in others.items()
        },
    )
    values, determined = seen.solution
    return Coefficients(
        np.where(determined, values, np.nan),
        expected,
        seen.residual(values),
        {leaf.path: _of_leaf(seen, i) for i, leaf in enumerate(seen.leaves)},
        *diagnose(seen, context),
    )


def _of_leaf(seen: Evidence, i: int) -> np.ndarray | None:
    values, determined = seen.solve(i)
    return values if np.all(determined) else None


@dataclasses.dataclass(frozen=True)
class UpdateReport:
    """How far the update of a step is from the big batch's. Prints as a table.

    Attributes:
      distances: one `Distance` for each parameter: `path`, `step` and `big_batch` (the
        largest absolute differences from the update in float64), `floor` (differences
        up to it are rounding), and `ratio`.
      factor: the ratio up to which a parameter is right.
      coefficients: what the gradient shows, if it could be had; else None.
      note: why there are no coefficients, and which faults this check may miss.
    """

    distances: tuple[Distance, ...]
    factor: float
    coefficients: Coefficients | None
    note: str = ""

    @property
    def passed(self) -> bool:
        return all(x.ratio <= self.factor for x in self.distances)

    def __str__(self) -> str:
        width = max([9, *(len(x.path) for x in self.distances)])
        lines = [f"{'parameter':{width}}  {'step':>9}  {'big batch':>9}  {'ratio':>9}"]
        for x in self.distances:
            wrong = "" if x.ratio <= self.factor else "  wrong"
            lines.append(
                f"{x.path:{width}}  {x.step:9.2e}  {x.big_batch:9.2e}  "
                f"{x.ratio:9.3g}{wrong}"
            )
        found = "" if self.coefficients is None else str(self.coefficients)
        return "\n".join(x for x in (*lines, found, self.note) if x)


def check_update(
    step: Callable[..., Any],
    params: PyTree,
    opt_state: Any,
    microbatches: Sequence[PyTree],
    *,
    reference: tuple[Callable[..., Any], optax.GradientTransformation]
    | Callable[[PyTree, PyTree], PyTree],
    call: Callable[..., tuple[PyTree, Any]] | None = None,
    once: bool = False,
    join: Callable[[Sequence[PyTree]], PyTree] | None = None,
    gradient: Callable[[PyTree, PyTree, Any], PyTree] | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    devices: int | None = None,
    alternatives: Mapping[str, Sequence[PyTree]] | None = None,
    factor: float = 2.0,
) -> UpdateReport:
    """Checks that one window of a step makes the big batch's update.

    Calls `step` once for each microbatch. Computes the update of the whole batch twice,
    as the parameters are and in float64, where the latter is the truth. The step passes
    if no parameter is more than `factor` times as far from it as the big batch in the
    parameters' own precision. Distances that rounding explains are right: four units in
    the last place of the parameter, one of the largest update, or, relative to the
    update, four times the median of the big batch's own.

    If the step fails, the error has the table and, if the gradient can be had, the
    diagnosis of `coefficients`. From plain SGD the gradient is read by itself; use a
    learning rate of about 1, for with a small one it is lost in the rounding of the
    parameters. For other optimizers pass `gradient`.

    Args:
      step: `step(params, opt_state, microbatch) -> (params, opt_state, ...)`. It may
        donate its arguments: it gets copies.
      params: a tree of arrays.
      opt_state: what `step` takes. With a pair as reference it must be a fresh one.
      microbatches: those of one window, each a tree of arrays with an axis of rows.
      reference: `(loss_fn, optimizer)`, where `loss_fn(params, batch)` is the mean over
        the batch and `optimizer` is what the step runs once in a window; or a function
        `(params, batch) -> new params`. For the truth, its program runs with each
        operation in float64, also those of a loss that casts to bfloat16; random
        numbers stay the same. Where that is impossible (a kernel, a `jax.Ref`), it is
        called with float64 arrays instead, and must not draw random numbers.
      call: `(step, params, opt_state, microbatch) -> (params, opt_state)`, for steps of
        another signature. For a Flax train state, which is then `opt_state`:

            def call(step, params, state, microbatch):
                state, _ = step(state, microbatch)
                return state.params, state

      once: call `step` once, with the whole batch, for steps that split it themselves.
        The microbatches must then be those of the step for a diagnosis to be right.
      join: from the microbatches to the batch; concatenates along axis 0 by default.
      gradient: `(params before, params after, opt_state after) -> gradient`, what the
        step accumulated. After Adam's first step, for example,
        `lambda before, after, state: jax.tree.map(
        lambda m: m / (1 - b1), optax.tree.get(state, "mu"))`.
      weights: (k,) the items of each microbatch, for the diagnosis; their rows by
        default.
      devices, alternatives: as for `coefficients`. A repeated dropout mask is seen only
        if gradients that have it are an alternative.
      factor: the bound.

    Returns:
      An `UpdateReport`. A step may be right by this measure and have a fault that its
      optimizer hides: Adam's first update does not depend on the scale of the gradient.
      A warning says so, unless `coefficients` finds the gradient right. Adam also turns
      rounding into whole steps where the true gradient is 0, as for the bias of a key
      in attention; there, a right step may fail. Check with SGD.

      It sees one window. A sum that is never reset, or a schedule that counts calls,
      shows in the next one: call it again with the parameters and the state after the
      first, and an optimizer without a state or a function as reference.

    Raises:
      AssertionError: the step is wrong.
      TypeError, ValueError: an argument is wrong. The message names it.

    >>> import accumax.testing, jax, optax
    >>> import jax.numpy as jnp
    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch @ params["w"] - 1) ** 2)
    >>> sgd = optax.sgd(1.0)
    >>> tx = accumax.accumulate(sgd, every=2)
    >>> params = {"w": jnp.array([1.0, 2.0, 3.0])}
    >>> batch = jax.random.normal(jax.random.key(0), (8, 3))
    >>> report = accumax.testing.check_update(
    ...     jax.jit(accumax.train_step(loss_fn, tx)),
    ...     params,
    ...     tx.init(params),
    ...     [batch[:4], batch[4:]],
    ...     reference=(loss_fn, sgd),
    ... )
    >>> report.passed
    True
    """
    if not isinstance(microbatches, Sequence) or not microbatches:
        raise ValueError(
            f"microbatches is {type(microbatches).__name__} of no microbatch or no "
            "list; expected those of one window, such as [batch[:4], batch[4:]]."
        )
    if not factor >= 1:
        raise ValueError(f"{factor=} must be at least 1: 2 times the big batch's own.")
    big = references.reference_of(reference)
    batch = (join or update.join)(microbatches)
    calls = [batch] if once else microbatches
    after, state = update.window(step, params, opt_state, calls, call or update.call)
    distances, own = update.distances(big, params, batch, after)
    found, notes, gradients = None, [], []
    unseen = sentences.UNSEEN.format(own=own) if own > sentences.VISIBLE else ""
    items = update.rows(microbatches) if weights is None else weights
    read = update.read_gradient(big, gradient, params, after, state, batch)
    if isinstance(read, str) or big.gradient is None:
        notes.append(str(read))
    elif sum(map(np.size, jax.tree.leaves(read.gradient))) < len(microbatches):
        notes.append("There is no diagnosis: fewer numbers than microbatches.")
    else:
        gradients = [big.gradient(params, x) for x in microbatches]
        of_gradients = functools.partial(
            coefficients,
            read.gradient,
            gradients,
            weights=items,
            tolerance=read.tolerance,
            devices=devices,
        )
        found = of_gradients(alternatives=alternatives)
        if found.fault not in ("none", *(alternatives or ())):
            moving = references.moving(big, params, microbatches, items)
            again = of_gradients(alternatives=moving)
            if again.fault in moving:
                found = dataclasses.replace(again, diagnosis=sentences.MOVING)
    report = UpdateReport(distances, factor, found)
    right = found is not None and found.fault == "none"
    hidden = ""
    if report.passed and not right and references.hides_scale(big, params, batch):
        hidden = (
            sentences.HIDDEN
            if found is None
            else sentences.HIDES.format(fault=found.fault)
        )
    elif found is not None and right != report.passed:
        far = references.coupled(big, params, batch, gradients, items)
        if far > sentences.ROUNDING:
            notes.append(sentences.COUPLED.format(far=far))
        elif weights is None:
            notes.append(sentences.DISAGREE)
    notes += filter(None, (hidden, unseen))
    report = dataclasses.replace(report, note="\n".join(notes))
    if not report.passed:
        raise AssertionError(f"The update is not the big batch's.\n{report}")
    for text in filter(None, (hidden, unseen)):
        warnings.warn(text, stacklevel=2)
    return report
