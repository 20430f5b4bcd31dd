"""Measured KL of activations: round one, run the model, compare. The ground truth that the other metric approximates.

    loss_increase[l, s] = 1/N sum_t KL(p(. | x_<t) || p'(. | x_<t)),   p' with value l alone replaced by its rounding

over the N outputs of the data that count, in nats per output; the standard error is over documents (`mpq.estimate`).
Weights stay as they are. It is the one-at-a-time measurement of `mpq.sensitivity.MeasuredKL`, of values instead of
weights.

One program serves all rows and bits of a kind of scheme: it takes the largest code of every row as an array, 0 for a
row that is left as it is. The original's outputs come from the same program, so what rounding does not change has KL 0
to the bit.

Cost: one forward pass for every (row, scheme) pair, and one for every kind of scheme; memory for the original's outputs
of one batch. Where windows share a read, such as learned positions, a batch is worked off window by window.
Fails on: interactions. The sum over rows is the loss of rounding them all only as far as their errors do not add up.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.base import make_activation_table, rounded_rows
from mpq.activations.ranges import ActivationRange
from mpq.activations.rows import ActivationSpec, replacing
from mpq.activations.scheme import ActivationScheme, Kind, fake_quantize
from mpq.activations.table import ActivationTable
from mpq.evaluate import nan_if_any, require_finite, sum_counted
from mpq.files import digest_json
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import check_inputs, measured_on
from mpq.sensitivity.taps import in_windows, telling_windows
from mpq.store import Store, kept
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params


@dataclasses.dataclass(frozen=True)
class ActivationKL:
    """Measured KL to the original model."""

    @property
    def name(self) -> str:
        """`kl`."""
        return "kl"

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
        """Measure every row at every scheme.

        Args:
          model: gives the function and the parameters.
          traced: the model's trace.
          rows: of the table, from this trace.
          schemes: columns of the table.
          data: windows to measure on.
          key: not used; the measurement is deterministic.
          batch_size: windows per forward pass.
          store: finished items, one per batch, row and scheme.
          ranges: of static schemes, by path of the row.

        Raises:
          MpqError: no output counts, a weight is not finite, a scheme does not suit a row, a static range cannot be
            told, or outputs are not finite.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        chosen = rounded_rows(rows, schemes, ranges)
        shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
        measure = _Measure(model, shaped, tuple(rows), data.source)
        on = measured_on(model, traced, data, batch_size) | {"rows": digest_json(rows), "item": "activation_kl"}
        by_kind = sorted(range(len(schemes)), key=lambda column: schemes[column].kind)
        starts = range(0, len(data.inputs), batch_size)
        batches = zip(starts, data.batches(batch_size), strict=True)
        windows = np.zeros((len(data.inputs), len(rows), len(schemes)))
        pairs = itertools.product(batches, by_kind, range(len(rows)))
        total = len(starts) * len(rows) * len(schemes)
        for (start, batch), column, row in track(pairs, "activations kl", total):
            stop, scheme = min(start + batch_size, len(data.inputs)), schemes[column]
            one = chosen[row][column]
            item = functools.partial(measure.divergences, batch, row, one, stop - start)
            inputs: dict[str, Any] = {"row": rows[row].path, "scheme": str(scheme), "windows": [start, stop]}
            inputs |= {} if one.limits is None else {"limits": [one.low, one.high]}
            inputs |= {} if one.columns is None else {"columns": one.columns}
            windows[start:stop, row, column] = kept(store, item, **on, **inputs)
        return make_activation_table(self.name, model, rows, schemes, data, counts, windows)


