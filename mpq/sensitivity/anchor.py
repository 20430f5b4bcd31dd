"""The unit of a proxy score: nats per output, by one measured plan.

A proxy orders weights and schemes by a score c[l, s] >= 0 that has no unit. One plan, all weights at one scheme a, is
measured, and its loss is shared out as the scores say:

    loss_increase[l, s]  =  c[l, s] * KL(all weights at a) / sum_l c[l, a]                         [nats per output]

a is the scheme of median size among those that change something; of an even number, the smaller of the middle two. The
standard error is the relative standard error of that one KL, over documents (`mpq.estimate`), times the value: it says
how well the unit is known, and nothing about how well the scores order the weights.

What this cannot do: the factor is common to the whole table. It changes no ranking and no allocation, and where the
score grows with the error in another way than the loss does, schemes far from a are off.

Cost: two forward passes over the data, one of them of the original model.
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
    check_inputs,
    make_table,
    require_finite_entries,
    substituted_all,
    window_divergences,
)
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
      store: keeps the measurement.

    Raises:
      MpqError: a score is not finite, or the outputs of the measured plan are not.
    """
    require_finite_entries(scores, traced.weights, schemes)
    loss = stderr = np.zeros_like(scores)
    column = anchor_column(traced.weights, schemes, scores.sum(axis=0) > 0)
    if column is not None:
        sums = _measured(model, traced.weights, schemes[column], candidates, data, batch_size, store)
        counts = check_inputs(model, (), data)
        mean, error = mean_over_documents(sums_over_documents(sums, data.document), counts)
        share = scores / scores[:, column].sum()
        loss = share * max(float(mean), 0.0)  # a KL of nothing may come out below 0 by rounding
        stderr = np.where(share == 0, 0.0, share * float(error))
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
    size = lambda column: (sum(spec.size_bits(schemes[column]) for spec in weights), str(schemes[column]))
    columns = sorted(map(int, np.flatnonzero(changes)), key=size)
    return columns[(len(columns) - 1) // 2] if columns else None


def _measured(
    model: Model,
    weights: Sequence[WeightSpec],
    scheme: Scheme,
    candidates: CandidateSource,
    data: Dataset,
    batch_size: int,
    store: Store | None,
) -> np.ndarray:
    """`float64[windows]`: sum of the KL over each window, nats, with all weights at `scheme`."""
    name = f"anchor|{scheme}"
    kept = None if store is None else store.get(name)
    if kept is not None:
        return np.asarray(kept, np.float64)
    reference = Reference(model, data, batch_size, keep_bytes=0)  # asked once: there is nothing to keep
    params = substituted_all(model.params, weights, scheme, candidates)
    values = window_divergences(model, params, reference.batches())[: len(data.inputs)]
    if not np.isfinite(values).all():
        raise MpqError(
            f"all weights stored as {scheme} make the model's outputs NaN or infinite, and this plan gives the other "
            "scores their unit: leave this scheme out"
        )
    if store is not None:
        store.put(name, values.tolist())
    return values
