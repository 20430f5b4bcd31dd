"""From the sum over single weights to the loss of a plan: a power law fitted to a few measured plans.

    log L(plan) = a + b log sum_g loss[g, x_g] + residual

Where errors of different weights go together, the loss grows faster than their sum (b > 1); where the outputs saturate,
slower. Both change slowly with the size of the error, so that plans near one budget lie on a line. The prediction is
the median; the spread of the residual is what the sum cannot tell plans apart by, noise of the data included.

Cost: one measurement a plan; 40 give `a` and `b` to a seventh of the spread or so.
Fails on: order. It maps sums monotonically, so it mends how large a predicted loss is, never which plan is better.
"""

import dataclasses

import numpy as np

from mpq.types import MpqError

MIN_PLANS = 4


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fitted law.

    Attributes:
      factor: exp(a), nats.
      exponent: b.
      spread: standard deviation of the residual, of the natural logarithm: .05 are 5 %.
      num_plans: how many plans were measured.
    """

    factor: float
    exponent: float
    spread: float
    num_plans: int

    @classmethod
    def fit(cls, predicted: np.ndarray, measured: np.ndarray) -> "PowerLaw":
        """Least squares of the logarithms.

        Args:
          predicted: `[P]`, sums over the table, nats per output.
          measured: `[P]`, losses of the same plans, nats per output.

        Raises:
          MpqError: as `logarithms`.
        """
        x, y = logarithms(predicted, measured)
        exponent, offset = np.polyfit(x, y, 1)
        residual = y - offset - exponent * x
        spread = float(np.sqrt(np.square(residual).sum() / (len(x) - 2)))
        return cls(float(np.exp(offset)), float(exponent), spread, len(x))

    def __call__(self, predicted: np.ndarray | float) -> np.ndarray:
        """Predicted loss of plans, nats per output; 0 for a sum that is not positive."""
        return self.factor * np.maximum(np.asarray(predicted, np.float64), 0.0) ** self.exponent


def logarithms(predicted: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of losses that a law can be fitted to. Arguments as of `PowerLaw.fit`.

    Raises:
      MpqError: fewer than 4 plans, a loss that is not positive, or sums that are all equal.
    """
    predicted, measured = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if len(predicted) < MIN_PLANS or len(predicted) != len(measured):
        raise MpqError(
            f"{len(measured)} measured for {len(predicted)} predicted losses: a power law takes at least "
            f"{MIN_PLANS} plans, each with both"
        )
    if not (np.isfinite(predicted) & (predicted > 0) & np.isfinite(measured) & (measured > 0)).all():
        raise MpqError("a power law takes losses above zero: leave plans out that change nothing")
    x, y = np.log(predicted), np.log(measured)
    if np.ptp(x) == 0:
        raise MpqError("all plans have the same predicted loss: measure plans that differ")
    return x, y
