"""The knapsack with interactions: the best plan found, and how far from the optimum it can be at most.

    minimise   sum_g loss[g, x_g] + sum_{g<h} pairs[g, x_g, h, x_h]     within the size, with what is allowed

a quadratic multiple-choice knapsack, NP-hard in the strong sense (Kellerer, Pferschy, Pisinger 2004, chapter 12). The
steps: local search from the exact solution of the separable problem, and from a plan that is given; a lower bound by a
price of bits and moved pair terms (`minorant.py`), whose own knapsack gives one more start; branching of a limited
width, which closes small problems and lifts the bound of others; and where these leave a gap, a bound that sees all
pairs at once (`semidefinite.py`, and branching on it in `relaxed.py`), as a Gram's errors of many weights that partly
cancel need.

Cost: `O(G^2 S^2)` for each of 3 `iterations`; of the last bound `O((G S)^3)`.
Fails on: strong correlations among more groups and schemes than `relaxed.MOST_OPTIONS`: the plan is good, but the gap
is wide.
"""

import dataclasses

import numpy as np

from mpq.allocate.frontier import solve_frontier
from mpq.allocate.hull import group_hulls
from mpq.allocate.lagrangian import lower_bound
from mpq.allocate.minorant import branch, maximise
from mpq.allocate.pairs import Pairs
from mpq.allocate.problem import Problem
from mpq.allocate.relaxed import semidefinite_bound
from mpq.types import Allocation, Status

NARROW = 0.01
"""A gap, relative to the loss, below which no dearer bound is looked for."""


def solve_quadratic(
    problem: Problem,
    interactions: np.ndarray,
    budget_bits: int,
    *,
    start: Allocation | None = None,
    iterations: int = 80,
    width: int = 4096,
) -> Allocation:
    """A plan of small loss with interactions, within `budget_bits`; deterministic.

    Args:
      problem: losses of single weights, sizes, and what is allowed.
      interactions: `float64[L, S, L, S]` nats, symmetric; weights in the order of the table: what
        `InteractionTable.matrix` gives. Added over ordered pairs of different weights.
      budget_bits: limit of the size.
      start: a plan within the budget to search from as well, such as that of a tighter budget: the result is no worse.
      iterations: most at each of the bound's three temperatures; three times as many of the semidefinite bound's.
      width: most partial plans kept in branching.

    Returns:
      `loss` and `lower_bound` are with interactions; OPTIMAL where they meet, up to rounding.

    Raises:
      MpqError: the budget is out of range (`Problem.check_budget`), `start` is no plan of this problem or exceeds the
        budget, or `Pairs.of` refuses the interactions.
    """
    budget_bits = problem.check_budget(budget_bits)
    pairs = Pairs.of(problem, interactions, budget_bits)
    alone = dataclasses.replace(problem, loss=np.where(problem.allowed, pairs.loss, 0.0))
    starts = [solve_frontier(alone).choice_within(budget_bits)]
    if start is not None:
        given = problem.by_group(start.choice)
        problem.allocation(given, budget_bits=budget_bits, lower_bound=0, solver="the given start")  # or it raises
        starts.append(given)
    best = min((pairs.descend(choice) for choice in starts), key=pairs.energy)
    minorant = maximise(pairs, _price(alone, budget_bits), pairs.energy(best), iterations)
    separable = dataclasses.replace(problem, loss=minorant.finite_theta, allowed=minorant.allowed)
    reach = min(budget_bits, separable.max_bits)
    root = separable.to_loss(lower_bound(separable, reach)) + minorant.rest_bound
    best = min(best, pairs.descend(solve_frontier(separable).choice_within(reach)), key=pairs.energy)
    best, bound = branch(minorant, pairs, best, width)
    loss = pairs.energy(best)
    bound = max(root, bound)
    if bound < (enough := loss - NARROW * abs(loss)):
        bound = max(bound, semidefinite_bound(pairs, minorant, loss, enough=enough, iterations=3 * iterations))
    met = bound >= loss - pairs.rounding
    plan = problem.allocation(best, budget_bits=budget_bits, lower_bound=0, solver="quadratic")
    return dataclasses.replace(
        plan,
        loss=loss,
        lower_bound=loss if met else bound,
        status=Status.OPTIMAL if met else Status.FEASIBLE,
    )


def _price(problem: Problem, budget_bits: int) -> float:
    """Nats per bit at which the linear relaxation without pairs meets the budget."""
    fixed, exponent = problem.fixed_point
    hulls = group_hulls(problem.size_bits, fixed, problem.allowed)
    cut = hulls.cut(budget_bits - problem.min_bits)
    return 0.0 if cut is None else float(np.ldexp(hulls.slope[cut], exponent))
