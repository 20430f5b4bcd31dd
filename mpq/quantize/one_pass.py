"""Biases and norms of many rounded models of one network, each corrected in one forward pass.

`mpq.quantize.correction` corrects layer by layer and runs the model anew for each. Where all calibration data fits one
batch, the moments of a layer's output are known before anything behind it is computed; what gives it the moments of the
original is what its corrected vectors will do,

    y'' = a (y' - E[y']) + E[y],        a = std(y) / std(y') where the scale of a norm takes it up, else 1

so the pass goes on with y'', and every layer sees all that was corrected before it. The moments then say what the
vectors have to be, by the same formula (Nagel et al. 2019, arXiv:1906.04721, section 4.2).

Differences from layer by layer: vectors are rounded to their stored dtype at the end, so that no layer makes up for
what that did to others. Cost: one forward pass a model over the data, three of the original.
Fails on: data that does not fit the memory as one batch.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.calibrate import counted_rows
from mpq.equalize.shifts import Shift
from mpq.files import digest_json
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.quantize.correction import LARGEST, ROUNDING, Moments, corrected, moments_of
from mpq.trace import Default, Site, Trace
from mpq.types import Params

_State = dict[str, tuple[jax.Array, jax.Array]]


class OnePass:
    """The correction of any rounded parameters of one model.

    Attributes:
      digest: of all that it does to parameters.
    """

    def __init__(self, model: Model, traced: Trace, shifts: Sequence[Shift], data: Dataset, *, norms: bool) -> None:
        """Measure the original.

        Args:
          model: the original.
          traced: its trace.
          shifts: what may be corrected, of `find_shifts`.
          data: the calibration set, one batch; padding never counts.
          norms: whether the scales of norms are estimated again, too.
        """
        rows = len(data.inputs)
        self.digest = digest_json([model.digest, data.digest, norms, [dataclasses.asdict(shift) for shift in shifts]])
        self._shifts, self._stored, self._norms = tuple(shifts), model.stored, norms
        self._traced = traced.on((rows, *data.inputs.shape[1:]))
        self._wanted = moments_of(self._traced, shifts, model.params, data, rows)
        (self._batch,) = data.batches(rows)
        self._targets = {
            path: (jnp.asarray(one.mean, jnp.float32), jnp.asarray(one.deviation, jnp.float32))
            for path, one in self._wanted.items()
        }

    def __call__(self, params: Params) -> dict[str, jax.Array]:
        """`params` of a rounded model, of which only vectors named in the shifts become others."""
        stretched = frozenset(shift.weight for shift in self._shifts if self._norms and shift.gain is not None)
        found = _moments(self._traced, stretched, params, self._targets, self._batch.inputs, self._batch.mask)
        out = dict(params)
        for shift in self._shifts:
            mean, deviation = (np.asarray(one).astype(np.float64) for one in found[shift.weight])
            got = Moments(mean, deviation)
            out |= corrected(shift, out, self._stored, self._wanted[shift.weight], got, self._norms)
        return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(
    traced: Trace,
    stretched: frozenset[str],
    params: Params,
    targets: Mapping[str, tuple[jax.Array, jax.Array]],
    inputs: jax.Array,
    mask: jax.Array,
) -> _State:
    """Means and deviations `float32[n]` of what the layers in `targets` give behind corrected ones."""

    def visit(site: Site, x: jax.Array, w: jax.Array, default: Default, state: _State) -> tuple[jax.Array, _State]:
        y, path = default(x, w), site.spec.path
        if path not in targets:
            return y, state
        mean, deviation = targets[path]
        # Differences from a value near the mean: their squares lose no digits.
        apart = site.outputs_matrix(y)[0].astype(jnp.float32) - mean
        counted = counted_rows(site, mask)[:, None]
        count = jnp.maximum(counted.sum().astype(jnp.float32), 1.0)
        average = lambda v: jnp.where(counted, v, 0.0).sum(axis=0) / count
        first, second = average(apart), average(jnp.square(apart))
        variance = second - jnp.square(first)
        found = jnp.sqrt(jnp.where(variance > ROUNDING * second, variance, 0.0))
        factor = jnp.ones_like(mean)
        if path in stretched:
            tells = (deviation > 0) & (found > 0)
            factor = jnp.where(tells, jnp.clip(deviation / jnp.where(tells, found, 1.0), 1 / LARGEST, LARGEST), 1.0)
        y = site.from_outputs_matrix(((apart - first) * factor + mean).astype(y.dtype)[None])
        return y, state | {path: (mean + first, found)}

    return traced.carry(params, inputs, dict(targets), visit)[1]
