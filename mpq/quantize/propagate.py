"""QEP: every weight makes up for what those before it did to its input (Arai and Ichikawa 2025, arXiv:2504.09629).

Rounded one by one on the original model's inputs, weights of a deep model add their errors up. Here they are rounded in
the order in which they are read, each with what has been rounded so far in front of it. With x the original input and
x' the one that it will really get, over the tokens of the calibration set,

    W' = W + strength (M W - W),    M = E[x' x'^T]^-1 E[x' x^T]

is rounded in the place of W, with the gram of x'. M W is the least-squares fit of the outputs that x gave; less than
strength 1 carries over better to other text.

Weights that read one value are rounded together. An embedding, a convolution or a batch of experts is rounded as it is,
with its statistics on the original inputs.

Cost: for every input two forward passes over the calibration set, quadratic in the depth in all; one gram and one
product of inputs at a time, whatever the number of weights.
Fails on: calibration text that is too short for its inputs (fewer tokens than channels), where M fits noise.

Differences from the paper: one strength for all weights; damping as GPTQ's.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import lu_factor, lu_solve

from mpq.calibrate import add_product, counted_rows
from mpq.inputs import Dataset
from mpq.progress import track
from mpq.quantize.candidates import Candidates, apply_plan
from mpq.quantize.quantizer import Quantizer
from mpq.trace import Site, Trace, sole_input
from mpq.types import LayerStats, MpqError, Params, QTensor, Scheme, WeightSpec

STRENGTH = 0.5
DAMPING = 0.01
"""Of the mean of the gram's diagonal, added to it."""

_Moments = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""`float32[1, k, k]` each: the gram of x' and the product of x' and x, and what their sums lost to rounding."""


def propagate(
    traced: Trace,
    params: Params,
    choice: Mapping[str, Scheme],
    quantizer: Quantizer,
    stats: Mapping[str, LayerStats],
    data: Dataset,
    *,
    batch_size: int,
    strength: float = STRENGTH,
) -> dict[str, QTensor]:
    """The quantized weights of a plan.

    Args:
      traced: the model, traced for any batch size.
      params: its parameters.
      choice: path -> scheme.
      quantizer: rounding algorithm.
      stats: of the original inputs, for the weights that are rounded as they are.
      data: the calibration set.
      batch_size: windows a pass.
      strength: how much of the fit is taken, 0 to 1.

    Raises:
      MpqError: the strength is outside of its range; or as `Candidates.choose` does.
    """
    if not 0 <= strength <= 1:
        raise MpqError(f"the strength of propagation is {strength}: it must be 0 to 1")
    traced = traced.on((batch_size, *data.inputs.shape[1:]))
    plain = Candidates(params, traced.weights, quantizer, stats)
    qtensors: dict[str, QTensor] = {}
    rounded = dict(params)
    groups = _in_order(traced, choice)
    for site, specs in track(groups, "propagate", len(groups)):
        if site is None:
            made = {spec.path: plain.qtensor(spec, choice[spec.path]) for spec in specs}
        else:
            gram, cross = _moments(traced, site, params, rounded, data, batch_size)
            fit = _fit(gram, cross)
            corrected = {spec.path: w + strength * (fit(w) - w) for spec in specs for w in [spec.read(params)]}
            made = {path: quantizer(w, choice[path], gram) for path, w in corrected.items()}
        qtensors |= made
        rounded = apply_plan(rounded, specs, made)
    return {path: qtensors[path] for path in choice}


def _in_order(traced: Trace, choice: Mapping[str, Scheme]) -> list[tuple[Site | None, list[WeightSpec]]]:
    """Weights that are rounded together, in the order of execution, with the first site that reads their value.

    No site: the weight is rounded as it is.
    """
    groups: dict[str, tuple[Site | None, list[WeightSpec]]] = {}
    seen: set[str] = set()
    for site in traced.sites:
        spec = site.spec
        if spec.path not in choice or spec.path in seen:
            continue
        seen.add(spec.path)
        value = sole_input(spec) if spec.batch == 1 else None
        groups.setdefault(value or spec.path, (site if value else None, []))[1].append(spec)
    return list(groups.values())


def _moments(
    traced: Trace, site: Site, params: Params, rounded: Params, data: Dataset, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """`float32[1, k, k]` E[x' x'^T] and E[x' x^T] of the value that a site reads."""
    sites = _alike(traced, site)
    which, k = jnp.int32([one.use.input for one in sites].index(site.use.input)), site.spec.k
    zeros = jnp.zeros((1, k, k))
    sums: _Moments = (zeros, zeros, zeros, zeros)
    count = 0
    for batch in data.batches(batch_size):
        sums, positions = _add(traced, sites, params, rounded, which, sums, batch.inputs, batch.mask)
        count += int(positions)
    gram, gram_rest, cross, cross_rest = (np.asarray(one).astype(np.float64) for one in sums)
    mean = lambda total, rest: jnp.asarray((total + rest) / max(count, 1), jnp.float32)
    return mean(gram, gram_rest), mean(cross, cross_rest)


def _alike(traced: Trace, site: Site) -> tuple[Site, ...]:
    """The first sites of all values of one size: one compilation serves them, which of them is an argument."""
    first: dict[str, Site] = {}
    for other in traced.sites:
        if other.use.kind == "matmul" and other.matrix_shape == site.matrix_shape:
            first.setdefault(other.use.input, other)
    return tuple(first.values())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add(
    traced: Trace,
    sites: tuple[Site, ...],
    params: Params,
    rounded: Params,
    which: jax.Array,
    sums: _Moments,
    inputs: jax.Array,
    mask: jax.Array,
) -> tuple[_Moments, jax.Array]:
    """Totals after one batch, and the positions that counted."""

    def look(site: Site, x: jax.Array, rows: jax.Array) -> jax.Array:
        if site not in sites:
            return rows
        counted = counted_rows(site, mask)[:, None]
        here = jnp.where(counted, site.inputs_matrix(x)[0].astype(jnp.float32), 0.0)
        return jnp.where(which == sites.index(site), here, rows)

    start = jnp.zeros(sites[0].matrix_shape[1:], jnp.float32)
    original, real = (traced.accumulate(p, inputs, start, look)[1][None] for p in (params, rounded))
    gram, gram_rest, cross, cross_rest = sums
    counts = jnp.stack([counted_rows(site, mask).sum(dtype=jnp.int32) for site in sites])
    added = (*add_product(gram, gram_rest, real, real), *add_product(cross, cross_rest, real, original))
    return added, counts[which]


def _fit(gram: jax.Array, cross: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """W to M W, both `float32[1, k, n]`, for all that read one value. A channel that is always 0 keeps its row."""
    a, c = (np.asarray(one[0]).astype(np.float64) for one in (gram, cross))
    damping = max(DAMPING * float(np.diagonal(a).mean()), float(np.finfo(np.float32).tiny)) * np.eye(len(a))
    factors, c = lu_factor(a + damping), c + damping
    solve = lambda w: lu_solve(factors, c @ np.asarray(w[0]).astype(np.float64))
    return lambda w: jnp.asarray(solve(w)[None], jnp.float32)
