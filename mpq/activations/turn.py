"""Activations rotated where they are rounded: a value far above the rest is spread over all features (R4).

    x W = (x Q)(Q^T W),     Q a randomized Hadamard matrix

QuaRot's online Hadamard transform (Ashkboos et al. 2024, arXiv:2404.00456, section 4, stage 1c), for inputs that no
earlier weight can rotate: what down_proj reads is a product of gates, with values a hundred times the others in single
features. One of them takes n^-1/2 of its size in each of n features after rotation, so that a scale for a token, or a
static range of a whole tensor, need not span it. The weights are rotated once; x Q costs a few small matmuls for every
value, in the pass that rounds (`mpq.equalize.orthogonal`).

Differences from the paper: every input may be rotated, not that of down_proj alone; one is, if that lowers the error of
the outputs of all its readers under the plan's own schemes, rounded to nearest, on a few windows, by the measure of
`mpq.activations.smooth`. What smoothing divided is rotated after the division.
On the two small models measured, whose inputs of down_proj have such values (experiments/results/activations), it takes
nearly all of the loss of static ranges of whole tensors; with smoothing as well, which takes as much, still more. At 4
bits and a scale for every token about half of the loss remains, where smoothing hardly helps.
Fails on: weights that are looked up too (a tied embedding), which are left alone; runtimes, none of whose forms of
rounded activations has such a step.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation, choose_activations, turn_of
from mpq.activations.ranges import calibrate_activations
from mpq.activations.smooth import first_inputs, is_smoothable, output_error
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.trace import Trace
from mpq.types import LayerStats, Params, Scheme, WeightSpec


def turn_model(
    model: Model,
    traced: Trace,
    chosen: Sequence[RoundedActivation],
    choice: Mapping[str, Scheme],
    stats: Mapping[str, LayerStats],
    data: Dataset,
    batch_size: int,
    seed: int,
) -> tuple[Model, tuple[RoundedActivation, ...], dict[str, LayerStats]]:
    """Rotate the inputs for which that helps.

    Args:
      model: the original, or what smoothing made of it.
      traced: its trace.
      chosen: rows that are rounded; their static ranges are calibrated again.
      choice: path -> scheme of the weights.
      stats: of the inputs as they are rounded now.
      data: calibration set; its first windows are what errors are compared on.
      batch_size: windows a pass.
      seed: of the rotations.

    Returns:
      The model with rows of its weights rotated, which is to be quantized and run with the rows returned, and the
      statistics of its inputs; of those that were rotated `absmax` is an upper bound.
    """
    specs = {spec.path: spec for spec in traced.weights}
    turns = _search(model, traced, chosen, choice, specs, data, seed)
    factors = {one.spec.path: np.asarray(one.smooth, np.float32) for one in chosen if one.smooth is not None}
    static = [one.spec for one in chosen if one.scheme.is_calibrated]
    rotations = {one.spec.path: turn_of(one.spec.width, seed) for one in chosen if one.spec.path in turns}
    more = {"factors": factors, "turns": rotations}
    original = dataclasses.replace(model, params=_undivided(model.params, specs, chosen))
    ranges = calibrate_activations(original, traced, static, data, batch_size=batch_size, **more)
    rows = choose_activations({one.spec: one.scheme for one in chosen}, ranges, factors, turns)
    params, moved = dict(model.params), dict(stats)
    for one in rows:
        if one.turn is not None:
            rotation = turn_of(one.spec.width, one.turn)
            for path in one.spec.weights:
                w = np.asarray(specs[path].read(params), np.float64).swapaxes(-1, -2)
                params = specs[path].write(params, jnp.asarray(rotation(w).swapaxes(-1, -2), jnp.float32))
                moved |= {path: _turned(stats[path], rotation.matrix)} if path in stats else {}
    return dataclasses.replace(model, params=params), rows, moved


def _search(
    model: Model,
    traced: Trace,
    chosen: Sequence[RoundedActivation],
    choice: Mapping[str, Scheme],
    specs: Mapping[str, WeightSpec],
    data: Dataset,
    seed: int,
) -> dict[str, int]:
    """Rows whose error rotation lowers."""
    rows = [one for one in chosen if is_smoothable(one, specs)]
    original = dataclasses.replace(model, params=_undivided(model.params, specs, rows))
    inputs, found = first_inputs(original, traced, rows, data), {}
    for one in rows:
        rotation = turn_of(one.spec.width, seed)
        x = inputs[one.spec.path] / jnp.asarray(one.smooth or 1.0, jnp.float32)
        weights = [specs[path].read(model.params)[0] for path in one.spec.weights]
        schemes, same = tuple(choice[path] for path in one.spec.weights), jnp.ones(one.spec.width, jnp.float32)
        turned = [rotation.on_device(weight.T).T for weight in weights]
        before = output_error(one.scheme, schemes, x, weights, same)
        if float(output_error(one.scheme, schemes, rotation.on_device(x), turned, same)) < float(before):
            found[one.spec.path] = seed
    return found


def _undivided(
    params: Params, specs: Mapping[str, WeightSpec], chosen: Sequence[RoundedActivation]
) -> dict[str, jax.Array]:
    """Parameters of the model that divides nothing: weights without the factors of smoothing."""
    out = dict(params)
    for one in chosen:
        if one.smooth is not None:
            for path in one.spec.weights:
                out = specs[path].write(out, specs[path].read(out) / jnp.asarray(one.smooth, jnp.float32)[:, None])
    return out


def _turned(stats: LayerStats, q: np.ndarray) -> LayerStats:
    """Statistics of x Q: Q^T E[x xT] Q, and what the largest magnitudes can add up to."""
    gram = q.T @ stats.gram.astype(np.float64) @ q
    return dataclasses.replace(
        stats, gram=gram.astype(np.float32), absmax=(stats.absmax @ np.abs(q)).astype(np.float32)
    )
