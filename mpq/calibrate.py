"""One streamed pass over the calibration set: the second moments of every weight's input.

The gram E[x xT] is the curvature of a layer's squared output error, and all that GPTQ (Frantar et al. 2023,
arXiv:2210.17323, eq. 1-3) needs to know of the data. Weights that read the same input share one array.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from mpq.finite import all_finite
from mpq.inputs import Dataset
from mpq.progress import track
from mpq.trace import Site, Trace
from mpq.types import LayerStats, MpqError, Params, WeightSpec

_STEP = 256  # tokens

Read = tuple[str, str]
"""Path of a weight, and the value that it multiplies."""

Weighting = Mapping[Read, jax.Array]
"""`float32[batch of the weight, tokens]`: how much each token of one batch counts, at least 0."""

_Key = str | Read
"""What has sums of its own: a value that weights multiply, or, where tokens are weighted, each of its reads."""


class _Sums(NamedTuple):
    """Totals of one input: `gram + rest` is the sum of x xT to about twice float32's precision."""

    gram: jax.Array  # float32[batch, k, k]
    rest: jax.Array  # float32[batch, k, k]
    absmax: jax.Array  # float32[batch, k]


class _Seen(NamedTuple):
    """What one batch added to an input: positions, and whether all its values are finite."""

    positions: jax.Array  # int32
    mass: jax.Array  # float32, what these count together
    finite: jax.Array  # bool


