"""Lower bounds for losses with pair terms: terms are moved between groups and pairs until what is left adds up.

For any phi and any price mu >= 0 of a bit, every plan within the budget B has

    E(x)  =  sum_g theta_g(x_g) + sum_{g<h} rest_gh(x_g, x_h)
          >= sum_g min_o [ theta_g(o) + mu size_g(o) ] + sum_{g<h} min_{o,p} rest_gh(o, p) - mu B,
    theta_g(o) = loss_g(o) + sum_h phi_gh(o),        rest_gh(o, p) = pairs_gh(o, p) - phi_gh(o) - phi_hg(p)

The right side is concave in (phi, mu). Its maximum is the bound of the linear relaxation over pairs of groups
(Schlesinger 1976; Werner 2007, IEEE PAMI 29(7); for quadratic assignment Gilmore 1962 and Lawler 1963 split pair terms
this way), with the budget by Everett's price (1963). It is found by L-BFGS on the minima smoothed at a falling
temperature T, -T log sum exp(-. / T): those never exceed the minima, so every iterate gives a bound, and the sums of
minima themselves are what is reported.

Options whose own bound exceeds the best known plan are left out between temperatures, as they can be in no better one.

`branch` then fixes one group after the other, keeping all partial plans whose bound is below the best known plan. Where
they become more than `width`, those of the largest bound are dropped, and the least bound among the dropped is what is
certain. Without a drop the best plan is optimal.

Cost: `O(G^2 S^2)` an iteration and `O(width G^2 S^2)` for the branching.
Fails on: strong frustrated pairs; the relaxation gets loose and the gap says so.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from scipy.optimize import Bounds, minimize

from mpq.allocate.pairs import Pairs

TEMPERATURES = (0.02, 0.004, 0.001)
"""Of the smoothed minima over a group's options, relative to the mean loss of a group; over pairs, 2 / G times that."""


@dataclasses.dataclass(frozen=True, eq=False)
class Minorant:
    """E with its terms moved about.

    Attributes:
      theta: `float64[G, S]`, infinite where an option is in no plan better than the known one.
      rest: `float64[G, S, G, S]`, symmetric; 0 within a group.
      price: mu, nats per bit.
    """

    theta: np.ndarray
    rest: np.ndarray
    price: float

    @property
    def allowed(self) -> np.ndarray:
        """`bool[G, S]`, the options that are left."""
        return np.isfinite(self.theta)

    @property
    def finite_theta(self) -> np.ndarray:
        """theta, and 0 where an option is left out."""
        return np.where(self.allowed, self.theta, 0.0)

    @functools.cached_property
    def least(self) -> np.ndarray:
        """`float64[G, S, G]`: the least of every pair with g at o; infinite where that is left out."""
        least = np.where(self.allowed, self.rest, np.inf).min(axis=3)
        return np.where(self.allowed[:, :, None], least, np.inf)

    @property
    def rest_bound(self) -> float:
        """What all pairs have at least, nats."""
        return float(self.least.min(axis=1).sum() / 2)

    def priced(self, pairs: Pairs) -> np.ndarray:
        """`float64[G, S]`: theta and the price of the bits."""
        return self.theta + self.price * pairs.size

    def bound(self, pairs: Pairs) -> float:
        """The right side of the module's formula."""
        return float(self.priced(pairs).min(axis=1).sum()) + self.rest_bound - self.price * pairs.budget


def maximise(pairs: Pairs, price: float, known: float, iterations: int) -> Minorant:
    """The minorant of a large bound.

    Args:
      pairs: the problem.
      price: where mu begins, nats per bit.
      known: E of a plan within the budget.
      iterations: most at each temperature.
    """
    groups = len(pairs.loss)
    unit, span = pairs.unit(known), pairs.span
    minorant = Minorant(pairs.loss, pairs.pairs, price)
    variables = np.zeros(1 + pairs.loss.size * groups)
    variables[0] = price * span / unit
    lower: Any = np.full(len(variables), -np.inf)
    lower[0] = 0.0  # a price is not negative
    for temperature in TEMPERATURES:
        dual = _Dual(pairs, minorant.allowed, unit, span, temperature)
        found = minimize(
            dual, variables, jac=True, method="L-BFGS-B", bounds=Bounds(lower, np.inf), options={"maxiter": iterations}
        )
        variables = found.x
        phi = dual.phi(variables)
        theta = np.where(minorant.allowed, pairs.loss + phi.sum(axis=2), np.inf)
        price = float(variables[0]) * unit / span
        minorant = _without_losers(Minorant(theta, dual.rest(phi), price), pairs, known)
    return minorant


