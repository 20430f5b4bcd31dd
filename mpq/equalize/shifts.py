"""Which parameter takes up a shift of a layer's output, or a factor of it: found by one gradient, proved to the bit.

What a layer gives may be shifted, channel by channel, if a bias that is added to it or the mean of a norm that is
subtracted is shifted with it; and stretched, if a norm's scale shrinks by as much. Which parameters these are differs
from model to model and is not matched by name:

  1. by the chain rule, the gradient of any function of the outputs in a bias is that in the layer's output, summed over
     positions; in a mean it is the negative of that; of a scale, times the scale, that of stretching output, biases and
     means together. One backward pass gives all of them, and what agrees is tried;
  2. with small whole numbers for the layer's output and for the parameter, sums and differences are exact: the model's
     output has to be what it was, bit for bit, with both shifted by whole numbers that are drawn at random, and has to
     change with either alone. Factors are powers of two, for which products are exact as well.

Cost: one backward pass, and four forward passes for every pair that is tried, of one window each.
Fails on: weights that are read more than once, or in a batch; vectors that lie in a stack of layers. They are left out.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.equalize.folds import sample_of
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.trace import Default, Site, Trace
from mpq.types import Params

LEVELS = 8
"""Of the whole numbers that stand for a layer's output: up to this, on both sides of 0."""

ALIKE = 1e-2
"""Most relative difference of gradients that are tried: they are sums in float32, in another order."""


@dataclasses.dataclass(frozen=True)
class Shift:
    """What follows one layer.

    Attributes:
      weight: path of the layer's weight.
      vectors: parameters `[n]`, each of which takes up any shift of the layer's output.
      signs: for each 1 if it is added to the output, as a bias is, and -1 if it is subtracted, as a mean is.
      gain: parameter `[n]` that multiplies output and vectors together, as a norm's scale does; None: there is none.
      width: n.
    """

    weight: str
    vectors: tuple[str, ...]
    signs: tuple[int, ...]
    gain: str | None
    width: int

    @property
    def parameters(self) -> tuple[str, ...]:
        """All of them: the vectors, and the gain where there is one."""
        return self.vectors if self.gain is None else (*self.vectors, self.gain)

    def moved(self, params: Params, shift: Any) -> dict[str, jax.Array]:
        """`params` for an output to which `shift: float32[n]` is to be added."""
        return {**params, self.vectors[0]: params[self.vectors[0]] + self.signs[0] * jnp.asarray(shift)}

    def offset(self, params: Params) -> jax.Array:
        """`float32[n]`, all that is added to the output."""
        terms = [sign * params[path].astype(jnp.float32) for path, sign in zip(self.vectors, self.signs, strict=True)]
        return functools.reduce(jnp.add, terms)


def find_shifts(model: Model, traced: Trace, data: Dataset) -> tuple[Shift, ...]:
    """All layers whose output may be shifted.

    Args:
      model: its parameters and function.
      traced: its trace.
      data: one window of it is what claims are tested on.

    Returns:
      In the order of execution.
    """
    inputs = sample_of(model, data)
    shaped = traced.on(inputs.shape)
    sites = tuple(s for s in shaped.sites if s.spec.batch == 1 and len(s.spec.uses) == 1 and s.use.kind != "embedding")
    widths = {site.spec.n for site in sites}
    vectors = {path: len(param) for path, param in model.params.items() if param.ndim == 1 and len(param) in widths}
    if not sites or not vectors.keys() - shaped.scales:  # nothing is ever added: no gradient is worth computing
        return ()
    outputs, slopes, stretches = _gradients(shaped, sites, tuple(vectors), model.params, inputs)
    found = []
    for number, site in enumerate(sites):
        claim = _Claim(shaped, sites, number, model.params, inputs)
        of_width = [path for path, width in vectors.items() if width == site.spec.n]
        tried = {path: sign for path in of_width for sign in (1, -1) if _alike(sign * slopes[path], outputs[number])}
        proved = {path: sign for path, sign in tried.items() if claim.shifts(path, sign, tuple(tried))}
        if not proved:
            continue
        stretch = stretches[number] + sum(np.asarray(model.params[path]) * slopes[path] for path in proved)
        gains = [p for p in of_width if p not in proved and _alike(np.asarray(model.params[p]) * slopes[p], stretch)]
        gain = next((path for path in gains if claim.stretches(tuple(proved), path)), None)
        found.append(Shift(site.spec.path, tuple(proved), tuple(proved.values()), gain, site.spec.n))
    return tuple(found)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    size = np.linalg.norm(b)
    return bool(size > 0 and np.linalg.norm(a - b) <= ALIKE * size)