def calibrate(
    traced: Trace, params: Params, data: Dataset, batch_size: int, weightings: Iterable[Weighting] | None = None
) -> dict[str, LayerStats]:
    """Input statistics of every weight that is multiplied.

    Padding (`data.mask` False) never counts, whatever the batching. Where an operation's rows are the positions of the
    windows, the mask says which count; where they are otherwise divided evenly among the windows (output positions of a
    strided convolution, one pooled row a window, one row a window in each step of a recurrence), the rows of windows
    that hold a real position; where they cannot be matched to windows (rows routed to experts), all.

    Args:
      traced: the model, traced for any batch size.
      params: its parameters.
      data: the calibration set.
      batch_size: windows a pass. It changes the result by rounding alone.
      weightings: of the batches, in order (`mpq.guide.Guide` makes them): grams are means over tokens so weighted.
        None: all count alike.

    Returns:
      Path of the weight -> statistics. A weight used several times has the mean over all its uses. A tied embedding has
      those of its matmul; a weight that is only looked up has no entry, for it is multiplied by nothing. A weight in a
      branch that never ran has zeros, of 0 positions.

    Raises:
      MpqError: if a weight or an input is not finite (it is named), if `batch_size` is not positive, or if nothing
        counts.
    """
    if batch_size < 1:
        raise MpqError(f"batch_size is {batch_size}; it must be at least 1.")
    if not data.mask.any():
        raise MpqError(f"{data.source} has no position that counts: all of it is padding.")
    _require_finite(traced, params)
    traced = traced.on((batch_size, *data.inputs.shape[1:]))
    apart = weightings is not None
    owners = _owners(traced, apart)
    sums = {name: _zeros(site, params) for name, site in owners.items()}
    counts, masses = dict.fromkeys(owners, 0), dict.fromkeys(owners, 0.0)
    num_batches = -(-len(data.inputs) // batch_size)
    every = itertools.repeat(None, num_batches) if weightings is None else weightings
    batches = track(data.batches(batch_size), "calibrate", num_batches)
    for number, (batch, weighting) in enumerate(zip(batches, every, strict=True)):
        sums, seen = _add(traced, params, sums, batch.inputs, batch.mask, weighting)
        seen = jax.device_get(seen)
        for name in owners:  # in the order of execution: what is not finite first made the rest so
            if not seen[name].finite:
                raise MpqError(
                    f"The input of weight {owners[name].spec.path} is not finite, or too large to square in float32, "
                    f"in batch {number} of {data.source}: check the model on these inputs."
                )
            counts[name] += int(seen[name].positions)
            masses[name] += float(seen[name].mass)
    return _stats(traced, apart, sums, counts, masses)


def count_lookups(traced: Trace, params: Params, data: Dataset, batch_size: int) -> dict[str, np.ndarray]:
    """How often every row of every embedding is looked up, padding left out.

    Args:
      traced: the model, traced for any batch size.
      params: its parameters.
      data: the calibration set.
      batch_size: windows a pass. It changes nothing.

    Returns:
      Path of the weight -> `float64[n]`, for the columns of its `[1, k, n]` matrix view. Positions that all windows
      share, such as those of learned positions, count once a window.
    """
    traced = traced.on((batch_size, *data.inputs.shape[1:]))
    specs = {site.spec.path: site.spec for site in traced.sites if site.use.kind == "embedding"}
    totals = {path: np.zeros(spec.n) for path, spec in specs.items()}
    for batch in data.batches(batch_size) if specs else ():
        for path, count in jax.device_get(_looked_up(traced, params, batch.inputs, batch.mask)).items():
            totals[path] += count
    return totals


def mean_squares(traced: Trace, params: Params, data: Dataset, spec: WeightSpec, batch_size: int) -> np.ndarray:
    """The diagonal of one weight's gram, summed from the last window to the first: a check on `calibrate`.

    Args:
      traced: the model, traced for any batch size.
      params: its parameters.
      data: the calibration set.
      spec: a weight that one operation multiplies, with a single matrix (`batch` 1).
      batch_size: windows a pass. It changes the result by rounding alone.

    Returns:
      `float64[k]`, E[x^2] of every input over the positions that count. What follows the weight is not computed.
    """
    traced = traced.on((batch_size, *data.inputs.shape[1:]))
    back = dataclasses.replace(data, inputs=data.inputs[::-1], mask=data.mask[::-1], document=data.document[::-1])
    total, positions = np.zeros(spec.k), 0
    for batch in dataclasses.replace(back, labels=None).batches(batch_size):
        squares, counted = jax.device_get(_squares(traced, spec.path, params, batch.inputs, batch.mask))
        total += squares
        positions += int(counted)
    return total / max(positions, 1)


def divided(stats: LayerStats, s: np.ndarray) -> LayerStats:
    """Statistics of inputs that are divided by `s: float32[k]`."""
    return dataclasses.replace(stats, gram=stats.gram / np.outer(s, s).astype(np.float32), absmax=stats.absmax / s)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(
    traced: Trace, path: str, params: Params, inputs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`float32[k]` sums of squares of a weight's input over one batch, and how many rows counted."""

    def update(site: Site, x: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if site.spec.path != path:
            return state
        counted = counted_rows(site, mask)
        rows = jnp.where(counted[:, None], site.inputs_matrix(x)[0].astype(jnp.float32), 0.0)
        return state[0] + jnp.square(rows).sum(axis=0), state[1] + counted.sum(dtype=jnp.int32)

    k = next(site.spec.k for site in traced.sites if site.spec.path == path)
    return traced.accumulate(params, inputs, (jnp.zeros(k, jnp.float32), jnp.int32(0)), update)[1]


@functools.partial(jax.jit, static_argnums=0)
def _looked_up(traced: Trace, params: Params, inputs: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """`int32[n]` of every embedding in one batch."""

    def update(site: Site, x: jax.Array, counts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        path = site.spec.path
        if site.use.kind != "embedding":
            return counts
        times = mask.sum(axis=0) if site.token_shape == mask.shape[1:] else counted_rows(site, mask)
        return counts | {path: counts[path].at[x.reshape(-1)].add(times.reshape(-1).astype(jnp.int32))}

    zeros = {s.spec.path: jnp.zeros(s.spec.n, jnp.int32) for s in traced.sites if s.use.kind == "embedding"}
    return traced.accumulate(params, inputs, zeros, update)[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add(
    traced: Trace,
    params: Params,
    sums: dict[_Key, _Sums],
    inputs: jax.Array,
    mask: jax.Array,
    weighting: Weighting | None = None,
) -> tuple[dict[_Key, _Sums], dict[_Key, _Seen]]:
    """Totals after one batch, and what it added."""
    apart = weighting is not None
    owners = _owners(traced, apart)

    def update(site: Site, x: jax.Array, state: dict[_Key, tuple[_Sums, _Seen]]) -> dict[_Key, tuple[_Sums, _Seen]]:
        name = _key(site, apart)
        if owners.get(name) is not site:
            return state
        counted = counted_rows(site, mask)
        rows = jnp.where(counted[:, None], site.inputs_matrix(x).astype(jnp.float32), 0.0)
        (total, rest, absmax), (count, mass, finite) = state[name]
        added = counted.sum(dtype=jnp.int32)
        weighed, weight = rows, added.astype(jnp.float32)
        if weighting is not None:
            of_token = jnp.where(counted, weighting[site.spec.path, site.use.input], 0.0)
            weighed, weight = rows * jnp.sqrt(of_token)[..., None], of_token.mean(axis=0).sum()
        larger, rest = add_product(total, rest, weighed, weighed)
        # |x_i x_j| <= max(x_i^2, x_j^2): a sum that overflows does so on the diagonal too, and NaN always shows there.
        finite &= jnp.isfinite(jnp.diagonal(larger, axis1=1, axis2=2)).all()
        absmax = jnp.maximum(absmax, jnp.abs(rows).max(axis=1, initial=0.0))
        return state | {name: (_Sums(larger, rest, absmax), _Seen(count + added, mass + weight, finite))}

    nothing = _Seen(jnp.int32(0), jnp.float32(0), jnp.bool_(True))
    _, state = traced.accumulate(params, inputs, {name: (s, nothing) for name, s in sums.items()}, update)
    return {name: s for name, (s, _) in state.items()}, {name: seen for name, (_, seen) in state.items()}


def add_product(total: jax.Array, rest: jax.Array, rows: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`total + rest`, both `float32[batch, k, k]`, plus the sum over tokens of x yT, x and y of `[batch, tokens, k]`.

    Some tokens at a time: XLA divides a long contraction among the threads of a CPU, and their number would decide how
    it is rounded. And in a loop, which adds in place: one product is held beside the totals, not one an input. A loop
    of one step would be undone, so there are two at least.
    """
    batch, tokens, k = rows.shape
    step = min(_STEP, -(-tokens // 2))
    steps = -(-tokens // step)

    def in_steps(rows: jax.Array) -> jax.Array:
        filled = jnp.pad(rows, ((0, 0), (0, steps * step - tokens), (0, 0)))
        return filled.reshape(batch, steps, step, k).swapaxes(0, 1)

    def add(sums: tuple[jax.Array, jax.Array], parts: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        total, rest = sums
        product = jnp.einsum("btk,btl->bkl", *parts, precision=jax.lax.Precision.HIGHEST)
        # The exact error of a float32 sum (Knuth 1997, TAOCP 2, 4.2.2, theorem B), carried along instead of lost.
        larger = total + product
        shadow = larger - total
        return (larger, rest + ((total - (larger - shadow)) + (product - shadow))), None

    return jax.lax.scan(add, (total, rest), (in_steps(rows), in_steps(others)))[0]


def counted_rows(site: Site, mask: jax.Array) -> jax.Array:
    """`bool[tokens]`: which rows of the site's input count."""
    shape, num_windows = site.token_shape, mask.shape[0]
    tokens = int(np.prod(shape))
    if tokens == mask.size:
        time_major = shape == mask.shape[::-1] and shape != mask.shape
        return (mask.T if time_major else mask).reshape(-1)
    if tokens % num_windows == 0 and (shape[:1] == (num_windows,) or len(shape) == 1):
        return jnp.repeat(mask.any(axis=tuple(range(1, mask.ndim))), tokens // num_windows)
    return jnp.ones(tokens, bool)


def reads(traced: Trace) -> dict[Read, Site]:
    """The first site of every read in which a weight is multiplied."""
    first: dict[Read, Site] = {}
    for site in traced.sites:
        if site.use.kind != "embedding":
            first.setdefault((site.spec.path, site.use.input), site)
    return first


def _owners(traced: Trace, apart: bool) -> dict[_Key, Site]:
    """The first site of all that has sums of its own."""
    owners: dict[_Key, Site] = {}
    for site in reads(traced).values():
        owners.setdefault(_key(site, apart), site)
    return owners


def _key(site: Site, apart: bool) -> _Key:
    return (site.spec.path, site.use.input) if apart else site.use.input


def _zeros(site: Site, params: Params) -> _Sums:
    batch, k = site.spec.batch, site.spec.k
    gram = lambda: jnp.zeros((batch, k, k), jnp.float32)
    return _Sums(gram(), gram(), jnp.zeros((batch, k), jnp.float32))


def _stats(
    traced: Trace,
    apart: bool,
    sums: dict[_Key, _Sums],
    counts: Mapping[_Key, int],
    masses: Mapping[_Key, float],
) -> dict[str, LayerStats]:
    """Means per weight; weights with the same sums get the same object. Takes the sums out of their mapping."""
    read_by: dict[str, tuple[_Key, ...]] = {spec.path: () for spec in traced.weights}
    for (path, _), site in reads(traced).items():
        if path in read_by:
            read_by[path] += (_key(site, apart),)
    distinct = dict.fromkeys(keys for keys in read_by.values() if keys)
    readers = collections.Counter(itertools.chain.from_iterable(distinct))
    of_keys = {keys: _mean(keys, sums, counts, masses, readers) for keys in distinct}
    return {path: of_keys[keys] for path, keys in read_by.items() if keys}


def _mean(
    keys: tuple[_Key, ...],
    sums: dict[_Key, _Sums],
    counts: Mapping[_Key, int],
    masses: Mapping[_Key, float],
    readers: collections.Counter[_Key],
) -> LayerStats:
    """Over several inputs; the sums of an input go with its last reader, or all would be held twice."""
    mass = sum(masses[key] for key in keys)
    gram = np.zeros(sums[keys[0]].gram.shape)
    for key in keys:
        gram += np.asarray(sums[key].gram)
        gram += np.asarray(sums[key].rest)
    absmax = np.max([np.asarray(sums[key].absmax) for key in keys], axis=0)
    readers.subtract(keys)
    for key in keys:
        if not readers[key]:
            del sums[key]
    return LayerStats((gram / (mass or 1.0)).astype(np.float32), absmax, sum(counts[key] for key in keys))


def _require_finite(traced: Trace, params: Params) -> None:
    arrays = {spec.path: params[spec.param][spec.where] for spec in traced.weights}
    arrays |= {skipped.path: params[skipped.path] for skipped in traced.skipped}
    for path, array in arrays.items():
        if not all_finite(array):
            raise MpqError(f"Weight {path} holds NaN or infinity: mend the checkpoint before calibrating.")
