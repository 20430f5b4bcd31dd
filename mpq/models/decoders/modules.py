"""The decoder in Flax NNX, steered by a `DecoderConfig`.

Attribute names are those of a Hugging Face Llama checkpoint wherever it has the part, so that one table of names a
family is enough. Weights are `w[k, n]`. Queries, keys and values (gate and up) are separate matmuls on one input where
the checkpoint keeps them apart, which makes them one fused group in a trace, and one matmul where it fuses them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mpq.models.decoders.cache import Cache
from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.experts import SparseMLP
from mpq.models.decoders.layers import MLP, linear_of, norm_of
from mpq.models.decoders.slots import Slots
from mpq.types import MpqError


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Args:
      q: `[batch, time, heads, head_dim]`.
      k: `[batch, time, key-value heads, head_dim]`; each head serves `heads / key-value heads` query heads.
      v: as `k`.
      scale: of the scores; None: head_dim**-0.5.
      window: tokens that a query sees, itself included (Beltagy et al. 2020, arXiv:2004.05150); None: all before it.
      softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2, arXiv:2408.00118, section 2).
      seen: `bool[batch, time, keys]`, which keys a query reads where there are more keys than queries; None: as
        `window` says.

    Returns:
      `[batch, time, heads, head_dim]`.
    """
    batch, time, heads, dim = q.shape
    served = heads // k.shape[2]
    # All queries that read the same keys are rows of one matmul: `[batch, key-value heads, served * time, ...]`.
    rows = q.reshape(batch, time, -1, served, dim).transpose(0, 2, 3, 1, 4).reshape(batch, -1, served * time, dim)
    scores = jnp.einsum("bkrd,bskd->bkrs", rows, k, preferred_element_type=jnp.float32)
    scores = scores * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if seen is None:
        distance = jnp.arange(time)[:, None] - jnp.arange(time)
        seen = (distance >= 0) & (distance < (time if window is None else window))
        scores = jnp.where(jnp.tile(seen, (served, 1)), scores, -jnp.inf)
    else:  # a query of padding may see no key: its output, read by none, must be finite
        scores = jnp.where(jnp.tile(seen, (1, served, 1))[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("bkrs,bskd->bkrd", weights, v).reshape(batch, -1, served, time, dim)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, dim)


class Attention(nnx.Module):
    """Causal attention of layer number `layer`."""

    def __init__(self, config: DecoderConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        linear, d = linear_of(dtype, rngs), config.hidden_size
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.config, self.layer = config, layer
        if config.qkv == "separate":
            self.q_proj = linear(d, queries, config.qkv_bias)
            self.k_proj = linear(d, keys, config.qkv_bias)
            self.v_proj = linear(d, keys, config.qkv_bias)
        else:
            self.qkv_proj = linear(d, queries + 2 * keys, config.qkv_bias)
        self.o_proj = linear(queries, d, config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = norm_of(config, rngs, config.head_dim), norm_of(config, rngs, config.head_dim)

    def __call__(self, x: jax.Array, cache: Cache | Slots | None = None) -> jax.Array:
        """`x[batch, time, hidden]` to the same shape; `cache` has the tokens before."""
        config, rope = self.config, self.config.positions(self.layer)
        q, k, v = self.heads(x)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            positions, length = (None, None) if cache is None else (cache.positions, cache.length)
            q, k = rope(q, positions, length), rope(k, positions, length)
        window = config.window(self.layer)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attend(
            q,
            k,
            v,
            scale=config.attention_scale,
            window=window,
            softcap=config.attention_softcap,
            seen=None if cache is None else cache.seen(window),
        )
        return self.o_proj(y.reshape(*x.shape[:2], -1))

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[batch, time, heads, head_dim]` of `x[batch, time, hidden]`."""
        config, split = self.config, lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim)
        if config.qkv == "separate":
            return split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        y = self.qkv_proj(x)
        if config.qkv == "interleaved":
            q, k, v = jnp.split(y.reshape(*y.shape[:2], config.num_attention_heads, -1), 3, axis=-1)
            return q, k, v
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        q, k, v = jnp.split(y, [queries, queries + keys], axis=-1)
        return split(q), split(k), split(v)


class Block(nnx.Module):
    """Attention and feed-forward block with their norms; `DecoderConfig.residual` says where the norms are."""

    def __init__(self, config: DecoderConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.residual = config.residual
        norm = lambda: norm_of(config, rngs, config.hidden_size)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer, dtype, rngs)
        self.post_attention_layernorm = norm()
        if config.experts is not None and config.experts.layers[layer]:
            self.mlp = SparseMLP(config, config.experts, dtype, rngs)
        else:
            self.mlp = MLP(config, config.intermediate_size, dtype, rngs)
        if config.residual == "sandwich":
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(self, x: jax.Array, cache: Cache | Slots | None = None) -> jax.Array:
        """`x[batch, time, hidden]` to the same shape; `cache` has the tokens before."""
        if self.residual == "post":
            x = self.input_layernorm(x + self.self_attn(x, cache))
            return self.post_attention_layernorm(x + self.mlp(x))
        attended = self.self_attn(self.input_layernorm(x), cache)
        if self.residual == "parallel":
            return x + attended + self.mlp(self.post_attention_layernorm(x))
        if self.residual == "sandwich":
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """Token ids `int32[batch, time]` to logits `float32[batch, time, vocab]`.

    `dtype` is the type matmuls compute in; parameters, norms and the residual stream stay float32.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        linear, width = linear_of(dtype, rngs), config.embedding_size or config.hidden_size
        embed = lambda rows, size: nnx.Embed(rows, size, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.config, self.dtype = config, dtype
        self.embed_tokens = embed(config.vocab_size, width)
        if config.learned_positions is not None:
            rows = config.max_position_embeddings + config.learned_positions
            self.embed_positions = embed(rows, config.hidden_size)
        if config.embedding_size is not None:
            self.project_in = linear(width, config.hidden_size)
            self.project_out = linear(config.hidden_size, width)
        self.layers = nnx.List(Block(config, layer, dtype, rngs) for layer in range(config.num_hidden_layers))
        if config.final_norm:
            self.norm = norm_of(config, rngs, config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = linear(width, config.vocab_size)

    def __call__(self, tokens: jax.Array, cache: Cache | Slots | None = None) -> jax.Array:
        """Logits of the next token at every position; `cache` has the tokens before."""
        config = self.config
        x = self.embed(tokens, None if cache is None else cache.positions)
        for block in self.layers:
            x = block(x, cache)
        if config.final_norm:
            x = self.norm(x)
        if config.embedding_size is not None:
            x = self.project_out(x)
        if config.tie_word_embeddings:
            logits = x.astype(self.dtype) @ self.embed_tokens.embedding[...].astype(self.dtype).T
        else:
            logits = self.lm_head(x)
        logits = logits.astype(jnp.float32)
        if config.logit_softcap is not None:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return logits

    def embed(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """`int32[batch, time]` to the residual stream before the first block, `float32[batch, time, hidden]`.

        Args:
          tokens: what is read.
          positions: `int32[batch, time]`, where they are; None: from 0 on.

        Raises:
          MpqError: a window longer than the table of learned positions.
        """
        config, time = self.config, tokens.shape[1]
        x = self.embed_tokens(tokens)
        if config.embedding_scale is not None:
            x = x * config.embedding_scale
        if config.embedding_size is not None:
            x = self.project_in(x).astype(jnp.float32)
        if config.learned_positions is not None and positions is not None:
            return x + self.embed_positions(positions + config.learned_positions)
        if config.learned_positions is not None:
            if time > config.max_position_embeddings:
                raise MpqError(
                    f"a window of {time} tokens was given to a model with {config.max_position_embeddings} learned "
                    "positions: take a shorter window"
                )
            start = config.learned_positions
            x = x + lax.slice_in_dim(self.embed_positions.embedding[...], start, start + time)
        return x
