"""Self-checks of a finished run. Each is a fault that a quantization tool has shipped; here it ends in one sentence.

Other faults cannot come this far: what is not finite is refused where it arises, sets of data that overlap when they
are made, stage files of other inputs when they are read, and an export that is not the plan by `results.check_export`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mpq.allocate import Problem
from mpq.artifacts import Plan
from mpq.pipeline import Run, budget_bits
from mpq.quantize import Candidates
from mpq.types import LayerStats, MpqError, Scheme, SensitivityTable, WeightSpec


def check(run: Run) -> list[str]:
    """Check a run whose stages are finished; the names of the checks that were made.

    Raises:
      MpqError: the first one that fails.
    """
    weights, config = run.traced.weights, run.config
    smallest = min(run.frontiers[config.method].problem.schemes, key=lambda s: sum(w.size_bits(s) for w in weights))
    require_executed(weights, run.stats)
    require_calibrated(run.candidates[config.method], weights, run.stats, smallest)
    for method, table in run.allocation_tables.items():
        require_effect(table, run.candidates[method])
    for method, plans in run.separable.items():
        for budget, plan in plans.items():
            require_groups(plan, weights)
            require_groups(run.mixed[method][budget], weights)
            limit = budget_bits(budget, run.model, run.traced, run.uniform)
            require_budget_used(run.frontiers[method].problem, plan.choices, limit, plan.name)
    return ["weights executed", "calibration used", "losses measured", "groups kept", "budget used", "size on disk"]


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
    """A solution keeps its budget, and no single change that fits would lower its predicted loss.

    Raises:
      MpqError: names the change, or the bits above the budget.
    """
    index, rows = problem.by_group(choice), np.arange(len(problem.names))
    size = problem.evaluate(index)[0]
    if size > budget_bits:
        raise MpqError(f"plan {name} takes {size - budget_bits} bits more than its budget: solve it again")
    room = budget_bits - size
    loss = problem.fixed_point[0]
    fits = problem.allowed & (problem.size_bits - problem.size_bits[rows, index][:, None] <= room)
    better = np.argwhere(fits & (loss < loss[rows, index][:, None]))
    for group, option in better[:1]:
        raise MpqError(
            f"plan {name} leaves {room} bits unused although {problem.names[group]} at {problem.schemes[option]} fits "
            f"and loses less: solve it again"
        )
