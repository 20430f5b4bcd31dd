"""What the activation metrics share: their interface, and the table of what windows sum up."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from mpq.activations.apply import RoundedActivation, choose_activations
from mpq.activations.ranges import ActivationRange
from mpq.activations.rows import ActivationSpec, require_schemes
from mpq.activations.scheme import ActivationScheme
from mpq.activations.table import ActivationTable
from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.store import Store
from mpq.trace import Trace
from mpq.types import MpqError


class ActivationMetric(Protocol):
    """A frozen dataclass of options that predicts the loss increase of every (row, scheme) pair.

    Laws: nats per output; 0 with stderr 0 where rounding changes nothing; the same key gives the same table;
    independent of the batch size up to rounding; padding never counts.
    """

    @property
    def name(self) -> str:
        """Key in `ACTIVATION_METRICS`."""
        ...

    def __call__(
        self,
        model: Model,
        traced: Trace,
        rows: Sequence[ActivationSpec],
        schemes: Sequence[ActivationScheme],
        data: Dataset,
        *,
        key: jax.Array,
        batch_size: int,
        store: Store | None = None,
        ranges: Mapping[str, ActivationRange] | None = None,
    ) -> ActivationTable:
        """Score every row at every scheme; static ones take their ranges from `ranges`, by path of the row."""
        ...


def rounded_rows(
    rows: Sequence[ActivationSpec],
    schemes: Sequence[ActivationScheme],
    ranges: Mapping[str, ActivationRange] | None,
) -> tuple[tuple[RoundedActivation, ...], ...]:
    """Every row under every scheme: `[rows][schemes]`.

    Raises:
      MpqError: a scheme does not suit a row, or a static range cannot be told.
    """
    require_schemes(rows, schemes)
    return tuple(
        tuple(one for scheme in schemes for one in choose_activations({row: scheme}, ranges or {})) for row in rows
    )


def make_activation_table(
    metric: str,
    model: Model,
    rows: Sequence[ActivationSpec],
    schemes: Sequence[ActivationScheme],
    data: Dataset,
    counts: np.ndarray,
    windows: np.ndarray,
) -> ActivationTable:
    """Means over outputs with standard errors over documents.

    Args:
      metric: name and options, for the table.
      model: gives the digest.
      rows: of the table.
      schemes: columns.
      data: what was scored on.
      counts: `[D]`, outputs that count in every document.
      windows: `float64[windows, rows, schemes]`, nats, summed over the outputs of each window that count.

    Raises:
      MpqError: an entry is NaN or infinite; names the row and the scheme.
    """
    mean, stderr = mean_over_documents(sums_over_documents(windows, data.document), counts)
    if len(bad := np.argwhere(~np.isfinite(mean))):
        row, column = bad[0]
        raise MpqError(
            f"the loss increase of activation {rows[row].path} at {schemes[column]} is {mean[row, column]}: rounded so "
            "coarsely it makes the model's outputs NaN or infinite; leave this scheme out"
        )
    stderr = np.where((windows == 0).all(axis=0), 0.0, stderr)  # what changes nothing costs nothing: that is certain
    digests = (model.digest, data.digest)
    kinds = sorted({"static" if scheme.is_calibrated else "dynamic" for scheme in schemes})
    return ActivationTable(tuple(rows), tuple(schemes), mean, stderr, metric, " and ".join(kinds), *digests)
