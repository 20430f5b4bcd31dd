"""How sure an allocation is: which schemes it would take if the sensitivities had come out a little differently.

The parametric bootstrap (Efron and Tibshirani 1993, chapter 6): every predicted loss is drawn anew around its measured
value with its standard error, and the same budget solved again. A group whose scheme changes in more than 1 of 20
resamples has none that the measurement tells from the others.

It assumes that errors are Gaussian and independent, of groups and of schemes. The same documents measure all of them,
so errors of neighbouring schemes go together, and the choice between these is surer than is said here. Where losses are
known document by document, `resampled` takes resamples of whole tables instead, which keeps all correlations.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from mpq.allocate.frontier import solve_frontier
from mpq.allocate.lagrangian import Lagrangian
from mpq.allocate.problem import Problem
from mpq.types import MpqError, Scheme

SURE = 0.95
EXACT_GROUPS = 32  # 200 exact solves of so many take 12 s of processor time; the relaxation of 300 groups 0.75 s


@dataclasses.dataclass(frozen=True, eq=False)
class Stability:
    """How often each scheme is chosen.

    Attributes:
      names: of the G groups.
      schemes: the S candidates.
      share: `float64[G, S]`, part of the resamples that choose the scheme; every row adds up to 1.
      chosen: `int64[G]`, the scheme that the measured losses themselves choose.
      num_resamples: how many.
      solver: of the resamples: `exact`, or `lagrangian` for many groups.
    """

    names: tuple[str, ...]
    schemes: tuple[Scheme, ...]
    share: np.ndarray
    chosen: np.ndarray
    num_resamples: int
    solver: str

    @property
    def confidence(self) -> np.ndarray:
        """`float64[G]`: part of the resamples that agree with the choice."""
        return self.share[np.arange(len(self.chosen)), self.chosen]

    @property
    def distinguishable(self) -> np.ndarray:
        """`bool[G]`: whether at least 95 % of the resamples agree with the choice."""
        return self.confidence >= SURE


def gaussian(problem: Problem, rng: np.random.Generator, num_resamples: int = 200) -> Iterator[np.ndarray]:
    """Resamples of the losses, each `float64[G, S]`, drawn from N(loss, variance).

    Raises:
      MpqError: a standard error is unknown.
    """
    if not problem.errors_known:
        raise MpqError(
            "the sensitivities have no standard errors, so no resamples can be drawn of them: one document says "
            "nothing about the spread between documents; measure on several"
        )
    spread = np.sqrt(np.where(problem.allowed, problem.variance, 0.0))
    center = np.where(problem.allowed, problem.loss, 0.0)
    for _ in range(num_resamples):
        yield rng.normal(center, spread)


def stability(
    problem: Problem, budget_bits: int, rng: np.random.Generator, num_resamples: int = 200, exact: bool | None = None
) -> Stability:
    """How often each scheme is chosen within `budget_bits`, over Gaussian resamples of the losses.

    Args:
      problem: its `variance` says how far resamples spread.
      budget_bits: limit of the size.
      rng: source of the resamples.
      num_resamples: 200 tell 95 % to about 1.5 %.
      exact: see `resampled`.

    Raises:
      MpqError: the budget is out of range, there are no resamples, or a standard error is unknown.
    """
    return resampled(problem, budget_bits, gaussian(problem, rng, num_resamples), exact)


def resampled(problem: Problem, budget_bits: int, losses: Iterable[np.ndarray], exact: bool | None = None) -> Stability:
    """How often each scheme is chosen within `budget_bits`, over given tables of losses.

    Args:
      problem: what the measured losses pose.
      budget_bits: limit of the size.
      losses: `float64[G, S]` each, such as means over documents drawn with replacement.
      exact: solve by the exact frontier, or else by the Lagrangian relaxation; None: exactly for up to 32 groups.

    Raises:
      MpqError: the budget is out of range, there are no resamples, or one is not finite or of another shape.
    """
    budget_bits = problem.check_budget(budget_bits)
    exact = len(problem.names) <= EXACT_GROUPS if exact is None else exact
    rows, count = np.arange(len(problem.names)), 0
    chosen, counts = _choose(problem, budget_bits, exact), np.zeros(problem.loss.shape)
    for loss in losses:
        counts[rows, _choose(dataclasses.replace(problem, loss=loss), budget_bits, exact)] += 1
        count += 1
    if not count:
        raise MpqError("there are no resamples: draw at least one, better 200")
    solver = "exact" if exact else Lagrangian.name
    return Stability(problem.names, problem.schemes, counts / count, chosen, count, solver)


def _choose(problem: Problem, budget_bits: int, exact: bool) -> np.ndarray:
    """`int64[G]`: the scheme of each group."""
    if exact:
        return solve_frontier(problem).choice_within(budget_bits)
    return problem.by_group(Lagrangian().solve(problem, budget_bits).choice)
