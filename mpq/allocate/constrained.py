"""Several limits at once: mixed-integer programming by HiGHS (Huangfu and Hall 2018), and an exact check of its answer.

    minimise   sum_g loss[g, x_g]     subject to   sum_g cost_c[g, x_g] <= limit_c   for the size and every constraint c

Differences from a plain call of the solver, which works in floats with absolute tolerances. Losses and costs are
taken relative to the least of each group and scaled, so that the tolerances (1e-6 of an objective whose largest
coefficient is 2^23; 1e-6 of a row whose largest is at most 2^20) are far below a step of either. The choice is checked
in integers; if a tolerance let it through, the limit is lowered by the excess and the problem solved again. The lower
bound is the dual bound of the first solve, taken as met where it is within HiGHS's own absolute gap; it never falls
behind that of the Lagrangian relaxation of the size alone. It fails by time: then the best choice found comes with its
gap.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from mpq.allocate.constraints import Constraint
from mpq.allocate.lagrangian import lower_bound
from mpq.allocate.problem import Problem
from mpq.types import Allocation, MpqError

LARGEST_LOSS = 2.0**23
COST_BITS = 20
ABSOLUTE_GAP = 2e-6  # HiGHS stops within 1e-6; sums of coefficients round as well
INFEASIBLE = 2


def solve_constrained(
    problem: Problem, budget_bits: int, constraints: Sequence[Constraint], *, time_limit: float = 60.0
) -> Allocation:
    """The allocation of least predicted loss within `budget_bits` and every constraint.

    Args:
      problem: what to solve.
      budget_bits: limit of the size.
      constraints: the others.
      time_limit: seconds; after them the best found counts.

    Raises:
      MpqError: the budget is out of range, a constraint cannot be met alone or all of them together, or nothing was
        found in time.
    """
    budget_bits = problem.check_budget(budget_bits)
    for constraint in constraints:
        constraint.check(problem)
    limits = [Constraint("size", "bits", problem.size_bits, budget_bits), *constraints]
    program = _Program(problem, limits)
    room = [limit.limit - limit.least(problem) for limit in limits]
    result = program.solve(room, time_limit)
    if result.status == INFEASIBLE:
        each = ", ".join(f"{limit.name} {limit.least(problem):,} {limit.unit}" for limit in limits)
        raise MpqError(
            f"these limits cannot be met together, though each can alone (smallest reachable: {each}): raise one"
        )
    bound = program.bound(result.mip_dual_bound)
    while result.x is not None:
        choice = program.choice(result.x)
        excess = [limit.total(choice) - limit.limit for limit in limits]
        if max(excess) <= 0:
            break
        room = [space - max(over, 0) for space, over in zip(room, excess, strict=True)]
        result = program.solve(room, time_limit)
    else:
        raise MpqError(f"no allocation was found in {time_limit:g} s: allow more time, or raise {limits[-1].name}")
    _, fixed, _ = problem.evaluate(choice)
    met = fixed - bound <= ABSOLUTE_GAP * program.step
    bound = fixed if met else max(bound, lower_bound(problem, budget_bits))
    return problem.allocation(choice, budget_bits=budget_bits, lower_bound=bound, solver="highs")


class _Program:
    """One column for every allowed pair of group and scheme."""

    def __init__(self, problem: Problem, limits: Sequence[Constraint]) -> None:
        self.group, self.option = np.nonzero(problem.allowed)
        fixed = np.where(problem.allowed, problem.fixed_point[0], np.iinfo(np.int64).max)
        self.least = sum(fixed.min(axis=1).tolist())
        loss = (fixed - fixed.min(axis=1, keepdims=True))[self.group, self.option]
        self.step = max(int(loss.max()), 1) / LARGEST_LOSS  # fixed-point steps in one unit of the objective
        self.loss = loss / self.step
        self.costs = [self._above_least(problem, limit.cost) for limit in limits]
        columns = np.arange(len(self.group))
        self.one_each = csr_array((np.ones(len(columns)), (self.group, columns)))

    def _above_least(self, problem: Problem, cost: np.ndarray) -> np.ndarray:
        least = np.where(problem.allowed, cost, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
        return (cost - least)[self.group, self.option]

    def solve(self, room: Sequence[int], time_limit: float) -> Any:
        """HiGHS's answer where each cost may exceed its least by `room`."""
        upper: Any = np.ones(len(self.group))
        rows: list[np.ndarray] = []
        ends: Any = []
        for cost, space in zip(self.costs, room, strict=True):
            upper[cost > space] = 0.0  # alone too much; what is left has coefficients up to the room
            kept = np.where(cost > space, 0, cost)
            unit = int(np.gcd.reduce(kept)) or 1
            scale = 2.0 ** -max(int(kept.max() // unit).bit_length() - COST_BITS, 0)
            rows.append(kept // unit * scale)
            ends.append(space // unit * scale)
        return milp(
            self.loss,
            constraints=[LinearConstraint(self.one_each, 1, 1), LinearConstraint(np.array(rows), -np.inf, ends)],
            integrality=np.ones(len(self.loss)),
            bounds=Bounds(0, upper),
            options={"mip_rel_gap": 0.0, "time_limit": time_limit},
        )

    def choice(self, x: np.ndarray) -> np.ndarray:
        """`int64[G]`: the option of the largest variable of each group."""
        order = np.lexsort((x, self.group))
        last = np.searchsorted(self.group[order], np.arange(self.group[-1] + 1), side="right") - 1
        return self.option[order[last]]

    def bound(self, objective: float | None) -> int:
        """Lower bound in fixed point; none is known without an objective."""
        if objective is None or not np.isfinite(objective):
            return self.least
        return self.least + int(np.floor(objective * self.step))
