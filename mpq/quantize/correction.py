"""Bias correction, and norms that are estimated again: what rounding does to a layer's output on average is taken back.

Rounded weights W' and inputs x' shift what a layer gives by E[x' W'] - E[x W], a constant for every channel, and
stretch it. Errors of that kind add up over layers and over positions, where others average out. On calibration data,
layer by layer in the order of execution, each with all that was corrected before it in front of it,

    b' = b - (E[y'] - E[y])

for a bias b that is added to y, and m' = m + (E[y'] - E[y]) for the mean of a norm. With `norms`, a norm's scale g,
where one follows, is multiplied by a = std(y) / std(y') too, so that mean and deviation of every channel are what they
were: statistics of the norm estimated again, relative to the original's on the same data, so that the sample's own
error is in neither. It is the empirical form of Nagel et al. 2019 (arXiv:1906.04721, section 4.2).

Differences from the paper: where a parameter lies that takes the shift up is found and proved by running the model
(`mpq.equalize.shifts`); means of norms count among them, so that networks whose norms are not folded can be corrected.
Cost: one forward pass over the calibration data for every layer that is corrected, and two of the original.
Fails on: layers that no bias and no norm follows, which stay as they are; calibration data unlike the model's inputs.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation, with_activations
from mpq.calibrate import counted_rows
from mpq.equalize.shifts import Shift
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.trace import Site, Trace
from mpq.types import Params

SUFFIX = "+correct"
"""Of the name of a rounding algorithm whose result is corrected."""
ROUNDING = 1e-5
"""A variance below this share of the mean square is what sums in float32 leave of one that is 0."""

LARGEST = 4.0
"""A factor of a norm's scale is at most this, and at least its inverse."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of one layer's output.

    Attributes:
      mean: `float64[n]`.
      deviation: `float64[n]`, its standard deviation.
    """

    mean: np.ndarray
    deviation: np.ndarray


def correct_biases(
    model: Model,
    traced: Trace,
    params: Params,
    shifts: Sequence[Shift],
    data: Dataset,
    *,
    activations: Sequence[RoundedActivation] = (),
    norms: bool = False,
    batch_size: int,
) -> dict[str, jax.Array]:
    """The rounded parameters with corrected vectors.

    Args:
      model: the original; its dtypes in the checkpoint are those that vectors are rounded to.
      traced: its trace.
      params: of the rounded model.
      shifts: what may be corrected, of `find_shifts`, in the order of execution.
      data: the calibration set; padding never counts.
      activations: what the rounded model rounds beside.
      norms: whether the scales of norms are estimated again, too.
      batch_size: inputs a pass.

    Returns:
      `params`, of which only vectors named in `shifts` are others.
    """
    shaped = traced.on((batch_size, *data.inputs.shape[1:]))
    paths = tuple(shift.weight for shift in shifts)
    rounded = shaped
    if activations:
        window = data.inputs.shape[1] if data.mask.ndim == 2 else None
        rounded = with_activations(model, traced, activations).trace(batch_size, window)
    wanted = moments_of(shaped, shifts, model.params, data, batch_size)
    means = {path: one.mean for path, one in wanted.items()}
    out = dict(params)
    for shift in track(shifts, "correct biases", len(shifts)):
        got = moments(rounded, paths, out, data, means, batch_size)[shift.weight]
        out |= corrected(shift, out, model.stored, wanted[shift.weight], got, norms)
    return out


def corrected(
    shift: Shift, params: Params, stored: Mapping[str, str], wanted: Moments, got: Moments, norms: bool
) -> dict[str, jax.Array]:
    """The vectors of one layer, as they will be stored.

    With t all that is added to y', and g the gain: (a (y' - E[y']) + E[y] + t) g = (y' + (E[y] + t) / a - E[y']) a g.
    """
    factor = np.ones(shift.width)
    if norms and shift.gain is not None:
        tells = (wanted.deviation > 0) & (got.deviation > 0)
        ratio = wanted.deviation / np.where(tells, got.deviation, 1.0)
        factor = np.where(tells, np.clip(ratio, 1 / LARGEST, LARGEST), 1.0)
    before = np.asarray(shift.offset(params)).astype(np.float64)
    moved = shift.moved(params, np.float32((wanted.mean + before) / factor - got.mean - before))
    changed = {shift.vectors[0]: moved[shift.vectors[0]]}
    if shift.gain is not None and (factor != 1).any():
        changed[shift.gain] = params[shift.gain] * jnp.asarray(factor, jnp.float32)
    # What is corrected next has to see what will be stored.
    return {path: v.astype(stored.get(path, v.dtype)).astype(params[path].dtype) for path, v in changed.items()}


def moments_of(
    traced: Trace, shifts: Sequence[Shift], params: Params, data: Dataset, batch_size: int
) -> dict[str, Moments]:
    """`moments` of the layers in front of the shifts, when nothing near their means is known yet."""
    paths = tuple(shift.weight for shift in shifts)
    about = {shift.weight: np.zeros(shift.width) for shift in shifts}
    means = {path: one.mean for path, one in moments(traced, paths, params, data, about, batch_size).items()}
    return moments(traced, paths, params, data, means, batch_size)


def moments(
    traced: Trace,
    paths: tuple[str, ...],
    params: Params,
    data: Dataset,
    about: Mapping[str, np.ndarray],
    batch_size: int,
) -> dict[str, Moments]:
    """Mean and deviation of what weights give, over the positions that count.

    Args:
      traced: the model, for batches of this size.
      paths: of the weights, each read once.
      params: the model's.
      data: the inputs.
      about: path -> `float64[n]`, values near the means: squares are of differences from them, and lose no digits.
      batch_size: inputs a pass.
    """
    centers = {path: jnp.asarray(about[path], jnp.float32) for path in paths}
    sums = {path: np.zeros((2, len(about[path]))) for path in paths}
    counts = dict.fromkeys(paths, 0)
    for batch in data.batches(batch_size):
        for path, (first, second, count) in jax.device_get(
            _sums(traced, paths, params, centers, batch.inputs, batch.mask)
        ).items():
            sums[path] += np.stack([first, second]).astype(np.float64)
            counts[path] += int(count)
    found = {}
    for path in paths:
        first, second = sums[path] / max(counts[path], 1)
        mean = np.asarray(centers[path]).astype(np.float64) + first
        variance = second - first**2
        found[path] = Moments(mean, np.sqrt(np.where(variance > ROUNDING * second, variance, 0.0)))
    return found


_State = dict[str, tuple[jax.Array, jax.Array, jax.Array]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    traced: Trace,
    paths: tuple[str, ...],
    params: Params,
    centers: Mapping[str, jax.Array],
    inputs: jax.Array,
    mask: jax.Array,
) -> _State:
    """Sums of one batch: of differences, of their squares, and of the positions that count."""

    def after(site: Site, y: jax.Array, state: _State) -> _State:
        path = site.spec.path
        if path not in paths:
            return state
        counted = counted_rows(site, mask)
        rows = site.outputs_matrix(y)[0].astype(jnp.float32) - centers[path]
        rows = jnp.where(counted[:, None], rows, 0.0)
        first, second, count = state[path]
        added = counted.sum(dtype=jnp.int32)
        return state | {path: (first + rows.sum(axis=0), second + jnp.square(rows).sum(axis=0), count + added)}

    zeros = {path: (jnp.zeros(len(c)), jnp.zeros(len(c)), jnp.int32(0)) for path, c in centers.items()}
    return traced.accumulate(params, inputs, zeros, lambda site, x, state: state, after)[1]
