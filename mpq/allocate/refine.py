"""Local search on the measured loss of whole plans, from the exact solution of a table: what no sum can see.

A table adds up the losses of single weights. Where errors of different weights correlate, as in convolutional networks
and below about 4 bits, the sum misjudges plans. Here plans are measured, in rounds around the current plan x:

    margins     m[g, o] = L(x with group g at o) - L(x)   for the next smaller and next larger option of every group
    proposal    the knapsack on x + m, at the same budget: the best exchange of bits if margins added up
    step        the proposal, the better half of its changes, a quarter, ... are measured; the best is taken

until no step improves. Margins hold all interactions with the rest of the plan; what they neglect are those between
the changes of one step, which is why shorter steps are tried. It is the knapsack's analogue of sequential linear
programming with a line search (Nocedal and Wright 2006, *Numerical Optimization*, section 18.3).

Cost: for every round two measurements a group, and one for every halving.
Fails on: plans whose loss falls only when several groups change at once; few data, whose noise it fits: measure on
data that no later stage judges by.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpq.allocate.frontier import solve_frontier
from mpq.allocate.problem import Problem
from mpq.types import Allocation, Scheme, Status

Measure = Callable[[Mapping[str, Scheme]], float]
"""Path -> scheme, to the measured loss of that plan, nats per output."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One round: the measured loss after it, how many groups it changed, and plans measured for it."""

    loss: float
    changed: int
    measured: int


@dataclasses.dataclass(frozen=True, eq=False)
class Refined:
    """A plan, its measured loss, and how it was found.

    Attributes:
      allocation: `loss` is the measured one, on the data that was searched on; `lower_bound` is that of the table.
      start: measured loss of the plan that the search began with.
      steps: in order; the last one found nothing better, unless the rounds ran out.
    """

    allocation: Allocation
    start: float
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Refine:
    """The search.

    Attributes:
      rounds: most rounds.
      reach: how many options up and down, by size, a group may move in one round.
    """

    rounds: int = 4
    reach: int = 1
    name: str = dataclasses.field(default="refine", init=False)

    def __call__(self, problem: Problem, start: Allocation, measure: Measure) -> Refined:
        """A plan within the budget of `start` whose measured loss is no larger.

        Args:
          problem: what `start` was solved from; its losses play no role, its sizes and what it allows do.
          start: where the search begins.
          measure: measured losses. Called more than once with the same plan only across rounds.

        Raises:
          MpqError: `start` is no plan of this problem.
        """
        x = problem.by_group(start.choice)
        first = best = measure(problem.by_path(x))
        steps = []
        for _ in range(self.rounds):
            margins, allowed = self._margins(problem, x, best, measure)
            measured = int(allowed.sum()) - len(x)
            taken = x
            for proposal in _proposals(problem, x, margins, allowed, start.budget_bits):
                loss = measure(problem.by_path(proposal))
                measured += 1
                if loss < best:
                    best, taken = loss, proposal
            steps.append(Step(best, int((taken != x).sum()), measured))
            if taken is x:
                break
            x = taken
        plan = problem.allocation(x, budget_bits=start.budget_bits, lower_bound=0, solver=self.name)
        # The loss is measured, and the bound is the table's.
        plan = dataclasses.replace(plan, loss=best, lower_bound=start.lower_bound, status=Status.FEASIBLE)
        return Refined(plan, first, tuple(steps))

    def _margins(self, problem: Problem, x: np.ndarray, loss: float, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        """`float64[G, S]` margins, and `bool[G, S]` where they were measured, the current options included."""
        margins, allowed = np.zeros(problem.loss.shape), np.zeros(problem.loss.shape, np.bool_)
        for group, current in enumerate(x):
            options = np.flatnonzero(problem.allowed[group])
            order = options[np.argsort(problem.size_bits[group, options], kind="stable")]
            place = int(np.flatnonzero(order == current)[0])
            for option in order[max(0, place - self.reach) : place + self.reach + 1]:
                allowed[group, option] = True
                if option != current:
                    changed = x.copy()
                    changed[group] = option
                    margins[group, option] = measure(problem.by_path(changed)) - loss
        return margins, allowed


def _proposals(
    problem: Problem, x: np.ndarray, margins: np.ndarray, allowed: np.ndarray, budget_bits: int
) -> Sequence[np.ndarray]:
    """Plans with ever fewer changes: all that the margins advise, the better half, and so on down to one exchange."""
    proposals: list[np.ndarray] = []
    rows = np.arange(len(x))
    while True:
        local = dataclasses.replace(problem, loss=margins, variance=np.zeros_like(margins), allowed=allowed)
        proposal = solve_frontier(local).choice_within(budget_bits)
        changed = np.flatnonzero(proposal != x)
        if not len(changed) or any((proposal == other).all() for other in proposals):
            return proposals
        proposals.append(proposal)
        if len(changed) == 1:
            return proposals
        # A change is worth its margin and the bits it takes or frees, at the price that parts takers from givers.
        size = problem.size_bits[rows, proposal] - problem.size_bits[rows, x]
        gain, extra = -margins[rows, proposal][changed], size[changed]
        worth = gain - _price(gain, extra) * extra
        keep = changed[np.argsort(-worth, kind="stable")[: len(changed) // 2]]
        allowed = allowed.copy()
        frozen = np.setdiff1d(changed, keep)
        allowed[frozen] = False
        allowed[frozen, x[frozen]] = True


def _price(gain: np.ndarray, extra: np.ndarray) -> float:
    """Nats per bit: between the least that a group gains for a bit it takes and the most that one loses for one given.

    Args:
      gain: loss saved by each change; negative where a change costs.
      extra: bits that it takes; negative where it frees some.
    """
    takers, givers = extra > 0, extra < 0
    ends = [(gain[takers] / extra[takers]).min()] if takers.any() else []
    ends += [(gain[givers] / extra[givers]).max()] if givers.any() else []
    return max(0.0, float(np.mean(ends))) if ends else 0.0
