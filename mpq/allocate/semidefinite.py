"""A lower bound for losses with pair terms that sees them all at once: a semidefinite relaxation.

Let z be a plan, one 1 in each group, and y = (1, z). For any symmetric X over options that is not negative between
options of different groups, any b and price mu >= 0 of a bit, every plan within the budget B has

    E(x) = loss . z + z^T Q z  >=  y^T M y + (loss + diag X + b + mu size) . z - mu B,
    M = [[0, -b^T / 2], [-b / 2, Q - X]],        Q = pairs / 2

for two options of one group are never in a plan together, and two of different groups cost X at least nothing. With
positive weights s and lambda the least eigenvalue of S^-1 M S^-1, on the vectors whose entries of every group add up to
the first as those of y do, y^T M y >= lambda (s_0^2 + s^2 . z). So a choice in each group for itself bounds E:

    sum_g min_o [loss + diag X + b + mu size + lambda s^2]_go + lambda s_0^2 - mu B

Its maximum is that of the doubly nonnegative relaxation of the quadratic problem (spectral form: Helmberg and Rendl
2000, SIAM J. Optim. 10(3); group sums as in Zhao et al. 1998, J. Comb. Optim. 2). The right side is concave; it is
found as that of `minorant.py` is, by L-BFGS on smoothed minima at a falling temperature. Every iterate is a bound.

Cost: one eigendecomposition of the open options an iteration, `O((G S)^3)`; memory `O((G S)^2)`.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from scipy.optimize import Bounds, minimize

from mpq.allocate.minorant import Minorant, soft_min
from mpq.allocate.pairs import Pairs
from mpq.progress import track

TEMPERATURES = (0.03, 0.006, 0.0015, 0.0004)
"""Of the smoothed least eigenvalue, in units of the mean loss of a group; over a group's options, times groups."""
MOST_OPTIONS = 800
"""Of all groups together: an iteration beyond takes more than a few tenths of a second."""


