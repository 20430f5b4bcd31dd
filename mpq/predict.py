"""Predicted losses of plans: the sum over weights, as it is and corrected by plans measured on the selection set."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpq.allocate import Frontier, Refine
from mpq.allocate.correction import Correction
from mpq.allocate.power_law import MIN_PLANS
from mpq.artifacts import Plan
from mpq.distill import Mixture
from mpq.types import SensitivityTable


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """What one rounding algorithm's table says of whole plans.

    Attributes:
      table: its sensitivities.
      measured: plans and their KL on the selection set, nats per output; empty: nothing is corrected.
    """

    table: SensitivityTable
    measured: Sequence[tuple[Plan, float]] = ()

    def summed(self, plan: Plan) -> tuple[float, float]:
        """Sum over weights, whose errors are taken as independent, and its standard error."""
        column = {str(scheme): i for i, scheme in enumerate(self.table.schemes)}
        picks = [(row, column[str(plan.choices[w.path])]) for row, w in enumerate(self.table.weights)]
        loss = float(sum(self.table.loss_increase[pick] for pick in picks))
        return loss, float(np.sqrt(sum(self.table.stderr[pick] ** 2 for pick in picks)))

    def of(self, plan: Plan) -> dict[str, float | None]:
        """Of a plan: `predicted_kl` and `predicted_stderr`, of one that was searched on as the search measured them.

        `corrected_kl` is the sum corrected by the other plans, with `corrected_stderr`; None for a plan that was
        searched on, and where fewer than four others were measured.
        """
        if plan.prediction is not None and plan.prediction["solver"] in _SEARCHES:
            found = plan.prediction["predicted_kl"], plan.prediction["predicted_stderr"]
            return dict(zip(_KEYS, (found[0], number(found[1]), None, None), strict=True))
        loss, stderr = self.summed(plan)
        corrected = _corrected(self._correction(plan), [loss], [stderr])
        return dict(zip(_KEYS, (loss, number(stderr), *(c if c is None else c[0] for c in corrected)), strict=True))

    def frontier(self, front: Frontier) -> dict[str, list[Any] | None]:
        """The same of every point of a frontier, by all plans that were measured."""
        loss, stderr = [float(x) for x in front.loss], _stderr(front)
        corrected = _corrected(self._correction(None), loss, stderr)
        return dict(zip(_KEYS, (loss, [*map(number, stderr)], *corrected), strict=True))

    @functools.cached_property
    def _pairs(self) -> list[tuple[Plan, float, float]]:
        """Measured plans with their sums and their KL, both above zero."""
        pairs = [(plan, self.summed(plan)[0], kl) for plan, kl in self.measured]
        return [(plan, loss, kl) for plan, loss, kl in pairs if min(loss, kl) > 0 and np.isfinite([loss, kl]).all()]

    def _correction(self, left_out: Plan | None) -> Correction | None:
        pairs = [(s, kl) for plan, s, kl in self._pairs if left_out is None or plan.choices != left_out.choices]
        if len({loss for loss, _ in pairs}) < MIN_PLANS:
            return None
        return Correction.fit(*np.asarray(pairs).T)


_SEARCHES = (Refine().name, Mixture().name)
_KEYS = ("predicted_kl", "predicted_stderr", "corrected_kl", "corrected_stderr")


def number(value: Any) -> Any:
    """None for what JSON cannot say (NaN, infinity)."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _corrected(
    correction: Correction | None, loss: list[float], stderr: list[float]
) -> tuple[list[float] | None, list[float | None] | None]:
    """Corrected sums and their errors: of the sums, and how far plans are from the correction."""
    if correction is None:
        return None, None
    summed = np.asarray(loss)
    found, spread = correction(summed)
    relative = np.hypot(np.divide(stderr, summed, out=np.zeros(len(summed)), where=summed > 0), spread)
    return found.tolist(), [number(error) for error in (found * relative).tolist()]


def _stderr(front: Frontier, chunk: int = 4096) -> list[float]:
    """Standard error of the sum at every point of a frontier, errors of weights taken as independent."""
    groups = np.arange(len(front.problem.names))
    result: list[float] = []
    for start in range(0, len(front), chunk):
        choices = front.choices(np.arange(start, min(start + chunk, len(front))))
        result += np.sqrt(front.problem.variance[groups, choices].sum(axis=1)).tolist()
    return result
