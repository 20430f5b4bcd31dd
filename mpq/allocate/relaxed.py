"""Branching on the semidefinite relaxation: a bound for all plans is the least of the bounds of its parts.

One group after the other is fixed, best bound first, at the group in which the relaxed plan is least decided; a part
begins where the whole stood, without the options that are in no plan better than the known one. With its options fewer
and its bits fixed, the relaxation of a part is much tighter than that of the whole.
"""

import heapq

import numpy as np
from scipy.special import entr
from threadpoolctl import threadpool_limits

from mpq.allocate.minorant import Minorant
from mpq.allocate.pairs import Pairs
from mpq.allocate.semidefinite import Bound, Dual, Relaxation
from mpq.progress import track

TEMPERATURES = (0.03, 0.006, 0.0015, 0.0004)
"""As `Relaxation.maximise` says; a part begins at the last but one."""
MOST_OPTIONS = 800
"""Of all groups together: an iteration beyond takes more than a few tenths of a second."""
PART = 3
"""A part takes this many times fewer iterations than the whole."""
SPENT = 4.0
"""Most that all parts cost, in terms of the whole."""


def semidefinite_bound(pairs: Pairs, minorant: Minorant, known: float, *, enough: float, iterations: int) -> float:
    """A lower bound on E of every plan within the budget, at most `known`.

    The linear algebra runs on one thread: matrices are small, and the bound is the same on any number of processors.

    Args:
      pairs: the problem.
      minorant: gives the price of bits to begin with, and the options that may be in a plan better than the known one.
      known: E of a plan within the budget.
      enough: a bound that ends the search.
      iterations: most at each temperature.

    Returns:
      nats; minus infinity where there are more than `MOST_OPTIONS` options.
    """
    if np.count_nonzero(minorant.allowed) > MOST_OPTIONS:
        return -np.inf
    with threadpool_limits(1, user_api="blas"):
        return min(_Search(pairs, known, min(enough, known), iterations).run(minorant), known)


class _Search:
    """Parts of the problem, by their bound.

    Attributes:
      parts: a heap of bounds, each with its number and where it stands.
      single: the least E of parts that were a single plan.
      count: parts so far; spent: what they cost, in products of their eigendecompositions.
    """

    def __init__(self, pairs: Pairs, known: float, enough: float, iterations: int) -> None:
        self.pairs, self.known, self.enough, self.iterations = pairs, known, enough, iterations
        self.parts: list[tuple[float, int, Bound]] = []
        self.single = np.inf
        self.count, self.spent = 0, 0

    def run(self, minorant: Minorant) -> float:
        """The bound of all."""
        price = minorant.price * self.pairs.span / self.pairs.unit(self.known)
        dual = Dual.zero(int(minorant.allowed.sum()), price)
        self.add(minorant.allowed, dual, TEMPERATURES, self.iterations, -np.inf)
        if self.worth():
            least, _, bound = self.parts.pop()
            self.add(*self.open(bound), TEMPERATURES[-2:], self.iterations, least)
        most = (1 + SPENT) * self.spent
        for _ in track(iter(self.worth, False), "bound of the interactions"):
            if self.spent > most:
                break
            self.divide()
        return min([self.known, self.single, *(least for least, _, _ in self.parts[:1])])

    def worth(self) -> bool:
        """Whether a better bound is to be had and looked for."""
        return bool(self.parts) and self.parts[0][0] < self.enough

    def divide(self) -> None:
        """Replace the part of the least bound by one for each option of a group."""
        least, _, bound = heapq.heappop(self.parts)
        allowed, dual = self.open(bound)
        share = np.where(allowed, np.clip(bound.share, 1e-9, 1), 0)
        undecided = entr(share / share.sum(axis=1, keepdims=True)).sum(axis=1)
        group = int(np.where(allowed.sum(axis=1) > 1, undecided, -1).argmax())
        for option in np.flatnonzero(allowed[group]):
            part = allowed.copy()
            part[group] = False
            part[group, option] = True
            self.add(part, dual.of(part[allowed]), TEMPERATURES[-2:], self.iterations // PART, least)

    def open(self, bound: Bound) -> tuple[np.ndarray, Dual]:
        """The options that may be in a plan better than the known one, and the variables for them."""
        finite, better = np.isfinite(bound.floor), bound.floor < self.known
        return better, bound.dual.of(better[finite])

    def add(
        self, allowed: np.ndarray, dual: Dual, temperatures: tuple[float, ...], iterations: int, least: float
    ) -> None:
        """One more part, whose bound is at least that of what it is a part of, unless no plan of it is better."""
        options = allowed.sum(axis=1)
        self.spent += options.sum() ** 3 * (1 + iterations) * len(temperatures)
        if (options == 1).all():
            plan = allowed.argmax(axis=1)
            if self.pairs.bits(plan) <= self.pairs.budget:
                self.single = min(self.single, self.pairs.energy(plan))
        elif options.all():
            relaxation = Relaxation.of(self.pairs, allowed, self.known)
            bound = relaxation.maximise(dual, temperatures, iterations=iterations, enough=self.enough)
            if bound.nats < self.known:
                self.count += 1
                heapq.heappush(self.parts, (max(bound.nats, least), self.count, bound))