class _Dual:
    """The smoothed bound and its gradient, both negated, in units in which variables are of order 1."""

    def __init__(self, pairs: Pairs, allowed: np.ndarray, unit: float, span: float, temperature: float) -> None:
        self.pairs, self.unit, self.allowed = pairs, unit, allowed
        self.temperature = temperature * unit
        self.loss = np.where(self.allowed, pairs.loss, np.inf)
        self.size, self.budget = pairs.size / span * unit, pairs.budget / span * unit
        known = np.where(np.isfinite(pairs.loss), np.abs(pairs.loss), 0.0)
        self.scale = np.sqrt(np.maximum(known, unit) * unit)[:, :, None] * (1 - np.eye(len(known)))[:, None]

    def phi(self, variables: np.ndarray) -> np.ndarray:
        """`float64[G, S, G]` nats: what moves from the pair (g, h) to g at o."""
        return variables[1:].reshape(self.scale.shape) * self.scale

    def rest(self, phi: np.ndarray) -> np.ndarray:
        """Pair terms less what moved to groups."""
        return self.pairs.pairs - phi[:, :, :, None] - phi.transpose(2, 0, 1)[:, None]

    def __call__(self, variables: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the bound, and its derivative in the price and in phi."""
        groups = len(self.loss)
        price, phi = variables[0], self.phi(variables)
        alone, p = soft_min(self.loss + price * self.size + phi.sum(axis=2), self.temperature, 1)
        rest = np.where(self.allowed[:, :, None, None] & self.allowed, self.rest(phi), np.inf)
        pair, q = soft_min(rest, 2 * self.temperature / groups, (1, 3))
        np.fill_diagonal(pair, 0.0)
        value = alone.sum() + pair.sum() / 2 - price * self.budget
        by_price = (p * self.size).sum() - self.budget
        by_phi = (p[:, :, None] - q.sum(axis=3)) * self.scale
        return -value / self.unit, -np.concatenate([[by_price], by_phi.ravel()]) / self.unit


def soft_min(values: np.ndarray, temperature: float, axis: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """-T log sum exp(-values / T) along `axis`, and its derivative."""
    least = values.min(axis=axis, keepdims=True)
    weights = np.exp((least - values) / temperature)
    total = weights.sum(axis=axis, keepdims=True)
    return (least - temperature * np.log(total)).squeeze(axis), weights / total


def _without_losers(minorant: Minorant, pairs: Pairs, known: float) -> Minorant:
    """Leaves out options that are in no plan better than the known one."""
    priced, least = minorant.priced(pairs), minorant.least
    excess = priced - priced.min(axis=1, keepdims=True)
    excess[minorant.allowed] += (least - least.min(axis=1, keepdims=True)).sum(axis=2)[minorant.allowed]
    loses = minorant.bound(pairs) + excess > known + pairs.rounding
    return dataclasses.replace(minorant, theta=np.where(loses, np.inf, minorant.theta))


def branch(minorant: Minorant, pairs: Pairs, known: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """The best plan found, no worse than `known`, and a lower bound on E of every plan within the budget.

    Args:
      minorant: from `maximise`; an option that it leaves out is in no plan better than `known`.
      pairs: the problem.
      known: `int64[G]`, within the budget.
      width: most partial plans kept.
    """
    energy, groups = pairs.energy(known), len(known)
    allowed, priced = minorant.allowed, minorant.priced(pairs)
    order = np.argsort(-np.where(allowed, priced - priced.min(axis=1, keepdims=True), 0.0).sum(axis=1), kind="stable")
    least = minorant.least.min(axis=1)
    smallest = np.where(allowed, pairs.size, np.iinfo(np.int64).max).min(axis=1)
    choice = np.zeros((1, groups), np.int64)
    value, used = np.array([-minorant.price * pairs.budget]), np.zeros(1, np.int64)
    field = priced[None].copy()  # terms of each open group with the groups that are fixed
    dropped = np.inf
    for depth, g in enumerate(order):
        later = order[depth + 1 :]
        between = least[np.ix_(later, later)].sum() / 2
        parts = []
        for o in np.flatnonzero(allowed[g]):
            total = value + field[:, g, o]
            ahead = (field[:, later] + minorant.rest[g, o, later]).min(axis=2).sum(axis=1)
            fits = used + pairs.size[g, o] + smallest[later].sum() <= pairs.budget
            parts.append(np.where(fits, total + ahead + between, np.inf))
        bounds = np.stack(parts, axis=1)
        node, column = np.nonzero(bounds < energy - pairs.rounding)
        bound = bounds[node, column]
        if len(node) > width:
            kept = np.argsort(bound, kind="stable")
            dropped = min(dropped, float(bound[kept[width]]))
            node, column = node[kept[:width]], column[kept[:width]]
        o = np.flatnonzero(allowed[g])[column]
        value, used, choice = value[node] + field[node, g, o], used[node] + pairs.size[g, o], choice[node]
        choice[:, g] = o
        field = field[node] + minorant.rest[g, o]
    found = [plan for plan in choice if pairs.energy(plan) < energy]
    best = min(found, key=pairs.energy) if found else known
    return best, min(dropped, pairs.energy(best))
