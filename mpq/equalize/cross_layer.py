"""Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721): channels and what reads them get ranges alike.

    x W = (x / s)(s W),     s_i = sqrt(r1_i / r2_i)                                          (section 4.1)

makes the range r1_i of channel i of a value, or of the output column of the weight that makes it, and the range r2_i
of what reads the channel both sqrt(r1_i r2_i): one scale then serves a whole tensor better, and no channel is lost. The
factor goes into what makes the value, which `mpq.equalize.folds` finds and proves: a rectifier hands it on. Where a
weight is rounded with one scale for all of it, and a norm behind it takes factors of its columns up
(`mpq.equalize.shifts`), its columns get equal ranges as well, which costs nothing.

Differences from the paper: norms are not folded, so r1 of what a norm makes is the largest magnitude that the channel
has on calibration data, in place of the range of the weight before.
Fails on: weights with a scale for every column and activations that stay as they are, where rows that are alike buy
nothing and may cost; values that other layers read too, such as residual sums, which stay as they are.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from mpq.equalize.folds import Fold
from mpq.equalize.shifts import Shift
from mpq.models.model import Model
from mpq.trace import Trace
from mpq.types import LayerStats, Params, Scheme, WeightSpec

SWEEPS = 10
LARGEST = 1e3
"""A factor is at most this, and at least its inverse."""


def equalize(
    model: Model,
    traced: Trace,
    folds: Sequence[Fold],
    shifts: Sequence[Shift],
    choice: Mapping[str, Scheme],
    stats: Mapping[str, LayerStats],
) -> Model:
    """The same function with ranges alike.

    Args:
      model: the original.
      traced: its trace.
      folds: scales that can move, of `find_folds` with convolutions.
      shifts: norms behind weights, of `find_shifts`.
      choice: path -> scheme of the weights.
      stats: of the inputs of the original, for the largest magnitude of every channel.
    """
    weights, params = {spec.path: spec for spec in traced.weights}, dict(model.params)
    for shift in shifts:
        if shift.gain is not None and shift.weight in choice and choice[shift.weight].per_tensor:
            s = _bounded(_columns(params, weights[shift.weight]), 1.0)
            spec = weights[shift.weight]
            params = spec.write(params, spec.read(params) / s)
            params |= {path: params[path] / s for path in shift.vectors} | {shift.gain: params[shift.gain] * s}
    values = {fold.rows[0]: _channels(fold, 0, np.asarray(stats[fold.rows[0]].absmax[0])) for fold in folds}
    for _ in range(SWEEPS):
        largest = 1.0
        for fold in folds:
            made = values[fold.rows[0]] if fold.columns is None else _columns(params, weights[fold.columns])
            s = _bounded(made, _readers(params, weights, fold), power=0.5)
            params = fold.apply(params, weights, jnp.asarray(s))
            values[fold.rows[0]] = values[fold.rows[0]] / s
            largest = max(largest, float(s.max()), float(1 / s.min()))
        if largest < 1.01:
            break
    return dataclasses.replace(model, params=params)


def _columns(params: Params, spec: WeightSpec) -> np.ndarray:
    """`float32[n]`, the largest magnitude of every output column."""
    return np.abs(np.asarray(spec.read(params)[0], np.float32)).max(axis=0)


def _readers(params: Params, weights: Mapping[str, WeightSpec], fold: Fold) -> np.ndarray:
    """`float32[width]`, the largest magnitude of what reads every channel."""
    rows = [np.abs(np.asarray(weights[path].read(params)[0], np.float32)).max(axis=1) for path in fold.rows]
    return np.max([_channels(fold, number, row) for number, row in enumerate(rows)], axis=0)


def _channels(fold: Fold, number: int, rows: np.ndarray) -> np.ndarray:
    """`float32[width]`, the largest of the input rows of every channel."""
    found = np.zeros(fold.width, np.float32)
    np.maximum.at(found, np.array(fold.taps[number]) if fold.taps else np.arange(fold.width), rows)
    return found


def _bounded(made: np.ndarray, read: np.ndarray | float, power: float = 1.0) -> np.ndarray:
    """`(made / read) ** power`, about 1; 1 for a channel that is always 0, or that nothing reads."""
    used = (made > 0) & (np.asarray(read) > 0)
    ratio = np.where(used, made, 1.0) / np.where(used, read, 1.0)
    s = ratio**power
    middle = np.exp(np.log(s[used]).mean()) if used.any() else 1.0
    return np.where(used, np.clip(s / middle, 1 / LARGEST, LARGEST), 1.0).astype(np.float32)
