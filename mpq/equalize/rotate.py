"""Rotation: the same function with features mixed by orthogonal matrices, which spread outliers over all of them.

R1 and R2 of SpinQuant (Liu et al. 2024, arXiv:2405.16406, section 3.2), which are the offline part of QuaRot (Ashkboos
et al. 2024, arXiv:2404.00456, section 4): one rotation of the residual stream (`mpq.equalize.stream`) and one of every
head's values (`mpq.equalize.heads`), both folded into the weights. The rotated model has the parameters of the
original (a tied table of embeddings becomes two where the scale of the last norm would have to go into one of its
uses), so every later stage takes it as it is: statistics, scores, rounding, training, exports.

Differences from the papers: rotations are randomized Hadamard matrices, not learned. Those that need work at run time
belong to the rounding of activations: R4 is `mpq.activations.turn`; R3, on the KV cache, is not made.

The claim that nothing changed is proved by running. In exact arithmetic the rotated model is the original; in float32
it differs by rounding its weights once and by rounding other partial sums. How much errors of that size are worth in
this model is measured: what its outputs change by when every parameter is moved by the relative error of float32, up or
down at random. Rotation may change them by `BOUND` times the largest change in `DRAWS` such draws.

Helps where a few features are far larger than the rest and share a scale with them: activations rounded by token,
weights with one scale a channel. The small models measured (experiments/results/rounding, .../activations) hardly have
such: weights in groups of 32 come out as they were, rounded to nearest somewhat worse on one model; activations of 4
bits gain a few per cent; static ranges of whole tensors nothing, for the values that widen them are at the input of
down_proj, which no rotation here reaches (`mpq.activations.turn` does).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mpq.equalize.cut import Cut
from mpq.equalize.heads import Heads, find_heads
from mpq.equalize.orthogonal import Rotation, generator, random_rotation
from mpq.equalize.stream import Refusal, Stream, find_stream
from mpq.inputs import Dataset, Tokens
from mpq.models.model import Model
from mpq.models.untied import untie
from mpq.trace import Trace
from mpq.types import MpqError, Params

BOUND = 4.0
DRAWS = 2
POSITIONS = 64
"""Tokens of text that the proof is run on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rotated:
    """A model after rotation.

    Attributes:
      model: the same function.
      traced: its trace, for the inputs of the original's.
      stream: the residual stream that was rotated, or None.
      heads: attention layers whose values were.
      refusal: why the residual stream was not, or None.
      untied: paths of the table that the head no longer shares and of the head's own, or None.
      change: largest change of an output on the first window.
      bound: what it was allowed to be.
    """

    model: Model
    traced: Trace
    stream: Stream | None
    heads: tuple[Heads, ...]
    refusal: str | None
    untied: tuple[str, str] | None
    change: float
    bound: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """What of a model can be rotated."""

    model: Model
    traced: Trace
    stream: Stream | Refusal
    heads: tuple[Heads, ...]

    def params(self, stream: Rotation | None, heads: list[tuple[Rotation, ...]]) -> dict[str, jax.Array]:
        """The parameters, rotated."""
        specs = {spec.path: spec for spec in self.traced.weights}
        params = dict(self.model.params)
        if isinstance(self.stream, Stream) and stream is not None:
            params = self.stream.rotate(params, specs, stream)
        for one, rotations in zip(self.heads, heads, strict=True):
            params = one.rotate(params, specs, rotations)
        return params


def rotate(model: Model, traced: Trace, data: Dataset, key: jax.Array) -> Rotated:
    """The same function with its residual stream and the values of its heads rotated.

    Args:
      model: the original.
      traced: its trace.
      data: its first window is what the rotation is found and proved on.
      key: of the rotations; the same key gives the same bytes.

    Raises:
      MpqError: nothing of the model can be rotated, its head needs a table of its own and its format has none, or the
        rotated model is not the original within the bound.
    """
    found, untied = _find(model, traced, data, key), None
    if isinstance(found.stream, Refusal) and (table := found.stream.tied) is not None:
        paths, model = model.params.keys(), untie(model, table)
        untied = (table, next(iter(model.params.keys() - paths)))
        found = _find(model, model.trace(*_shape(model, traced)), data, key)
    refusal = found.stream.reason if isinstance(found.stream, Refusal) else None
    if refusal is not None and not found.heads:
        raise MpqError(f"{model.name} cannot be rotated: {refusal}, and no heads average values linearly")
    turns, noise = jax.random.split(key)
    draw, keys = functools.partial(jax.random.fold_in, turns), range(1, len(found.heads) + 1)
    rotation = None
    if isinstance(found.stream, Stream):
        rotation = random_rotation(found.stream.width, draw(0), keep_ones=found.stream.keep_ones)
    params = found.params(rotation, [one.rotations(draw(n)) for one, n in zip(found.heads, keys, strict=True)])
    change, bound = _prove(found, params, data, noise)
    if not change <= bound:
        raise MpqError(
            f"rotated, {model.name} gives outputs that differ by {change:.3g}, where rounding and another order of "
            f"sums explain {bound:.3g}: a weight has a part in it that was not found; leave the rotation out"
        )
    whole = found.stream if isinstance(found.stream, Stream) else None
    new = dataclasses.replace(model, params=params, schemes={})
    return Rotated(new, found.traced, whole, found.heads, refusal, untied, change, bound)


def _find(model: Model, traced: Trace, data: Dataset, key: jax.Array) -> _Found:
    cut = Cut.of(model, traced, data)
    return _Found(model, traced, find_stream(cut, model.params, key), find_heads(cut, model.params, key))


def _shape(model: Model, traced: Trace) -> tuple[int, int | None]:
    """Inputs of a trace as `Model.trace` takes them."""
    batch, *rest = traced.inputs.shape
    return batch, rest[0] if isinstance(model.inputs, Tokens) else None


def _prove(found: _Found, params: Params, data: Dataset, key: jax.Array) -> tuple[float, float]:
    """Largest change of an output, and the bound."""
    inputs = jnp.asarray(data.inputs[:1])
    if isinstance(found.model.inputs, Tokens):
        inputs = inputs[:, :POSITIONS]
    run = jax.jit(found.model.apply)
    flat = lambda params: np.concatenate(
        [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(run(dict(params), inputs))]
    )
    original = flat(found.model.params)
    noise = [
        np.abs(flat(_last_place(found.model.params, one)) - original).max() for one in jax.random.split(key, DRAWS)
    ]
    return float(np.abs(flat(params) - original).max()), BOUND * float(max(noise))


def _last_place(params: Params, key: jax.Array) -> dict[str, jax.Array]:
    """Every parameter larger or smaller by one unit in its last place or so, at random."""
    rng, eps = generator(key), np.finfo(np.float32).eps
    factor = lambda param: 1 + rng.choice(np.array([-eps, eps], np.float32), size=param.shape)
    return {path: jnp.asarray(np.asarray(param) * factor(param), param.dtype) for path, param in params.items()}
