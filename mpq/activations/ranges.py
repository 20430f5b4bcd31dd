"""What one streamed pass learns of activations: a histogram of every row's values, and the range of every window.

A histogram's bins are equal, and its ends are powers of two: the least 2^e that all values lie below. Where a larger
value comes, neighbouring bins are added up, which is exact, and a value falls into the same bin at whatever time the
ends were moved. So the numbers do not depend on the batching to the bit, and histograms can be merged.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.rows import ActivationSpec
from mpq.equalize.orthogonal import Rotation
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import check_inputs
from mpq.sensitivity.taps import telling_windows
from mpq.trace import Site, Trace
from mpq.types import MpqError, Params

BINS = 8192
"""Of a histogram from -2^e to 2^e: a quarter of them or more lie between 0 and the largest magnitude."""

LEAST_EXPONENT = -100
"""Of a histogram's ends, so that the width of a bin is a normal number of float32."""

DRIFT = 0.1
"""Relative difference of the ranges of both halves of the windows from which on it is told, if significant."""


@dataclasses.dataclass(frozen=True, eq=False)
class ActivationRange:
    """The values that one row took on calibration data. A part is one head of it, or all of a row without heads.

    Attributes:
      spec: the row.
      counts: `int64[parts, BINS]`, values in the bins of width `2**exponent * 2 / BINS` from `-2**exponent` on.
      exponent: of the ends; the least for which all values lie between them.
      low, high: `float32[windows, parts]`, least and largest value of every window, in the order of the data;
        `inf` and `-inf` of a window in which the row was never computed.
      largest: `float32[width]`, the largest magnitude of every feature.
    """

    spec: ActivationSpec
    counts: np.ndarray
    exponent: int
    low: np.ndarray
    high: np.ndarray
    largest: np.ndarray

    @property
    def values(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    @property
    def extremes(self) -> tuple[float, float]:
        """Least and largest value of all."""
        return float(self.low.min()), float(self.high.max())

    @property
    def magnitudes(self) -> np.ndarray:
        """`float64[windows]`, largest |value| of every window that has one."""
        seen = np.isfinite(self.low).all(axis=1)
        return np.maximum(np.abs(self.low[seen]), np.abs(self.high[seen])).max(axis=1).astype(np.float64)

    @property
    def change(self) -> float | None:
        """By how much the range of the later half of the windows differs from the earlier's, relative to it.

        Ranges are compared by their geometric means. None of fewer than four windows.
        """
        found = self._halves
        return None if found is None else float(np.expm1(found[0]))

    @property
    def drift(self) -> float | None:
        """`change`, where the halves can be told apart; else None.

        That is by `DRIFT` or more, and by four standard errors of the difference of logarithms (Welch 1947, Biometrika
        34).
        """
        found, relative = self._halves, self.change
        if found is None or relative is None:
            return None
        return relative if abs(found[0]) > 4 * found[1] and abs(relative) > DRIFT else None

    @property
    def _halves(self) -> tuple[float, float] | None:
        """Difference of the halves' mean logarithms, and its standard error."""
        logs = np.log(np.maximum(self.magnitudes, np.finfo(np.float32).tiny))
        first, second = np.array_split(logs, 2)
        if min(len(first), len(second)) < 2:
            return None
        error = np.sqrt(first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second))
        return float(second.mean() - first.mean()), float(error)

    def merged(self, other: "ActivationRange") -> "ActivationRange":
        """Of both data, this one's windows first.

        Raises:
          MpqError: it is another row.
        """
        if self.spec != other.spec:
            raise MpqError(f"ranges of {self.spec.path} and of {other.spec.path} cannot be merged: they differ")
        exponent = max(self.exponent, other.exponent)
        counts = rebinned(self.counts, exponent - self.exponent) + rebinned(other.counts, exponent - other.exponent)
        join = lambda a, b: np.concatenate([a, b])
        ends = join(self.low, other.low), join(self.high, other.high)
        return ActivationRange(self.spec, counts, exponent, *ends, np.maximum(self.largest, other.largest))


