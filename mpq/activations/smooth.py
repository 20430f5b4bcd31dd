"""SmoothQuant: outliers of activations moved into weights, channel by channel (Xiao et al. 2023, arXiv:2211.10438).

    x W = (x / s)(s W),     s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)              (eq. 3 and 4)

`x` is divided where it is rounded, so nothing upstream has to take the factor in and no path of the model has to be
proved free of it: a norm, a product of gates or an attention may come before. The division costs one multiplication a
value, in the pass that rounds. The strength is searched for every row: of `STRENGTHS`, and of no smoothing, the one
with the least error of the outputs of all readers under the plan's own schemes, on a few windows: the squared error of
a token over the square of its output, for a token of huge outputs (a first token often is one) would drown the others.

Differences from the paper: alpha is searched by row, and the factor is not folded into the norm before.
Fails on: outliers of tokens instead of channels, which a scale for every token takes better; weights that are looked up
too (a tied embedding), which are left alone.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation, choose_activations
from mpq.activations.ranges import calibrate_activations
from mpq.activations.scheme import ActivationScheme, fake_quantize
from mpq.calibrate import divided
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.quantize.rtn import RTN
from mpq.trace import Default, Site, Trace, sole_input
from mpq.types import LayerStats, Params, Scheme, WeightSpec

STRENGTHS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LARGEST = 1e4
"""A factor is at most this, and at least its inverse."""

WINDOWS = 4


def search_smoothing(
    model: Model,
    traced: Trace,
    chosen: Sequence[RoundedActivation],
    choice: Mapping[str, Scheme],
    stats: Mapping[str, LayerStats],
    data: Dataset,
) -> dict[str, np.ndarray]:
    """The factors of every row for which smoothing helps.

    Args:
      model: gives the parameters.
      traced: its trace.
      chosen: rows that are rounded, and how.
      choice: path -> scheme of the weights.
      stats: `calibrate`'s, for the largest magnitude of every channel.
      data: calibration set; its first windows are what errors are compared on.

    Returns:
      Path of the row -> `float32[width]`, what `x` is divided by. Rows without an entry stay as they are.
    """
    specs = {spec.path: spec for spec in traced.weights}
    rows = [one for one in chosen if is_smoothable(one, specs)]
    inputs = first_inputs(model, traced, rows, data)
    found = {}
    for one in rows:
        weights = [specs[path].read(model.params)[0] for path in one.spec.weights]
        largest = np.asarray(stats[one.spec.weights[0]].absmax[0], np.float64)
        heaviest = np.max([np.abs(np.asarray(w, np.float64)).max(axis=1) for w in weights], axis=0)
        tried = [np.ones_like(largest), *(_factors(largest, heaviest, alpha) for alpha in STRENGTHS)]
        schemes = tuple(choice[path] for path in one.spec.weights)
        errors = [
            float(output_error(one.scheme, schemes, inputs[one.spec.path], weights, jnp.asarray(s))) for s in tried
        ]
        if best := int(np.argmin(errors)):
            found[one.spec.path] = tried[best]
    return found


def smooth_model(
    model: Model,
    traced: Trace,
    chosen: Sequence[RoundedActivation],
    choice: Mapping[str, Scheme],
    stats: Mapping[str, LayerStats],
    data: Dataset,
    batch_size: int,
) -> tuple[Model, tuple[RoundedActivation, ...], dict[str, LayerStats]]:
    """Search, and everything that follows from it.

    Args:
      model: the original.
      traced: its trace.
      chosen: rows that are rounded; their static ranges are calibrated again.
      choice: path -> scheme of the weights.
      stats: of the original's inputs.
      data: calibration set.
      batch_size: windows a pass.

    Returns:
      The model with its weights multiplied, which is to be quantized and run with the rows returned, and the statistics
      of its inputs.
    """
    factors = search_smoothing(model, traced, chosen, choice, stats, data)
    static = [one.spec for one in chosen if one.scheme.is_calibrated]
    ranges = calibrate_activations(model, traced, static, data, batch_size=batch_size, factors=factors)
    rows = choose_activations({one.spec: one.scheme for one in chosen}, ranges, factors)
    params = smooth_weights(model.params, traced.weights, rows, factors)
    return dataclasses.replace(model, params=params), rows, smooth_stats(stats, rows, factors)


def smooth_weights(
    params: Params,
    weights: Sequence[WeightSpec],
    chosen: Sequence[RoundedActivation],
    factors: Mapping[str, np.ndarray],
) -> dict[str, jax.Array]:
    """`params` whose weights are multiplied by the factors of what they read: for a model that divides by them."""
    specs, out = {spec.path: spec for spec in weights}, dict(params)
    for one in chosen:
        if one.spec.path in factors:
            for path in one.spec.weights:
                out = specs[path].write(out, specs[path].read(out) * jnp.asarray(factors[one.spec.path])[:, None])
    return out


def smooth_stats(
    stats: Mapping[str, LayerStats], chosen: Sequence[RoundedActivation], factors: Mapping[str, np.ndarray]
) -> dict[str, LayerStats]:
    """Statistics of the divided inputs."""
    out = dict(stats)
    for one in chosen:
        if one.spec.path in factors:
            new = divided(stats[one.spec.weights[0]], factors[one.spec.path])
            out |= dict.fromkeys(one.spec.weights, new)
    return out


def is_smoothable(one: RoundedActivation, specs: Mapping[str, WeightSpec]) -> bool:
    """Whether all reads of its weights are matmuls of this one value."""
    readers = [specs[path] for path in one.spec.weights]
    alone = all(sole_input(spec) == one.spec.at for spec in readers)
    return one.spec.kind == "activation" and alone and one.spec.batch == 1


def _factors(largest: np.ndarray, heaviest: np.ndarray, alpha: float) -> np.ndarray:
    """`float32[width]`; 1 for a channel that is always 0, or that nothing reads."""
    used = (largest > 0) & (heaviest > 0)
    safe = lambda array: np.where(used, array, 1.0)
    s = safe(largest) ** alpha / safe(heaviest) ** (1 - alpha)
    s = s / np.exp(np.log(s[used]).mean()) if used.any() else s
    return np.where(used, np.clip(s, 1 / LARGEST, LARGEST), 1.0).astype(np.float32)


def first_inputs(model: Model, traced: Trace, rows: Sequence[RoundedActivation], data: Dataset) -> dict[str, jax.Array]:
    """Real positions of every row on the first windows, `float32[positions, width]`."""
    count = min(WINDOWS, len(data.inputs))
    shaped = traced.on((count, *data.inputs.shape[1:]))
    by_input = {one.spec.at: one.spec for one in rows}

    def look(site: Site, x: jax.Array, state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        row = by_input.get(site.use.input)
        if row is None:
            return state
        return state | {row.path: site.value_view(x.shape)(x)[0].astype(jnp.float32)}

    views: dict[str, tuple[int, ...]] = {}

    def shape(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        if site.use.input in by_input:
            views[by_input[site.use.input].path] = site.value_view(x.shape).shape[1:]
        return default(x, w)

    inputs = jnp.asarray(data.inputs[:count])
    jax.eval_shape(lambda p, x: shaped.evaluate(p, x, shape), dict(model.params), inputs)
    start = {path: jnp.zeros(size, jnp.float32) for path, size in views.items()}
    seen = jax.jit(lambda p, x: shaped.accumulate(p, x, start, look)[1])(dict(model.params), inputs)
    real = data.mask[:count].reshape(-1)
    return {path: x[real] if len(real) == len(x) else x for path, x in seen.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def output_error(
    scheme: ActivationScheme, schemes: tuple[Scheme, ...], x: jax.Array, weights: list[jax.Array], s: jax.Array
) -> jax.Array:
    """Relative squared error of all readers' outputs, a mean over tokens; what is static is that of these values."""
    kind = scheme.kind._replace(static=False, fixed=False)
    rounded = fake_quantize((x / s)[None], kind, scheme.top, heads=1, real=jnp.ones(1, bool))[0]
    total = jnp.zeros(())
    for weight, weight_scheme in zip(weights, schemes, strict=True):
        stored = RTN()((weight * s[:, None])[None], weight_scheme, None).dequantize()[0]
        exact = x @ weight
        off, whole = (jnp.square(y).sum(axis=1) for y in (rounded @ stored - exact, exact))
        total = total + (off / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)).mean()
    return total
