"""The loss of any plan from a few that were measured: a Gaussian process over the errors that a plan leaves.

A table says what every weight's error costs alone, c[g, s] nats. To second order that is half the squared length of the
error in the metric of the outputs, so a plan p is a point with a coordinate for every group, e_g(p) = sqrt(c[g, x_g]),
and the sum over its weights is sigma(p) = |e(p)|^2. What no sum sees (errors that go together, outputs that saturate, a
weight whose error costs more or less within a plan than alone) moves log L away from log sigma, smoothly in e:

    log L(p) = a + b log sigma(p) + sum_g u[g, x_g] e_g(p)^2 / sigma(p) + f(e(p)) + residual

with u ~ N(0, tau^2) for every candidate, f a Gaussian process of covariance theta^2 exp(-|e - e'|^2 / 2 l^2), and
residual ~ N(0, s^2). a and b have flat priors, s^2 an inverse chi-squared one (`RESIDUAL`), and they are integrated
out. tau / s, theta / s and l are averaged over a grid by their marginal likelihood (Rasmussen and Williams 2006,
sections 2.7 and 5.4.1), so that few plans do not settle on one extreme, and the answer needs no optimizer.

The metric is the prior: far from all measured plans its power law is left. The answer is no table, as log L is not a
sum; solvers reach it by local search, `Surrogate.measure` in place of a measurement (`mpq.allocate.refine`).

Cost: one measurement a plan, and linear algebra of the number of plans cubed at every point of the grid.
Fails on: plans far from the measured ones, where `predict` says a large spread.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from mpq.allocate.power_law import logarithms
from mpq.allocate.problem import Problem
from mpq.types import MpqError, Scheme

MIN_PLANS = 8
CANDIDATES = np.geomspace(1e-2, 1e3, 6)
"""tau^2 / s^2 that are averaged over; the squares of its features have mean one."""
SMOOTH = np.geomspace(1e-1, 1e5, 7)
"""theta^2 / s^2 that are averaged over."""
LENGTHS = np.geomspace(0.5, 16.0, 6)
"""l that are averaged over, in root mean square distances of two measured plans."""
RESIDUAL, WORTH = 0.05, 4
"""Prior of s, and how many plans it is worth: a few plans alone would let it vanish, and promise what they cannot."""
NEGLIGIBLE = 1e-3
"""Points of the grid with less than this part of the largest weight are left out."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Point:
    """What was fitted at one point of the grid: K = factor factor', and H the lines of the measured plans.

    Attributes:
      candidates, smooth, length: the point, tau^2 / s^2, theta^2 / s^2 and l.
      likelihood: logarithm of the marginal one, up to a constant.
      line: `[2]`, a and b.
      factor: `[P, P]`, lower triangle.
      unsure: `[P, 2]`, K^-1 H.
      information: `[2, 2]`, H' K^-1 H.
      residual: `[P]`, K^-1 (log L - H line).
      variance: s^2.
    """

    candidates: float
    smooth: float
    length: float
    likelihood: float
    line: np.ndarray
    factor: np.ndarray
    unsure: np.ndarray
    information: np.ndarray
    residual: np.ndarray
    variance: float

    def covariance(self, shared: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Of plans, over s^2, by the products of their shares and their squared distances."""
        return _covariance(self.candidates, self.smooth, self.length, shared, distance)

    def spread(self, prior: np.ndarray, cross: np.ndarray, trend: np.ndarray) -> np.ndarray:
        """Variance of other plans `[Q]`, by that before any was measured, over s^2.

        The measured plans take something off it, and not knowing the line adds something.
        """
        white = solve_triangular(self.factor, cross.T, lower=True)
        apart = trend - cross @ self.unsure
        of_line = (apart * np.linalg.solve(self.information, apart.T).T).sum(axis=1)
        return self.variance * (prior + of_line - np.square(white).sum(axis=0))


@dataclasses.dataclass(frozen=True, eq=False)
class Surrogate:
    """A fitted process.

    Attributes:
      problem: losses of single weights.
      plans: `int[P, G]`, the measured plans, scheme index of every group.
      measured: `float64[P]`, their losses, nats per output.
    """

    problem: Problem
    plans: np.ndarray
    measured: np.ndarray

    def __post_init__(self) -> None:
        if len(self.plans) < MIN_PLANS:
            raise MpqError(f"{len(self.plans)} measured plans: predicting others takes at least {MIN_PLANS}")
        logarithms(self.problem.parts(self.plans).sum(axis=1), self.measured)

    def predict(self, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses of plans `int[Q, G]`: `float64[Q]` nats per output, and the standard deviation of their logarithms.

        The loss is the median. A plan whose sum is not positive has loss 0 and an infinite spread.
        """
        total = self.problem.parts(plans).sum(axis=1)
        known = np.flatnonzero(total > 0)
        mean, variance = np.zeros(len(known)), np.zeros(len(known))
        trend, features, points = self._seen(plans[known])
        shared, distance = features @ self._own[1].T, _distances(points, self._own[2])
        for weight, at in self._grid:
            cross = at.covariance(shared, distance)
            found = trend @ at.line + cross @ at.residual
            prior = at.covariance(np.square(features).sum(axis=1), np.zeros(len(known))) + 1
            mean += weight * found
            variance += weight * (at.spread(prior, cross, trend) + np.square(found))
        loss, deviation = np.zeros(len(plans)), np.full(len(plans), np.inf)
        loss[known] = np.exp(mean)
        deviation[known] = np.sqrt(np.maximum(variance - np.square(mean), 0.0))
        return loss, deviation

    def measure(self, choice: Mapping[str, Scheme]) -> float:
        """Predicted loss of one plan, path -> scheme, in nats per output: what a search takes for a measurement."""
        return float(self.predict(self.problem.by_group(choice)[None])[0][0])

    @functools.cached_property
    def _own(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._seen(self.plans)

    @functools.cached_property
    def _scales(self) -> tuple[np.ndarray, float, float, float]:
        """Mean share of every candidate, scale of shares, mean logarithm of the sum, scale of points."""
        shares, log_total, points = self._raw(self.plans)
        mean = shares.mean(axis=0)
        size = np.sqrt(np.square(shares - mean).sum(axis=1).mean())
        apart = np.sqrt(_distances(points, points).mean())
        tiny = np.finfo(np.float64).tiny
        return mean, float(max(size, tiny)), float(log_total.mean()), float(max(apart, tiny))

    def _raw(self, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shares `[Q, G * S]` of candidates in the sum, the logarithm of the sum `[Q]`, points `[Q, G]`."""
        parts = self.problem.parts(plans)
        total = parts.sum(axis=1)
        taken = plans[:, :, None] == np.arange(len(self.problem.schemes))
        shares = np.where(taken, (parts / total[:, None])[:, :, None], 0.0)
        return shares.reshape(len(plans), self.problem.loss.size), np.log(total), np.sqrt(np.maximum(parts, 0.0))

    def _seen(self, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the process sees of plans: its line `[Q, 2]`, shares `[Q, G * S]` and points `[Q, G]`, scaled."""
        shares, log_total, points = self._raw(plans)
        mean, size, middle, apart = self._scales
        trend = np.stack([np.ones(len(plans)), log_total - middle], axis=1)
        return trend, (shares - mean) / size, points / apart

    @functools.cached_property
    def _grid(self) -> list[tuple[float, _Point]]:
        """The points of the grid that count, with their weights, which sum to one."""
        trend, features, points = self._own
        shared, distance = features @ features.T, _distances(points, points)
        target, found, best = np.log(self.measured), list[_Point](), -np.inf
        for length, candidates, smooth in itertools.product(LENGTHS, CANDIDATES, SMOOTH):
            at = _fit(float(candidates), float(smooth), float(length), shared, distance, trend, target)
            best = max(best, at.likelihood)
            # Those left out by now stay out: every point holds a matrix of all plans.
            found = [p for p in (*found, at) if p.likelihood >= best + np.log(NEGLIGIBLE)]
        weights = np.exp(np.asarray([at.likelihood for at in found]) - best)
        return list(zip((weights / weights.sum()).tolist(), found, strict=True))


def _fit(
    candidates: float,
    smooth: float,
    length: float,
    shared: np.ndarray,
    distance: np.ndarray,
    trend: np.ndarray,
    target: np.ndarray,
) -> _Point:
    """One point of the grid.

    Args:
      candidates: tau^2 / s^2.
      smooth: theta^2 / s^2.
      length: l.
      shared: `[P, P]`, products of the shares of the measured plans.
      distance: `[P, P]`, their squared distances.
      trend: `[P, 2]`, their lines.
      target: `[P]`, logarithms of their losses.
    """
    among = _covariance(candidates, smooth, length, shared, distance)
    factor = cholesky(among + np.eye(len(target)), lower=True)
    white = solve_triangular(factor, np.column_stack([trend, target]), lower=True)
    basis, line = np.linalg.qr(white[:, :-1])
    left = white[:, -1] - basis @ (basis.T @ white[:, -1])
    squares, free = float(left @ left) + WORTH * RESIDUAL**2, len(target) - trend.shape[1] + WORTH
    determinants = np.log(np.diag(factor)).sum() + np.log(np.abs(np.diag(line))).sum()
    back = solve_triangular(factor.T, np.column_stack([white[:, :-1], left]), lower=False)
    return _Point(
        candidates,
        smooth,
        length,
        likelihood=float(-determinants - free / 2 * np.log(squares)),
        line=np.linalg.solve(line, basis.T @ white[:, -1]),
        factor=factor,
        unsure=back[:, :-1],
        information=white[:, :-1].T @ white[:, :-1],
        residual=back[:, -1],
        variance=squares / free,
    )


def _covariance(
    candidates: float, smooth: float, length: float, shared: np.ndarray, distance: np.ndarray
) -> np.ndarray:
    return candidates * shared + smooth * np.exp(-distance / (2 * length**2))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of all rows of a and b."""
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T
    return np.maximum(squares, 0.0)