def semidefinite_bound(pairs: Pairs, minorant: Minorant, known: float, *, enough: float, iterations: int) -> float:
    """A lower bound on E of every plan within the budget, at most `known`.

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
    dual = _Dual.of(pairs, minorant.allowed, known)
    variables = np.zeros(1 + len(dual.group) + len(dual.above[0]))
    variables[0] = minorant.price / dual.price_unit
    lower: Any = np.full(len(variables), -np.inf)
    lower[0] = 0.0
    lower[1 + len(dual.group) :][dual.group[dual.above[0]] != dual.group[dual.above[1]]] = 0.0
    best = -np.inf
    for temperature in track(TEMPERATURES, "bound of the interactions"):
        smoothed = functools.partial(dual.smoothed, temperature=temperature)
        options = {"maxiter": iterations}
        found = minimize(
            smoothed, variables, jac=True, method="L-BFGS-B", bounds=Bounds(lower, np.inf), options=options
        )
        variables = found.x
        best = max(best, dual.bound(variables))
        if best >= min(enough, known):
            break
    return min(best, known)


@dataclasses.dataclass(frozen=True, eq=False)
class _Dual:
    """The bound as a function of its variables: the price, b, and X above its diagonal and on it; in units of `unit`.

    Attributes:
      loss, size: `float64[n]` of the open options.
      quadratic: `float64[n, n]`, Q over the weights of both sides.
      budget: in the unit of `size`.
      group: `int64[n]`.
      weight: `float64[1 + n]`, s.
      basis: `float64[1 + n, d]`, orthonormal, of the vectors that y can be, times s.
      unit: nats; price_unit: nats a bit.
    """

    loss: np.ndarray
    size: np.ndarray
    quadratic: np.ndarray
    budget: float
    group: np.ndarray
    weight: np.ndarray
    basis: np.ndarray
    unit: float
    price_unit: float

    @classmethod
    def of(cls, pairs: Pairs, allowed: np.ndarray, known: float) -> "_Dual":
        groups = len(pairs.loss)
        group, option = np.nonzero(allowed)
        unit, span = pairs.unit(known), pairs.span
        loss = pairs.loss[group, option] / unit
        weight = np.concatenate([[1.0], np.sqrt(np.maximum(np.abs(loss), 1.0))])
        quadratic = pairs.pairs[group, option][:, group, option] / (2 * unit)
        sums = np.concatenate([-np.ones((groups, 1)), np.equal.outer(np.arange(groups), group)], axis=1) / weight
        basis = np.linalg.svd(sums)[2][groups:].T
        return cls(
            loss,
            pairs.size[group, option] / span,
            quadratic / np.multiply.outer(weight[1:], weight[1:]),
            pairs.budget / span,
            group,
            weight,
            basis,
            unit,
            unit / span,
        )

    @functools.cached_property
    def above(self) -> tuple[np.ndarray, np.ndarray]:
        """Where X is kept: both indices, ascending."""
        return np.triu_indices(len(self.group))

    @functools.cached_property
    def _row(self) -> np.ndarray:
        """`int64[n]`: place of each option in its group."""
        first = np.searchsorted(self.group, self.group)
        return np.arange(len(self.group)) - first

    def _matrix(self, b: np.ndarray, x: np.ndarray) -> np.ndarray:
        """S^-1 M S^-1 on the basis; `b` and `x` are over the weights."""
        n = len(self.group)
        whole = np.zeros((1 + n, 1 + n))
        upper = np.zeros((n, n))
        upper[self.above] = x
        whole[1:, 1:] = self.quadratic - upper - np.triu(upper, 1).T
        whole[0, 1:] = whole[1:, 0] = -b / 2
        return self.basis.T @ whole @ self.basis

    def _alone(self, price: float, b: np.ndarray, x: np.ndarray, least: float) -> np.ndarray:
        """`float64[G, S]`: what is left of each group, infinite where there is no option."""
        s, diagonal = self.weight[1:], x[self.above[0] == self.above[1]]
        values = self.loss + diagonal * s**2 + b * s + price * self.size + least * s**2
        table = np.full((self.group[-1] + 1, self._row.max() + 1), np.inf)
        table[self.group, self._row] = values
        return table

    def bound(self, variables: np.ndarray) -> float:
        """Nats, less what the eigenvalue may be off by."""
        price, b, x = variables[0], variables[1 : 1 + len(self.group)], variables[1 + len(self.group) :]
        values = np.linalg.eigvalsh(self._matrix(b, x))
        least = values[0] - len(values) * np.finfo(np.float64).eps * np.abs(values).max()
        total = self._alone(price, b, x, least).min(axis=1).sum() + least * self.weight[0] ** 2 - price * self.budget
        return float(total) * self.unit

    def smoothed(self, variables: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
        """Minus the smoothed bound in units, and its derivative."""
        n, s = len(self.group), self.weight[1:]
        price, b, x = variables[0], variables[1 : 1 + n], variables[1 + n :]
        values, vectors = np.linalg.eigh(self._matrix(b, x))
        least, share = soft_min(values, temperature, 0)
        groups = self.group[-1] + 1
        alone, chosen = soft_min(self._alone(price, b, x, float(least)), temperature * groups, 1)
        z = chosen[self.group, self._row]
        value = alone.sum() + least * self.weight[0] ** 2 - price * self.budget
        # d lambda / d M, as y y^T would be
        directions = self.basis @ (vectors * np.sqrt(share))
        lifted = (self.weight[0] ** 2 + (z * s**2).sum()) * (directions @ directions.T)
        by_b = z * s - lifted[0, 1:]
        rows, columns = self.above
        by_x = -lifted[1:, 1:][rows, columns] * np.where(rows == columns, 1, 2)
        by_x[rows == columns] += z * s**2
        return -value, -np.concatenate([[(z * self.size).sum() - self.budget], by_b, by_x])
