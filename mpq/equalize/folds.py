"""Which layers may hand a scale on to the next: found by running the model, and proved to the bit.

A channel of a value may be divided by s where it is made (the rows of a norm's scale, the output columns of a weight)
and multiplied by s where it is read (the input rows of the next weights), if nothing between cares about its size. What
is between differs from model to model: a product of gates, attention over the values, a ReLU, a reshape into heads. So
nothing is matched by name or form. With factors that are powers of two, every one drawn at random, scaling commutes
with all rounding, and the claim can be tested exactly:

  1. with the maker divided, the readers' input has to be what it was, divided by the same factors, bit for bit;
  2. with the readers multiplied too, the model's output has to be what it was, bit for bit.

A path that does care (a residual sum, a norm, a bias that was not divided, a softmax, heads that share their values)
changes bits somewhere and is left alone. Cost: one short forward pass for every maker, two for one that is found.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.inputs import Dataset, Tokens
from mpq.models.model import Model
from mpq.trace import Default, Site, Trace, sole_input
from mpq.types import Params, WeightSpec

POSITIONS = 32
"""Tokens of text that a claim is tested on."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """A scale that can move.

    Attributes:
      vectors: parameters `[width]` that are divided.
      columns: path of the weight whose output columns are divided, or None.
      rows: paths of the weights whose input rows are multiplied.
      width: channels.
      taps: for each of `rows` the channel of every input row, of which a convolution has some for every channel; empty
        where rows are channels.
    """

    vectors: tuple[str, ...]
    columns: str | None
    rows: tuple[str, ...]
    width: int
    taps: tuple[tuple[int, ...], ...] = ()

    def of_rows(self, number: int, s: Any) -> jax.Array:
        """Values `s: float32[width]` of the channels, for the input rows of one of the readers."""
        values = jnp.asarray(s)
        return values[jnp.asarray(self.taps[number])] if self.taps else values

    def apply(self, params: Params, weights: Mapping[str, WeightSpec], s: Any) -> dict[str, jax.Array]:
        """`params` with the makers divided by `s: float32[width]` and the readers multiplied."""
        return self.multiply(self.divide(params, weights, s), weights, s)

    def divide(self, params: Params, weights: Mapping[str, WeightSpec], s: Any) -> dict[str, jax.Array]:
        """`params` with the makers divided."""
        out = dict(params)
        for path in self.vectors:
            out[path] = (params[path].astype(jnp.float32) / s).astype(params[path].dtype)
        if self.columns is not None:
            spec = weights[self.columns]
            out = spec.write(out, spec.read(out) / s)
        return out

    def multiply(self, params: Params, weights: Mapping[str, WeightSpec], s: Any) -> dict[str, jax.Array]:
        """`params` with the readers multiplied."""
        out = dict(params)
        for number, path in enumerate(self.rows):
            out = weights[path].write(out, weights[path].read(out) * self.of_rows(number, s)[:, None])
        return out


def find_folds(model: Model, traced: Trace, data: Dataset, *, convs: bool = False) -> tuple[Fold, ...]:
    """All scales that can move into weights whose only reads are matmuls of one value.

    Args:
      model: its parameters and function.
      traced: its trace.
      data: one window of it, `POSITIONS` tokens if it is text, is what claims are tested on.
      convs: whether convolutions are readers and makers as well; of what a norm keeps, pairs of vectors are tried.

    Returns:
      In the order of the model's weights; no weight is read by two.
    """
    weights = {spec.path: spec for spec in traced.weights}
    inputs = sample_of(model, data)
    shaped = traced.on(inputs.shape)
    readers = _readers(shaped, convs)  # values have other names at other shapes
    channels = _channels(shaped, model.params, inputs, readers)
    run = functools.partial(_run, shaped, tuple(readers))
    output, reads = run(model.params, inputs)
    found: list[Fold] = []
    for maker in _makers(model.params, traced.weights, {max(taps) + 1 for taps in channels.values()}, convs):
        s = _factors(maker.width, len(found))
        _, divided = run(maker.divide(model.params, weights, s), inputs)
        fits = lambda name, maker=maker: max(channels[name]) + 1 == maker.width
        over = lambda name, s=s: s[np.array(channels[name])]
        moved = [n for n in readers if fits(n) and _is_divided(reads[n], divided[n], over(n))]
        rows = tuple(path for name in moved for path in readers[name])
        if not rows or any(set(rows) & set(fold.rows) for fold in found):
            continue
        taps = tuple(channels[name] for name in moved for _ in readers[name])
        plain = all(one == tuple(range(maker.width)) for one in taps)
        fold = dataclasses.replace(maker, rows=rows, taps=() if plain else taps)
        if bool(jnp.array_equal(run(fold.apply(model.params, weights, s), inputs)[0], output)):
            found.append(fold)
    order = {path: place for place, path in enumerate(weights)}
    return tuple(sorted(found, key=lambda fold: order[fold.rows[0]]))


def sample_of(model: Model, data: Dataset) -> jax.Array:
    """One window, or its first tokens."""
    inputs = jnp.asarray(data.inputs[:1])
    return inputs[:, :POSITIONS] if isinstance(model.inputs, Tokens) else inputs


def _readers(traced: Trace, convs: bool) -> dict[str, tuple[str, ...]]:
    """Value -> the weights that it alone is multiplied by."""
    readers: dict[str, list[str]] = {}
    for spec in traced.weights:
        value = sole_input(spec)
        if convs and {use.kind for use in spec.uses} == {"conv"} and len({use.input for use in spec.uses}) == 1:
            value = spec.uses[0].input
        if spec.batch == 1 and value is not None:
            readers.setdefault(value, []).append(spec.path)
    return {name: tuple(paths) for name, paths in readers.items()}


def _channels(
    traced: Trace, params: Params, inputs: jax.Array, readers: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, ...]]:
    """Value -> the channel of every input row of the weights that read it: what a value of channel numbers shows."""
    shapes: dict[str, tuple[Site, tuple[int, ...]]] = {}

    def look(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        if site.use.input in readers:
            shapes.setdefault(site.use.input, (site, x.shape))
        return default(x, w)

    jax.eval_shape(lambda p, x: traced.evaluate(p, x, look), dict(params), inputs)
    found = {}
    for name, (site, shape) in shapes.items():
        view = site.value_view(shape)
        numbers = jnp.broadcast_to(jnp.arange(1.0, view.shape[-1] + 1), view.shape)  # 0 is what pads a window
        rows = np.asarray(site.inputs_matrix(view.invert(numbers)))[0]
        found[name] = tuple((rows.max(axis=0).astype(int) - 1).tolist())
    return found


def _makers(params: Params, weights: Sequence[WeightSpec], widths: set[int], convs: bool) -> list[Fold]:
    """What could be divided: the vectors of one layer together, and a weight's output columns with its own."""
    vectors: dict[tuple[str, int], list[str]] = {}
    for path, param in params.items():
        if param.ndim == 1 and len(param) in widths:
            vectors.setdefault((_parent(path), len(param)), []).append(path)
    alone, columns = dict(vectors), []
    for spec in weights:
        if spec.batch == 1 and not spec.index and spec.n in widths and (spec.kind == "matmul" or convs):
            beside = alone.pop((_parent(spec.param), spec.n), [])
            columns.append(Fold(tuple(beside), spec.path, (), spec.n))
    some = lambda paths: itertools.combinations(paths, 2) if convs and len(paths) > 2 else [tuple(paths)]
    return [Fold(part, None, (), width) for (_, width), paths in alone.items() for part in some(paths)] + columns


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _factors(width: int, seed: int) -> np.ndarray:
    """Powers of two from a quarter to four, none of them 1."""
    exponents = np.random.default_rng([width, seed]).choice([-2, -1, 1, 2], size=width)
    return np.ldexp(np.float32(1), exponents)


def _is_divided(before: jax.Array, after: jax.Array, s: np.ndarray) -> bool:
    """Whether the features of a value are what they were, over `s`; zeros alone would prove nothing."""
    return bool(jnp.any(before != 0)) and bool(jnp.array_equal(after * s, before))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    traced: Trace, names: tuple[str, ...], params: Params, inputs: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Outputs, and the values of these names as `float32[positions, width]`."""
    sites = {site.use.input: site for site in traced.sites if site.use.input in names}

    def look(site: Site, x: jax.Array, state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        name = site.use.input
        return state | {name: site.inputs_matrix(x)[0].astype(jnp.float32)} if sites.get(name) is site else state

    start = {name: jnp.zeros(site.matrix_shape[1:], jnp.float32) for name, site in sites.items()}
    return traced.accumulate(params, inputs, start, look)