class _State(NamedTuple):
    """Of one row and batch, as `ActivationRange`; `finite`: whether all values are."""

    counts: jax.Array
    exponent: jax.Array
    low: jax.Array
    high: jax.Array
    largest: jax.Array
    finite: jax.Array


def calibrate_activations(
    model: Model,
    traced: Trace,
    rows: Sequence[ActivationSpec],
    data: Dataset,
    *,
    batch_size: int,
    factors: Mapping[str, np.ndarray] | None = None,
    turns: Mapping[str, Rotation] | None = None,
) -> dict[str, ActivationRange]:
    """Histograms and ranges of activations and cached keys and values.

    Args:
      model: gives the parameters.
      traced: its trace.
      rows: of this trace.
      data: the calibration set; padding never counts.
      batch_size: windows a pass. It changes nothing.
      factors: by path of the row, `float32[width]` that its values are divided by first (`mpq.activations.smooth`).
      turns: by path of the row, what its values go through then (`mpq.activations.turn`).

    Returns:
      Path of the row -> its values. Without rows the model is not run.

    Raises:
      MpqError: no output counts, a weight is not finite, or a value is not, which is named.
    """
    if not rows:
        return {}
    check_inputs(model, traced.weights, data)
    shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
    size, turned = shaped.inputs.shape[0], tuple((turns or {}).items())
    parts: dict[str, list[_State]] = {row.path: [] for row in rows}
    totals: dict[str, tuple[np.ndarray, int]] = {
        row.path: (np.zeros((max(row.heads, 1), BINS), np.int64), LEAST_EXPONENT) for row in rows
    }
    for number, batch in enumerate(track(data.batches(size), "calibrate activations", -(-len(data.inputs) // size))):
        found = jax.device_get(
            _states(shaped, tuple(rows), turned, model.params, batch.inputs, batch.mask, dict(factors or {}))
        )
        for row in rows:
            state = found[row.path]
            if not state.finite:
                raise MpqError(
                    f"a value of {row.path} is not finite in batch {number} of {data.source}: check the model on these "
                    "inputs"
                )
            counts, exponent = totals[row.path]
            common = max(exponent, int(state.exponent))
            counts = rebinned(counts, common - exponent) + rebinned(
                state.counts.astype(np.int64), common - int(state.exponent)
            )
            totals[row.path] = counts, common
            parts[row.path].append(state)
    windows = len(data.inputs)
    join = lambda arrays: np.concatenate(arrays)[:windows]
    return {
        row.path: ActivationRange(
            row,
            *totals[row.path],
            join([s.low for s in parts[row.path]]),
            join([s.high for s in parts[row.path]]),
            np.max([s.largest for s in parts[row.path]], axis=0),
        )
        for row in rows
    }


def rebinned(counts: np.ndarray, times: int) -> np.ndarray:
    """`int64[..., BINS]` with the ends doubled so many times: neighbouring bins added up."""
    moved = np.zeros_like(counts)
    np.add.at(moved.T, _bins_after(np.int32(min(times, 31))), counts.T)
    return moved


def drifting(ranges: Mapping[str, ActivationRange]) -> list[str]:
    """A sentence for every row whose range differs between the halves of the calibration data, or rests on little."""
    told = []
    for path, found in ranges.items():
        windows = len(found.magnitudes)
        if windows < 8:
            told.append(f"{path}: {windows} windows are few to know a range from; calibrate on 8 or more")
        elif (drift := found.drift) is not None:
            told.append(
                f"{path}: its range is {100 * drift:+.0f} % in the later half of the calibration data; calibrate on "
                "more of what the model will see, or take a dynamic scheme"
            )
    return told


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _states(
    traced: Trace,
    rows: tuple[ActivationSpec, ...],
    turns: tuple[tuple[str, Rotation], ...],
    params: Params,
    inputs: jax.Array,
    mask: jax.Array,
    factors: dict[str, jax.Array],
) -> dict[str, _State]:
    """Values of all rows in one batch."""
    by_input = {row.at: row for row in rows if row.kind == "activation"}
    by_output = {row.at: row for row in rows if row.kind == "kv"}
    first = {}
    for site in traced.sites:  # readers of one value see it once each; the first of them counts it
        if site.use.kind != "embedding":
            first.setdefault(site.use.input, site)
    windows = mask.shape[0]

    def start(row: ActivationSpec) -> _State:
        parts = max(row.heads, 1)
        ends = jnp.full((windows, parts), jnp.inf, jnp.float32)
        counts = jnp.zeros((parts, BINS), jnp.int32)
        largest = jnp.zeros(row.width, jnp.float32)
        return _State(counts, jnp.int32(LEAST_EXPONENT), ends, -ends, largest, jnp.bool_(True))

    def before(site: Site, x: jax.Array, state: dict[str, _State]) -> dict[str, _State]:
        row = by_input.get(site.use.input)
        if row is None or first[site.use.input] is not site:
            return state
        values = site.value_view(x.shape)(x)
        if row.path in factors:
            values = values / factors[row.path].astype(values.dtype)
        if row.path in dict(turns):
            values = dict(turns)[row.path].on_device(values)
        return state | {row.path: _add(state[row.path], values, mask)}

    def after(site: Site, y: jax.Array, state: dict[str, _State]) -> dict[str, _State]:
        row = by_output.get(site.spec.path)
        return state if row is None else state | {row.path: _add(state[row.path], site.outputs_matrix(y), mask)}

    return traced.accumulate(params, inputs, {row.path: start(row) for row in rows}, before, after)[1]


def _add(state: _State, x: jax.Array, mask: jax.Array) -> _State:
    """`state` after values `[batch, positions, width]`; of positions that cannot be told apart all count."""
    (batch, positions, width), windows, parts = x.shape, len(mask), len(state.counts)
    per_window = positions // windows if positions % windows == 0 else 0
    rows = jnp.ones((1, positions), bool)
    if per_window:
        rows = mask if mask.ndim == 2 and mask.size == positions else mask.reshape(windows, -1).any(axis=1)[:, None]
        rows = jnp.broadcast_to(rows, (windows, per_window))
    split = (batch, *rows.shape, parts, width // parts)
    values, counted = x.astype(jnp.float32).reshape(split), rows[None, :, :, None, None]
    inside = jnp.where(counted, values, 0.0)
    low = jnp.where(counted, values, jnp.inf).min(axis=(0, 2, 4))
    high = jnp.where(counted, values, -jnp.inf).max(axis=(0, 2, 4))
    finite = jnp.isfinite(inside).all()
    largest = jnp.where(finite, jnp.abs(inside).max(), 0.0)
    exponent = jnp.maximum(state.exponent, jnp.where(largest > 0, jnp.frexp(largest)[1], LEAST_EXPONENT))
    moved = _bins_after(jnp.minimum(exponent - state.exponent, 31))
    counts = jnp.zeros_like(state.counts).at[:, moved].add(state.counts)
    per_unit = jnp.ldexp(jnp.float32(BINS // 2), -exponent)
    bins = jnp.clip(jnp.floor(inside * per_unit).astype(jnp.int32) + BINS // 2, 0, BINS - 1)
    ones = jnp.broadcast_to(counted, values.shape).astype(jnp.int32)
    part = jnp.broadcast_to(jnp.arange(parts)[:, None], values.shape)
    counts = counts.at[part, bins].add(ones)
    widest = lambda ends: jnp.broadcast_to(ends, state.low.shape)
    return _State(
        counts,
        exponent,
        jnp.minimum(state.low, widest(low)),
        jnp.maximum(state.high, widest(high)),
        jnp.maximum(state.largest, jnp.abs(inside).max(axis=(0, 1, 2)).reshape(width)),
        state.finite & finite,
    )


def _bins_after(times: Any) -> Any:
    """`int[BINS]`: the bin that each bin is part of once the ends were doubled so many times, 31 at most.

    An arithmetic shift rounds towards minus infinity, in NumPy and in JAX.
    """
    return (np.arange(-(BINS // 2), BINS // 2, dtype=np.int32) >> times) + BINS // 2