@dataclasses.dataclass(frozen=True)
class _Claim:
    """What one layer's output and some parameters do together."""

    traced: Trace
    sites: tuple[Site, ...]
    number: int
    params: Params
    inputs: jax.Array

    def shifts(self, path: str, sign: int, whole: tuple[str, ...]) -> bool:
        """Whether a shift of the parameter makes up for one of the output; `whole`: all that may be added beside it."""
        rng = np.random.default_rng([self.number, len(self.params[path])])
        draw = lambda: rng.choice([-2, -1, 1, 2], size=len(self.params[path])).astype(np.float32)
        start, shift = {one: jnp.asarray(draw()) for one in whole}, draw()
        moved = {**start, path: start[path] - sign * shift}
        before = self._run(start)
        same = self._run(moved, shift=shift)
        alone = self._run(start, shift=shift), self._run(moved)
        return _equal(same, before) and not any(_equal(one, before) for one in alone)

    def stretches(self, paths: tuple[str, ...], gain: str) -> bool:
        """Whether dividing the gain makes up for a factor of the output and of the vectors added to it."""
        width = len(self.params[gain])
        rng = np.random.default_rng([self.number, width, 1])
        factor = np.ldexp(np.float32(1), rng.choice([-2, -1, 1, 2], size=width))
        start = {path: jnp.asarray(rng.choice([-2, -1, 1, 2], size=width).astype(np.float32)) for path in paths}
        wide = {path: value * factor for path, value in start.items()}
        before, divided = self._run(start), {gain: self.params[gain] / factor}
        same = self._run(wide | divided, factor=factor)
        return _equal(same, before) and not _equal(self._run(start | divided), before)

    def _run(self, changed: Mapping[str, jax.Array], shift: Any = 0.0, factor: Any = 1.0) -> jax.Array:
        width = self.sites[self.number].spec.n
        most = max(site.spec.n for site in self.sites)
        row = lambda value, fill: jnp.full(most, fill, jnp.float32).at[:width].set(jnp.asarray(value, jnp.float32))
        params = {path: changed[path].astype(p.dtype) if path in changed else p for path, p in self.params.items()}
        where = (jnp.int32(self.number), row(shift, 0.0), row(factor, 1.0))
        return _outputs(self.traced, self.sites, params, self.inputs, *where)


def _equal(a: jax.Array, b: jax.Array) -> bool:
    """Bit for bit; what is not finite equals nothing."""
    return bool(jnp.array_equal(a, b))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(
    traced: Trace,
    sites: tuple[Site, ...],
    params: Params,
    inputs: jax.Array,
    which: jax.Array,
    shift: jax.Array,
    factor: jax.Array,
) -> jax.Array:
    """What the model gives if the output of one site is whole numbers, shifted and then multiplied."""

    def replace(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        y = default(x, w)
        if site not in sites:
            return y
        rows, n = site.outputs_matrix(y), site.spec.n
        whole = jnp.round(rows * (LEVELS / jnp.maximum(jnp.abs(rows).max(), jnp.finfo(jnp.float32).tiny)))
        here = ((whole + shift[:n]) * factor[:n]).astype(rows.dtype)
        return site.from_outputs_matrix(jnp.where(which == sites.index(site), here, rows))

    return traced.evaluate(params, inputs, replace)


def _gradients(
    traced: Trace, sites: Sequence[Site], vectors: tuple[str, ...], params: Params, inputs: jax.Array
) -> tuple[list[np.ndarray], dict[str, np.ndarray], list[np.ndarray]]:
    """`float64[n]` gradients of one function of the outputs: in every site's output, in vectors, in a site's factor."""
    made = _slopes(traced, tuple(sites), vectors, params, inputs)
    numbers = lambda array: np.asarray(array).astype(np.float64)
    of_sites, of_vectors = jax.device_get(made)
    return (
        [numbers(shift) for shift, _ in of_sites],
        {path: numbers(slope) for path, slope in of_vectors.items()},
        [numbers(stretch) for _, stretch in of_sites],
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _slopes(
    traced: Trace, sites: tuple[Site, ...], vectors: tuple[str, ...], params: Params, inputs: jax.Array
) -> tuple[list[tuple[jax.Array, jax.Array]], dict[str, jax.Array]]:
    """Of the sum of outputs, weighted at random."""

    def weighted(taps: list[tuple[jax.Array, jax.Array]], chosen: dict[str, jax.Array]) -> jax.Array:
        def replace(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
            y = default(x, w)
            if site not in sites:
                return y
            shift, stretch = taps[sites.index(site)]
            rows = site.outputs_matrix(y)
            return site.from_outputs_matrix((rows * (1 + stretch) + shift).astype(rows.dtype))

        outputs = traced.evaluate({**params, **chosen}, inputs, replace).astype(jnp.float32)
        return (outputs * jax.random.normal(jax.random.key(0), outputs.shape)).sum()

    zeros = [(jnp.zeros(site.spec.n), jnp.zeros(site.spec.n)) for site in sites]
    return jax.grad(weighted, argnums=(0, 1))(zeros, {path: params[path] for path in vectors})
