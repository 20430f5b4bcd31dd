"""Text that a language model writes itself: windows of a text, each continued from a random place on.

Such text is distributed as the model says text is, there is as much of it as is wanted, and nobody has to give it: what
a quantized model is trained on where little text is at hand (data-free quantization-aware training; Liu et al. 2023,
arXiv:2305.17888, section 3.1, whose windows begin with one random token). Differences from the paper: windows begin
with some tokens of real text, so that they are about what that is about, and all tokens are drawn from the model's own
distribution, none is taken as the likeliest.

Decoding keeps keys and values, so that a window costs one pass over each of its tokens.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.data.dataset import new_dataset
from mpq.inputs import Dataset
from mpq.models.decoders import DecoderConfig, Slots
from mpq.models.model import Model
from mpq.progress import track
from mpq.types import Params

PROMPT = 3 / 8
"""Largest share of a window that is the given text's."""
PARTS = 4
"""Of a window: in each one, the places that are read reach to its end. More compile longer and read less."""


def can_write(model: Model) -> bool:
    """Whether `write` knows how the model decodes."""
    return model.decoder is not None


def write(model: Model, data: Dataset, count: int, *, key: jax.Array, batch_size: int = 64) -> Dataset:
    """`count` windows as long as those of `data`; all of their tokens are real.

    Window i begins with the first tokens, at least one, of a window of `data`, which are drawn from `fold_in(key, i)`:
    more windows extend the same sequence, up to sums in another order.

    Args:
      model: of which `can_write`.
      data: windows of text, padded on the right if at all.
      count: at least 1.
      key: of all that is drawn.
      batch_size: windows that are written at once.
    """
    assert model.decoder is not None  # as `can_write` says
    length, made = data.inputs.shape[1], []
    for first in track(range(0, count, batch_size), "write text", -(-count // batch_size)):
        numbers = np.arange(first, first + batch_size)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
        choose = jax.vmap(lambda own: jax.random.uniform(jax.random.fold_in(own, length), (2,)))
        which, share = np.asarray(choose(keys)).T
        rows = np.minimum((which * len(data.inputs)).astype(int), len(data.inputs) - 1)
        begin = 1 + (share * PROMPT * data.mask[rows].sum(1)).astype(np.int32)
        tokens = _continue(model.apply, model.decoder, model.params, data.inputs[rows], begin, keys)
        made.append(np.asarray(tokens)[: count - first])
    tokens = np.concatenate(made).astype(data.inputs.dtype)
    return new_dataset(tokens, np.ones(tokens.shape, bool), np.arange(count), f"{model.name} after {data.source}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(
    apply: Any, config: DecoderConfig, params: Params, tokens: jax.Array, begin: jax.Array, keys: jax.Array
) -> jax.Array:
    """`int32[batch, length]`: the first `begin[batch]` of `tokens[batch, length]`, and what the model writes then."""
    batch, length = tokens.shape
    shape = batch, length, config.num_key_value_heads, config.head_dim
    empty = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_hidden_layers)]

    def step(read: int, carry: Any, place: jax.Array) -> tuple[Any, jax.Array]:
        token, past = carry
        cache = Slots(place, past, read)
        logits = apply(params, token[:, None], cache)[:, 0]
        drawn = jax.vmap(lambda own, row: jax.random.categorical(jax.random.fold_in(own, place), row))(keys, logits)
        given = tokens[:, jnp.minimum(place + 1, length - 1)]
        return (jnp.where(place + 1 < begin, given, drawn.astype(tokens.dtype)), cache.present), token

    ends = sorted({length * part // PARTS for part in range(PARTS + 1)})
    carry, made = (tokens[:, 0], empty), []
    for first, end in itertools.pairwise(ends):
        carry, part = jax.lax.scan(functools.partial(step, end), carry, jnp.arange(first, end))
        made.append(part)
    return jnp.concatenate(made).T