class _Measure:
    """Divergences from the original, whose outputs on the last batch and kind asked for are kept."""

    def __init__(self, model: Model, traced: Trace, rows: tuple[ActivationSpec, ...], source: str):
        self._model, self._traced, self._rows, self._source = model, traced, rows, source
        self._kept: tuple[Batch, Kind, jax.Array] | None = None

    def divergences(self, batch: Batch, row: int, one: RoundedActivation, windows: int) -> list[float]:
        """Sum of KL over the outputs that count of the first so many windows, with one row rounded."""
        kind = one.scheme.kind
        p = self._original(batch, kind)
        top = np.zeros(len(self._rows), np.float32)
        top[row] = one.scheme.top
        limits = self._limits(kind)
        if one.limits is not None:
            limits[row][:] = one.low, one.high
        columns = self._columns(kind)
        if one.columns is not None:
            columns[row][list(one.columns)] = True
        return self._sums(batch, p, self._outputs(batch, kind, top, limits, columns)).tolist()[:windows]

    def _limits(self, kind: Kind) -> list[np.ndarray]:
        """Room for the ends of every row, `float32[2, parts]`."""
        return [np.zeros((2, row.heads if kind.granularity == "head" else 1), np.float32) for row in self._rows]

    def _columns(self, kind: Kind) -> list[np.ndarray]:
        """Room for the outliers of every row, `bool[width]`, if the kind has fixed ones."""
        return [np.zeros(row.width if kind.fixed else 0, bool) for row in self._rows]

    def _original(self, batch: Batch, kind: Kind) -> jax.Array:
        if self._kept is None or self._kept[0] is not batch or self._kept[1] != kind:
            self._kept = None  # frees the old outputs before the new ones are made
            p = self._outputs(
                batch, kind, np.zeros(len(self._rows), np.float32), self._limits(kind), self._columns(kind)
            )
            failed = nan_if_any(p, jnp.asarray(self._model.task.counted(batch.mask)))
            require_finite(np.asarray(failed), self._model.params, self._source)
            self._kept = batch, kind, p
        return self._kept[2]

    def _outputs(
        self, batch: Batch, kind: Kind, top: np.ndarray, limits: list[np.ndarray], columns: list[np.ndarray]
    ) -> jax.Array:
        model, given = self._model, (batch.inputs, batch.mask, top, limits, columns)
        return rounded_outputs(self._traced, self._rows, kind, model.task, model.params, *given)

    def _sums(self, batch: Batch, p: jax.Array, q: jax.Array) -> np.ndarray:
        task = self._model.task
        return np.asarray(_divergences(task, p, q, task.counted(batch.mask)), np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def rounded_outputs(
    traced: Trace,
    rows: tuple[ActivationSpec, ...],
    kind: Kind,
    task: Task,
    params: Params,
    inputs: jax.Array,
    mask: jax.Array,
    top: jax.Array,
    limits: Sequence[jax.Array],
    columns: Sequence[jax.Array],
) -> jax.Array:
    """Distributions of the outputs with rows rounded. Compiles once for all rows and bits of a kind.

    Args:
      traced: the model, traced for these inputs: what `telling_windows` gives.
      rows: what may be rounded.
      kind: of the schemes.
      task: what the outputs mean.
      params: the model's.
      inputs: `[windows, ...]`.
      mask: `bool[windows, ...]`, where they are real.
      top: `float32[rows]`, the largest code of every row, `ActivationScheme.top`; 0: the row is left as it is.
      limits: `float32[2, parts]` of every row, ends of its range; of a dynamic kind they are not read.
      columns: `bool[width]` of every row, what stays in floating point; read of a kind with fixed outliers alone.

    Returns:
      `float32[windows, ..., d]`.
    """

    def outputs(inputs: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        def change(row: int, x: jax.Array) -> jax.Array:
            ends = (limits[row][0], limits[row][1])
            fixed: dict[str, Any] = {"limits": ends, "columns": columns[row]}
            rounded = lambda x: fake_quantize(x, kind, top[row], heads=rows[row].heads, real=mask, **fixed)
            return jax.lax.cond(top[row] > 0, rounded, lambda x: x, x)

        return {"q": task.distribution(traced.evaluate(params, inputs, replacing(rows, change)))}

    return in_windows(traced, outputs, inputs, mask)["q"]


@functools.partial(jax.jit, static_argnums=0)
def _divergences(task: Task, p: jax.Array, q: jax.Array, counted: Any) -> jax.Array:
    """`float32[windows]`: KL summed over the outputs that count; 0 to the bit where `q` is `p`."""
    return sum_counted(jnp.asarray(task.divergence(p, q)), counted)
