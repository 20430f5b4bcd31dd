"""The unit of a proxy score: nats per output, by one measured plan.

A proxy orders weights and schemes by a score c[l, s] >= 0 that has no unit. One plan, all weights at one scheme a, is
measured, and its loss is shared out as the scores say:

    loss_increase[l, s]  =  c[l, s] * KL(all weights at a) / sum_l c[l, a]                         [nats per output]

a is the scheme of median size among those that change something; of an even number, the smaller of the middle two. The
standard error is the relative standard error of that one KL, over documents (`mpq.estimate`), times the value: it says
how well the unit is known, and nothing about how well the scores order the weights.

What this cannot do: the factor is common to the whole table. It changes no ranking and no allocation, and where the
score grows with the error in another way than the loss does, schemes far from a are off.

A score that compares weights and knows nothing of the scheme has no such factor; for it a is every scheme s in turn,
each with a plan of its own (`anchored_columns`).

Cost: two forward passes over the data, one of them of the original model; or one for every scheme, and one of the
original.
"""

from collections.abc import Sequence

import numpy as np

from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.evaluate import Reference
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import (
    CandidateSource,
    Store,
    by_size,
    candidates_digest,
    check_inputs,
    make_table,
    measured_on,
    require_finite_entries,
    substituted_all,
    window_divergences,
)
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import MpqError, Scheme, SensitivityTable, WeightSpec


def anchored_table(
    label: str,
    scores: np.ndarray,
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    *,
    batch_size: int,
    store: Store | None,
) -> SensitivityTable:
    """The table of a proxy, in nats.

    Args:
      label: the metric's name and options.
      scores: `float64[weights, schemes]`, not negative, 0 where the candidate is the weight itself.
      model: gives the function and the original parameters.
      traced: gives the weights.
      schemes: columns of the table.
      candidates: quantized weights.
      data: what the plan is measured on.
      batch_size: windows per pass.
      store: keeps the measurement, which all proxies share.

    Raises:
      MpqError: a score is not finite, or the outputs of the measured plan are not.
    """
    require_finite_entries(scores, traced.weights, schemes)
    loss = stderr = np.zeros_like(scores)
    column = anchor_column(traced.weights, schemes, scores.sum(axis=0) > 0)
    if column is not None:
        reference = Reference(model, data, batch_size, keep_bytes=0)  # asked once: there is nothing to keep
        kl, error = _measured(reference, traced, schemes[column], candidates, store)
        loss, stderr = _shared_out(scores / scores[:, column].sum(), kl, error)
    return make_table(label, model, traced.weights, schemes, candidates, data, loss, stderr)


def anchored_columns(
    label: str,
    scores: np.ndarray,
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    *,
    batch_size: int,
    store: Store | None,
) -> SensitivityTable:
    """The table of a score that only compares weights: every scheme's measured plan is shared out in its own column.

    Args:
      label: the metric's name and options.
      scores: `float64[weights, schemes]`, not negative, 0 where the candidate is the weight itself.
      model: gives the function and the original parameters.
      traced: gives the weights.
      schemes: columns of the table.
      candidates: quantized weights.
      data: what the plans are measured on.
      batch_size: windows per pass.
      store: keeps the measurements, one a scheme.

    Raises:
      MpqError: a score is not finite, or the outputs of a measured plan are not.
    """
    require_finite_entries(scores, traced.weights, schemes)
    loss, stderr = np.zeros_like(scores), np.zeros_like(scores)
    reference = Reference(model, data, batch_size)
    for column in map(int, np.flatnonzero(scores.sum(axis=0) > 0)):
        kl, error = _measured(reference, traced, schemes[column], candidates, store)
        loss[:, column], stderr[:, column] = _shared_out(scores[:, column] / scores[:, column].sum(), kl, error)
    return make_table(label, model, traced.weights, schemes, candidates, data, loss, stderr)


def anchor_column(weights: Sequence[WeightSpec], schemes: Sequence[Scheme], changes: np.ndarray) -> int | None:
    """Which scheme is measured, whatever the order of the schemes.

    Args:
      weights: rows of the table.
      schemes: columns.
      changes: `bool[schemes]`, whether a weight at the scheme has a score.

    Returns:
      The column of median size among those that change something; None if none does.
    """
    columns = [column for column in by_size(weights, schemes) if changes[column]]
    return columns[(len(columns) - 1) // 2] if columns else None


def _shared_out(share: np.ndarray, kl: float, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Parts of a measured KL and their standard errors; no part is certain, also where the error is unknown."""
    return share * kl, np.where(share == 0, 0.0, share * error)


def _measured(
    reference: Reference,
    traced: Trace,
    scheme: Scheme,
    candidates: CandidateSource,
    store: Store | None,
) -> tuple[float, float]:
    """KL of the plan with all weights at `scheme`, nats per output, and its standard error."""
    model, data = reference.model, reference.data

    def make() -> list[float]:
        params = substituted_all(model.params, traced.weights, scheme, candidates)
        values = window_divergences(model, params, reference.batches())[: len(data.inputs)]
        if not np.isfinite(values).all():
            raise MpqError(
                f"all weights stored as {scheme} make the model's outputs NaN or infinite, and this plan gives the "
                "other scores their unit: leave this scheme out"
            )
        return values.tolist()

    on = measured_on(model, traced, data, reference.batch_size)
    among = candidates_digest(traced.weights, [scheme], candidates)
    values = kept(store, make, item="anchor", **on, candidates=among)
    mean, error = mean_over_documents(sums_over_documents(values, data.document), check_inputs(model, (), data))
    return max(float(mean), 0.0), float(error)  # a KL of nothing may come out below 0 by rounding
