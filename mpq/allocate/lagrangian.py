"""Lagrangian relaxation for one budget: a certified lower bound and a feasible allocation, for very many groups.

For any price p >= 0 per bit,  sum_g min_o (loss[g, o] + p * size[g, o]) - p * budget  is at most the optimum (Everett
1963). The best price is the slope of the hull segment at which the budget cuts the linear relaxation (Sinha and
Zoltners 1979). The allocation takes the segments before the cut, then what still fits.

Differences from the papers: the bound is computed in exact integers and rounded up to the fixed-point grid, so it
holds to the last bit.
"""

import dataclasses

import numpy as np

from mpq.allocate.hull import Segments, group_hulls
from mpq.allocate.problem import Problem
from mpq.types import Allocation


@dataclasses.dataclass(frozen=True)
class Lagrangian:
    """Hull greedy and its bound. `Allocation.status` is OPTIMAL if they meet, else FEASIBLE with a `gap`.

    Attributes:
      rounds: passes over the segments after the cut, and most single exchanges after that.
    """

    rounds: int = 256
    name: str = dataclasses.field(default="lagrangian", init=False)

    def solve(self, problem: Problem, budget_bits: int) -> Allocation:
        """A good allocation within `budget_bits`.

        Raises:
          MpqError: the budget is out of range (`Problem.check_budget`).
        """
        budget_bits = problem.check_budget(budget_bits)
        hulls = group_hulls(problem.size_bits, problem.fixed_point[0], problem.allowed)
        choice = _fill(problem, _greedy(problem, hulls, budget_bits, self.rounds), budget_bits, self.rounds)
        bound = _bound(problem, hulls, budget_bits)
        return problem.allocation(choice, budget_bits=budget_bits, lower_bound=bound, solver=self.name)


def lower_bound(problem: Problem, budget_bits: int) -> int:
    """Lower bound on the predicted loss of every allocation within `budget_bits`, in fixed point (`Problem.to_loss`).

    Raises:
      MpqError: the budget is out of range (`Problem.check_budget`).
    """
    budget_bits = problem.check_budget(budget_bits)
    return _bound(problem, group_hulls(problem.size_bits, problem.fixed_point[0], problem.allowed), budget_bits)


def _bound(problem: Problem, hulls: Segments, budget_bits: int) -> int:
    cut = hulls.cut(budget_bits - problem.min_bits)
    if cut is None:
        fixed = problem.fixed_point[0]
        return int(np.where(problem.allowed, fixed, np.iinfo(np.int64).max).min(axis=1).sum())
    drop, width = int(hulls.drop[cut]), int(hulls.width[cut])
    return -((budget_bits * drop - _least_priced(problem, drop, width)) // width)


def _least_priced(problem: Problem, drop: int, width: int) -> int:
    """Sum over groups of the least `loss * width + size * drop`, exactly: the price is the fraction drop / width.

    That exceeds 64 bits, and Python's integers are slow: floats single out the few options that can be the least.
    """
    fixed, size = problem.fixed_point[0], problem.size_bits
    paid = size * (drop / width)
    value = np.where(problem.allowed, fixed + paid, np.inf)
    # Conversions, quotient, product and sum each round by 2^-53 of the terms; two options are compared.
    slack = 2.0**-49 * np.where(problem.allowed, np.abs(fixed) + paid, 0.0).max(axis=1)
    row, option = np.nonzero(value <= (value.min(axis=1) + slack)[:, None])
    priced = fixed[row, option].astype(object) * width + size[row, option].astype(object) * drop
    return int(np.minimum.reduceat(priced, np.searchsorted(row, np.arange(len(fixed)))).sum())


def _greedy(problem: Problem, hulls: Segments, budget_bits: int, rounds: int) -> np.ndarray:
    """`int64[G]`: hull segments by slope while they fit; a group whose next one does not fit stops there."""
    choice = hulls.start.copy()
    order = np.argsort(-hulls.slope, kind="stable")
    room = budget_bits - problem.min_bits
    for _ in range(rounds):
        fits = int(np.searchsorted(np.cumsum(hulls.width[order]), room, side="right"))
        taken = order[:fits]
        choice[hulls.group[taken]] = hulls.option[taken]  # the last of a group wins, as segments come by size
        room -= int(hulls.width[taken].sum())
        if fits == len(order):
            break
        order = order[fits:]
        position = np.arange(len(order))
        too_wide = hulls.width[order] > room
        stop = np.full(len(choice), len(order))
        np.minimum.at(stop, hulls.group[order[too_wide]], position[too_wide])
        order = order[position < stop[hulls.group[order]]]
    return choice


def _fill(problem: Problem, choice: np.ndarray, budget_bits: int, rounds: int) -> np.ndarray:
    """Changes one group at a time, to any option that fits and saves most loss, until none is left."""
    fixed, size, rows = problem.fixed_point[0], problem.size_bits, np.arange(len(choice))
    extra, gain = size - size[rows, choice][:, None], fixed[rows, choice][:, None] - fixed
    gain[~problem.allowed] = 0
    room = budget_bits - int(size[rows, choice].sum())
    for _ in range(rounds):
        useful = np.where(extra <= room, gain, 0)
        row, option = np.unravel_index(useful.argmax(), useful.shape)
        if useful[row, option] <= 0:
            break
        choice[row] = option
        room -= int(extra[row, option])
        extra[row] -= extra[row, option]
        gain[row, problem.allowed[row]] -= gain[row, option]
    return choice
