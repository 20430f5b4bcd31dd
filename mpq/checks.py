"""Self-checks of a finished run. Each is a fault that a quantization tool has shipped; here it ends in one sentence.

Other faults cannot come this far: what is not finite is refused where it arises, sets of data that overlap when they
are made, damaged stage files when they are read, and an export that is not the plan by `results.check_export`.

Cost: one pass over the calibration set as far as the first multiplication, the rest without running the model.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mpq.allocate import Problem
from mpq.artifacts import Plan
from mpq.calibrate import mean_squares
from mpq.formats import parse_scheme
from mpq.hand_out import HandOut
from mpq.inputs import Dataset
from mpq.pipeline import Run
from mpq.quantize import Candidates
from mpq.sensitivity.base import by_size
from mpq.trace import Trace
from mpq.types import LayerStats, MpqError, Params, QTensor, Scheme, SensitivityTable, WeightSpec


def check(hand_out: HandOut) -> list[str]:
    """Check a run whose stages are finished; the names of the checks that were made.

    Raises:
      MpqError: the first one that fails.
    """
    run = hand_out.run
    weights, config = run.traced.weights, run.config
    schemes = run.frontiers[config.method].problem.schemes
    smallest = schemes[by_size(weights, schemes)[0]]
    require_counted_once(run.traced)
    require_executed(weights, run.stats)
    tables = [(metric, config.method, table) for metric, table in run.tables.items()]
    tables += [(config.compare_by, m, table) for m, table in run.allocation_tables.items() if m != config.method]
    for metric, method, table in tables:
        require_current(table, run, metric, method)
    require_orderless(run.traced, run.model.params, run.divided[1], run.stats, config.batch_size)
    require_calibrated(run.candidates[config.method], weights, run.stats, smallest)
    for method, table in run.allocation_tables.items():
        require_effect(table, run.candidates[method])
    for method, plans in run.separable.items():
        for budget, plan in plans.items():
            require_groups(plan, weights)
            require_groups(run.mixed[method][budget], weights)
            require_predicted(plan, run.frontiers[method].problem)
            require_budget_used(run.frontiers[method].problem, plan.choices, run.bits(budget), plan.name)
    plan, method = hand_out.plan, hand_out.method
    require_schemes(plan, hand_out.qtensors(plan, method), weights)
    for which in ("selection", "test"):
        if hand_out.scores(plan, method, which).data_digest != run.sets[which].digest:
            raise MpqError(
                f"the scores of {plan.name} in {run.folder} are stale: they are not of this config's {which} set; "
                "remove the folder and run again"
            )
    return [
        "weights counted once",
        "weights executed",
        "order of the data without effect",
        "calibration used",
        "stages of this run",
        "losses measured",
        "groups kept",
        "budget used",
        "schemes kept",
        "size on disk",
    ]


def require_counted_once(traced: Trace) -> None:
    """No value of a parameter is in two weights, and no multiply-accumulate is counted twice: a tied weight is one.

    Raises:
      MpqError: names the parameter.
    """
    for param, struct in traced.params.items():
        parts = [spec for spec in traced.weights if spec.param == param]
        values = sum(spec.size for spec in parts)
        if values > math.prod(struct.shape):
            raise MpqError(
                f"parameter {param} of {math.prod(struct.shape)} values is counted as {values}, in "
                f"{len(parts)} weights: a tied weight has several uses and one size; trace the model again"
            )
    for spec in traced.weights:
        macs = sum(site.use.macs for site in traced.sites if site.spec.path == spec.path)
        if spec.macs != macs:
            raise MpqError(
                f"weight {spec.path} is counted with {spec.macs} multiply-accumulates and its uses make {macs}: "
                "trace the model again"
            )


def require_executed(weights: Sequence[WeightSpec], stats: Mapping[str, LayerStats]) -> None:
    """Every weight that is multiplied saw an input in calibration, every expert of a stack too.

    A weight without any gets no loss, and an allocator that believes it gives it the fewest bits.

    Raises:
      MpqError: names the weight.
    """
    for spec in weights:
        if spec.path not in stats:
            continue  # a lookup alone
        for number, absmax in enumerate(stats[spec.path].absmax):
            if not absmax.any():
                which = f"expert {number} of {spec.path}" if spec.batch > 1 else f"weight {spec.path}"
                raise MpqError(
                    f"{which} saw no input but zeros in calibration, so that nothing is known of it: calibrate on more "
                    "or other data"
                )


def require_orderless(
    traced: Trace, params: Params, data: Dataset, stats: Mapping[str, LayerStats], batch_size: int
) -> None:
    """Statistics depend on the calibration set alone, not on the order and the batches in which it was read.

    Computed again from the last window to the first, in other batches, for one weight: the first that is multiplied.

    Raises:
      MpqError: they differ by more than rounding.
    """
    multiplied = [spec for spec in traced.weights if spec.path in stats and spec.batch == len(spec.uses) == 1]
    if not multiplied:
        return
    spec = multiplied[0]
    found = np.diagonal(stats[spec.path].gram[0])
    expected = mean_squares(traced, params, data, spec, 1 + batch_size // 2)
    # Both are sums of squares, added in float32 within a batch: off by 6e-8 a term at most, and by far less together.
    if np.abs(found - expected).sum() > 1e-3 * expected.sum():
        off = np.abs(found - expected).sum() / expected.sum()
        raise MpqError(
            f"the statistics of {spec.path} are off by {100 * off:.3g} % when the calibration set is read backwards "
            "and in other batches: they are of other data, or weigh the windows by their place; calibrate again"
        )


def require_calibrated(
    candidates: Candidates, weights: Sequence[WeightSpec], stats: Mapping[str, LayerStats], scheme: Scheme
) -> None:
    """A rounding algorithm that uses statistics gives other weights with them than without.

    Raises:
      MpqError: every weight is the same.
    """
    measured = [spec for spec in weights if spec.path in stats]
    if not candidates.quantizer.data_aware or not measured:
        return
    if all(candidates.ignores_statistics(spec, scheme) for spec in measured):
        raise MpqError(
            f"calibration changed nothing: {candidates.quantizer.name} rounds all {len(measured)} weights to {scheme} "
            "as it does without statistics; calibrate on data that the model was made for"
        )


def require_current(table: SensitivityTable, run: Run, metric: str, method: str) -> None:
    """A table was made from what this run's config asks for, not kept from another.

    Raises:
      MpqError: says what differs.
    """
    made_from = {
        "model": (table.model_digest, run.model.digest),
        "data": (table.data_digest, run.sensitivity_data(metric).digest),
        "rounding algorithm": (table.quantizer, method),
        "schemes": ([*map(str, table.schemes)], [str(parse_scheme(text)) for text in run.config.schemes]),
        "weights": ([w.path for w in table.weights], [w.path for w in run.traced.weights]),
    }
    for what, (found, wanted) in made_from.items():
        if found != wanted:
            raise MpqError(
                f"the sensitivities by {metric} in {run.folder} are stale: they were made from other {what} than this "
                "config asks for; remove the folder and run again"
            )


def require_predicted(plan: Plan, problem: Problem) -> None:
    """A solution predicts what the table says of its choices, so that both are of the same run.

    Raises:
      MpqError: gives both numbers.
    """
    assert plan.prediction is not None  # it was solved
    predicted = plan.prediction["predicted_kl"]
    summed = problem.to_loss(problem.evaluate(problem.by_group(plan.choices))[1])
    if predicted != summed:
        raise MpqError(
            f"plan {plan.name} is stale: it predicts a loss of {predicted:.6g}, and by this run's sensitivities its "
            f"choices lose {summed:.6g}; remove the folder and run again"
        )


def require_schemes(plan: Plan, qtensors: Mapping[str, QTensor], weights: Sequence[WeightSpec]) -> None:
    """Every weight is stored under the scheme that the plan gives it, with codes and scales of that scheme's number.

    A scheme that does not fit a weight must not become another, as a K-quant of llama.cpp does where a row is no
    multiple of 256.

    Raises:
      MpqError: names the weight and both schemes.
    """
    for spec in weights:
        wanted, q = plan.choices[spec.path], qtensors[spec.path]
        if q.scheme != wanted:
            raise MpqError(
                f"plan {plan.name} gives {spec.path} of {spec.k} rows {wanted}, and it is stored as {q.scheme}: choose "
                "a scheme that fits it"
            )
        stored = {f.name: getattr(q, f.name) for f in dataclasses.fields(q) if f.name != "scheme"}
        shapes = {name: array.shape for name, array in stored.items() if array is not None}
        integers = (wanted.num_groups(spec.k), spec.n)
        shape = {"qvalue": (spec.k, spec.n), "tensor_scale": (1, 1), "sub_scale": integers, "sub_minimum": integers}
        shape["codebook"] = (1 << wanted.format.bits, 1)
        groups = wanted.scale_shape(spec.k, spec.n)
        expected = {name: (spec.batch, *shape.get(name, groups)) for name in wanted.part_bits(spec.k, spec.n)}
        low, high = float(q.qvalue.min()), float(q.qvalue.max())
        inside = not wanted.has_scale or wanted.format.min_qvalue <= low <= high <= wanted.format.max_qvalue
        if shapes != expected or not inside:
            raise MpqError(
                f"plan {plan.name} gives {spec.path} {wanted}, and what is stored is another scheme's: codes from "
                f"{low:g} to {high:g} in arrays of {shapes} instead of {expected}; choose another rounding algorithm"
            )


def require_effect(table: SensitivityTable, candidates: Candidates) -> None:
    """A weight that is changed changes what the model computes.

    Raises:
      MpqError: names a weight that has a loss of exactly zero under every scheme, also where it is rounded.
    """
    for spec, losses in zip(table.weights, table.loss_increase, strict=True):
        if losses.any():
            continue
        if any(candidates.squared_error(spec, scheme) for scheme in table.schemes):
            raise MpqError(
                f"weight {spec.path} changes nothing that counts, however it is rounded: it may not be used on these "
                "data; measure on others"
            )


def require_groups(plan: Plan, weights: Sequence[WeightSpec]) -> None:
    """Weights that read the same input have one scheme.

    Raises:
      MpqError: names two that have not.
    """
    first: dict[str, WeightSpec] = {}
    for spec in weights:
        leader = first.setdefault(spec.group, spec)
        if plan.choices[leader.path] != plan.choices[spec.path]:
            raise MpqError(
                f"plan {plan.name} gives {leader.path} {plan.choices[leader.path]} and {spec.path}, which is fused "
                f"with it, {plan.choices[spec.path]}: solve it again"
            )


def require_budget_used(problem: Problem, choice: Mapping[str, Scheme], budget_bits: int, name: str) -> None:
    """A solution keeps its budget, and no change of one group or of two that fits would lower its predicted loss.

    Raises:
      MpqError: names the change, or the bits above the budget.
    """
    index, rows = problem.by_group(choice), np.arange(len(problem.names))
    size = problem.evaluate(index)[0]
    if size > budget_bits:
        raise MpqError(f"plan {name} takes {size - budget_bits} bits more than its budget: solve it again")
    room, loss = budget_bits - size, problem.fixed_point[0]
    extra = problem.size_bits - problem.size_bits[rows, index][:, None]
    gain = np.where(problem.allowed, loss[rows, index][:, None] - loss, -(1 << 61))  # less than any two gains together
    for group, option in np.argwhere((extra <= room) & (gain > 0))[:1]:
        raise MpqError(
            f"plan {name} leaves {room} bits unused although {problem.names[group]} at {problem.schemes[option]} fits "
            f"and loses less: solve it again"
        )
    for group, option in np.argwhere(problem.allowed):
        others = slice(group + 1, None)
        fits = extra[others] + extra[group, option] <= room
        for other, partner in np.argwhere(fits & (gain[others] + gain[group, option] > 0))[:1]:
            raise MpqError(
                f"plan {name} is not the best: {problem.names[group]} at {problem.schemes[option]} and "
                f"{problem.names[group + 1 + other]} at {problem.schemes[partner]} fit together and lose less: "
                "solve it again with another solver"
            )
