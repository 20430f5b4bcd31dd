"""What a sum over single weights misses, read off plans that were measured anyway.

    log L(plan) = log sigma + r(log sigma) + residual,        sigma = sum_g loss[g, x_g]

A run measures the plans that it chooses among. r, the logarithm of measured over summed loss, changes slowly with the
size of the error: towards small errors it goes to a constant, towards large ones it grows until outputs saturate. So it
is a local line through the measured plans (locally weighted regression, Cleveland 1979, J. Am. Stat. Assoc.
74(368):829-836), with Gaussian weights of width 1 in log sigma. Outside of the plans it stays what it is at their end.

Cost: none; no plan is measured for it.
Fails on: order. Two plans of equal sums are predicted alike, whatever their pairs of weights do; `spread` says how far
plans are from the line.
"""

import dataclasses
import functools

import numpy as np

from mpq.allocate.power_law import logarithms

WIDTH = 1.0
"""Of the weights, in natural logarithms of the sum: plans within a factor of e count."""
RIDGE = 0.05
"""Pulls the slope of a line to 0 where all its plans have about the same sum; in squares of `WIDTH`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Correction:
    """A fitted r.

    Attributes:
      log_sum: `float64[P]`, log sigma of the measured plans.
      log_ratio: `float64[P]`, log of measured over summed loss.
    """

    log_sum: np.ndarray
    log_ratio: np.ndarray

    @classmethod
    def fit(cls, summed: np.ndarray, measured: np.ndarray) -> "Correction":
        """From the sums and the measured losses of the same plans, `[P]` nats per output.

        Raises:
          MpqError: as `power_law.logarithms`.
        """
        x, y = logarithms(summed, measured)
        return cls(x, y - x)

    def __call__(self, summed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predicted losses of plans by their sums `[Q]`, nats per output, and their spread.

        The spread is the standard deviation of the logarithm, .05 are 5 %. A sum that is not positive gives 0.
        """
        summed = np.maximum(np.asarray(summed, np.float64), 0.0)
        at = np.log(np.where(summed > 0, summed, 1.0))
        weights = _weights(self.log_sum, at)
        ratio = _lines(self.log_sum, self.log_ratio, weights, self._inside(at))
        spread = np.sqrt((weights * np.square(self.left_out)).sum(axis=1) / weights.sum(axis=1))
        return summed * np.exp(ratio), spread

    @functools.cached_property
    def left_out(self) -> np.ndarray:
        """`float64[P]`: log of the measured loss of every plan over what all others predict for it."""
        everyone = np.arange(len(self.log_sum))
        found = []
        for plan in everyone:
            others = everyone != plan
            rest = Correction(self.log_sum[others], self.log_ratio[others])
            at = self.log_sum[plan, None]
            found.append(_lines(rest.log_sum, rest.log_ratio, _weights(rest.log_sum, at), rest._inside(at))[0])
        return self.log_ratio - np.asarray(found)

    def _inside(self, at: np.ndarray) -> np.ndarray:
        return np.clip(at, self.log_sum.min(), self.log_sum.max())


def _weights(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`float64[Q, P]`: of every plan in the line at every `at`; the nearest has 1, so that far away one is left."""
    distance = np.square((at[:, None] - x) / WIDTH) / 2
    return np.exp(distance.min(axis=1, keepdims=True) - distance)


def _lines(x: np.ndarray, y: np.ndarray, weights: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`float64[Q]`: the weighted lines through (x, y), each at its `at`."""
    total = weights.sum(axis=1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    off = x - mean_x[:, None]
    slope = (weights * off * (y - mean_y[:, None])).sum(axis=1)
    slope /= (weights * np.square(off)).sum(axis=1) + RIDGE * WIDTH**2 * total
    return mean_y + slope * (at - mean_x)
