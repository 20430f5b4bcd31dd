"""A lower bound for losses with pair terms that sees them all at once: a semidefinite relaxation.

Let z be a plan, one 1 in each group, and y = (1, z). For any symmetric X over options that is not negative between
options of different groups, any b, and prices mu and nu >= 0, every plan within the budget B has

    E(x)  =  loss . z + z^T Q z
          >=  y^T M y + (loss + diag X + b + mu size - B nu) . z - mu B,
    M = [[0, -b^T / 2], [-b / 2, Q - X + (nu size^T + size nu^T) / 2]],        Q = pairs / 2

for two options of one group are never in a plan together, two of different groups cost X at least nothing, and neither
size . z - B nor its product with any z_i is positive. With positive weights s and lambda the least eigenvalue of
S^-1 M S^-1, on the vectors whose entries of every group add up to the first as those of y do,
y^T M y >= lambda (s_0^2 + s^2 . z). So a choice in each group for itself bounds E:

    sum_g min_o [loss + diag X + b + mu size - B nu + lambda s^2]_go + lambda s_0^2 - mu B

Its maximum is that of the doubly nonnegative relaxation of the quadratic problem (spectral form: Helmberg and Rendl
2000, SIAM J. Optim. 10(3); group sums as in Zhao et al. 1998, J. Comb. Optim. 2; products with the budget: Helmberg,
Rendl and Weismantel 2000, J. Comb. Optim. 4). The right side is concave; it is found as that of `minorant.py` is, by
L-BFGS on smoothed minima at a falling temperature. Every iterate is a bound.

Cost: one eigendecomposition of the open options an iteration, `O((G S)^3)`; memory `O((G S)^2)`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import Bounds, minimize

from mpq.allocate.minorant import soft_min
from mpq.allocate.pairs import Pairs


class Dual(NamedTuple):
    """The variables, in the units of a `Relaxation`.

    Attributes:
      price: mu.
      b, nu: `float64[n]` over the open options.
      x: `float64[n (n + 1) / 2]`, X on and above its diagonal, by rows.
    """

    price: float
    b: np.ndarray
    nu: np.ndarray
    x: np.ndarray

    @classmethod
    def zero(cls, options: int, price: float) -> "Dual":
        """All 0 but the price."""
        return cls(price, np.zeros(options), np.zeros(options), np.zeros(options * (options + 1) // 2))

    @classmethod
    def split(cls, flat: np.ndarray, options: int) -> "Dual":
        """The reverse of `flat`."""
        b, nu, x = np.split(flat[1:], [options, 2 * options])
        return cls(float(flat[0]), b, nu, x)

    @property
    def flat(self) -> np.ndarray:
        """One array of all."""
        return np.concatenate([[self.price], self.b, self.nu, self.x])

    def of(self, kept: np.ndarray) -> "Dual":
        """Where only some options are left, `bool[n]`."""
        n = len(self.b)
        whole = np.zeros((n, n))
        whole[np.triu_indices(n)] = self.x
        part = whole[np.ix_(kept, kept)]
        return Dual(self.price, self.b[kept], self.nu[kept], part[np.triu_indices(len(part))])


class Bound(NamedTuple):
    """What a `Relaxation` found.

    Attributes:
      nats: no plan of its options within the budget has less.
      floor: `float64[G, S]` nats: none that takes this option; infinite where that is not open.
      share: `float64[G, S]`, how much of an option the relaxed plan takes, about 0 to 1.
      dual: where it stands.
    """

    nats: float
    floor: np.ndarray
    share: np.ndarray
    dual: Dual


@dataclasses.dataclass(frozen=True, eq=False)
class Relaxation:
    """The bound as a function of its variables, in units of `unit`; those of b, nu and X are over the weights s.

    Attributes:
      allowed: `bool[G, S]`, the open options.
      loss, size: `float64[n]` of them.
      quadratic: `float64[n, n]`, Q over the weights of both sides.
      budget: in the unit of `size`.
      weight: `float64[1 + n]`, s.
      basis: `float64[1 + n, d]`, orthonormal, of the vectors that y can be, times s.
      unit: nats.
    """

    allowed: np.ndarray
    loss: np.ndarray
    size: np.ndarray
    quadratic: np.ndarray
    budget: float
    weight: np.ndarray
    basis: np.ndarray
    unit: float

    @classmethod
    def of(cls, pairs: Pairs, allowed: np.ndarray, known: float) -> "Relaxation":
        """Of some options, at least one a group; units go by `known`, E of a plan."""
        groups = len(pairs.loss)
        group, option = np.nonzero(allowed)
        unit, span = pairs.unit(known), pairs.span
        loss = pairs.loss[group, option] / unit
        weight = np.concatenate([[1.0], np.sqrt(np.maximum(np.abs(loss), 1.0))])
        quadratic = pairs.pairs[group, option][:, group, option] / (2 * unit)
        sums = np.concatenate([-np.ones((groups, 1)), np.equal.outer(np.arange(groups), group)], axis=1) / weight
        return cls(
            allowed=allowed,
            loss=loss,
            size=pairs.size[group, option] / span,
            quadratic=quadratic / np.multiply.outer(weight[1:], weight[1:]),
            budget=pairs.budget / span,
            weight=weight,
            basis=np.linalg.svd(sums)[2][groups:].T,
            unit=unit,
        )

    @functools.cached_property
    def group(self) -> np.ndarray:
        """`int64[n]`."""
        return np.nonzero(self.allowed)[0]

    @functools.cached_property
    def above(self) -> tuple[np.ndarray, np.ndarray]:
        """Where X is kept: both indices, ascending."""
        return np.triu_indices(len(self.group))

    def maximise(self, dual: Dual, temperatures: Sequence[float], *, iterations: int, enough: float) -> Bound:
        """A large bound.

        Args:
          dual: to begin with.
          temperatures: of the smoothed least eigenvalue, in units of the mean loss of a group; over a group's options,
            times groups.
          iterations: most at each.
          enough: a bound that ends the search, nats.
        """
        n = len(self.group)
        across = self.group[self.above[0]] != self.group[self.above[1]]
        free = np.full(n, -np.inf)
        lower: Any = Dual(0.0, free, np.zeros(n), np.where(across, 0.0, -np.inf)).flat
        variables, best = dual.flat, self.bound(dual)
        for temperature in temperatures:
            found = minimize(
                lambda flat, temperature=temperature: self.smoothed(Dual.split(flat, n), temperature),
                variables,
                jac=True,
                method="L-BFGS-B",
                bounds=Bounds(lower, np.inf),
                options={"maxiter": iterations},
            )
            variables = found.x
            best = max(best, self.bound(Dual.split(variables, n), temperature), key=lambda bound: bound.nats)
            if best.nats >= enough:
                break
        return best

    def bound(self, dual: Dual, temperature: float = 0.0) -> Bound:
        """The bound less what the eigenvalue may be off by, and the relaxed plan at a temperature (0: none)."""
        values, vectors = np.linalg.eigh(self._matrix(dual))
        least = float(values[0] - len(values) * np.finfo(np.float64).eps * np.abs(values).max())
        alone = self._alone(dual, least)
        minima = alone.min(axis=1, keepdims=True)
        nats = (float(minima.sum()) + least * self.weight[0] ** 2 - dual.price * self.budget) * self.unit
        share = np.zeros(self.allowed.shape)
        if temperature:
            directions = self.basis @ (vectors * np.sqrt(soft_min(values, temperature, 0)[1]))
            share[self.allowed] = (directions[1:] @ directions[0]) / (directions[0] @ directions[0]) / self.weight[1:]
        return Bound(nats, nats + (alone - minima) * self.unit, share, dual)

    def smoothed(self, dual: Dual, temperature: float) -> tuple[float, np.ndarray]:
        """Minus the smoothed bound in units, and its derivative."""
        s, budget = self.weight[1:], self.budget
        values, vectors = np.linalg.eigh(self._matrix(dual))
        least, share = soft_min(values, temperature, 0)
        alone, chosen = soft_min(self._alone(dual, float(least)), temperature * len(self.allowed), 1)
        z = chosen[self.allowed]
        value = alone.sum() + least * self.weight[0] ** 2 - dual.price * budget
        # d lambda / d M, as y y^T would be
        directions = self.basis @ (vectors * np.sqrt(share))
        lifted = (self.weight[0] ** 2 + (z * s**2).sum()) * (directions @ directions.T)
        rows, columns = self.above
        by_x = -lifted[1:, 1:][rows, columns] * np.where(rows == columns, 1, 2)
        by_x[rows == columns] += z * s**2
        by_nu = lifted[1:, 1:] @ (self.size / s) - budget * z * s
        by = Dual(float((z * self.size).sum()) - budget, z * s - lifted[0, 1:], by_nu, by_x)
        return -value, -by.flat

    def _matrix(self, dual: Dual) -> np.ndarray:
        """S^-1 M S^-1 on the basis."""
        n = len(self.group)
        whole = np.zeros((1 + n, 1 + n))
        upper = np.zeros((n, n))
        upper[self.above] = dual.x
        bits = np.multiply.outer(dual.nu, self.size / self.weight[1:]) / 2
        whole[1:, 1:] = self.quadratic - upper - np.triu(upper, 1).T + bits + bits.T
        whole[0, 1:] = whole[1:, 0] = -dual.b / 2
        return self.basis.T @ whole @ self.basis

    def _alone(self, dual: Dual, least: float) -> np.ndarray:
        """`float64[G, S]`: what is left of each group, infinite where an option is not open."""
        s, diagonal = self.weight[1:], dual.x[self.above[0] == self.above[1]]
        values = self.loss + (diagonal + least) * s**2 + (dual.b - self.budget * dual.nu) * s + dual.price * self.size
        table = np.full(self.allowed.shape, np.inf)
        table[self.allowed] = values
        return table
