"""Llama-architecture decoder in Flax NNX (Touvron et al. 2023, arXiv:2302.13971; GQA: arXiv:2305.13245).

Attribute names follow the Hugging Face checkpoint, so a tensor's name there is `model.` + the path here,
with `kernel`, `embedding` and `scale` spelled `weight`, and linear weights transposed: ours are `w[k, n]`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mpq.models.family import Family, parse_strictly
from mpq.types import MpqError


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama model; the field names are those of a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = _linear(dtype, rngs)
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.q_proj = linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, time, hidden]` to the same shape."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(q, self.rope_theta), rotate(k, self.rope_theta)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = _linear(dtype, rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., hidden]` to the same shape."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, time, hidden]` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """Token ids `int32[batch, time]` to logits `float32[batch, time, vocab]`.

    `dtype` is the type matmuls compute in; parameters, norms and the residual stream stay float32.
    """

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.layers = nnx.List(Block(config, dtype, rngs) for _ in range(config.num_hidden_layers))
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.dtype = dtype
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = _linear(dtype, rngs)(config.hidden_size, config.vocab_size)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token at every position."""
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x)
        x = self.norm(x)
        if self.lm_head is not None:
            return self.lm_head(x).astype(jnp.float32)
        return (x.astype(self.dtype) @ self.embed_tokens.embedding[...].astype(self.dtype).T).astype(jnp.float32)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half-rotation layout (Su et al. 2021, arXiv:2104.09864).

    Args:
      x: `[batch, time, heads, head_dim]`; position is the index along `time`.
      theta: base of the geometric frequencies.

    Returns:
      The rotated array, same shape and dtype.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency  # [time, half]
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def parse_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The shape of the model that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    config = dict(config)
    rope = config.pop("rope_parameters", None)  # transformers 5 nests what version 4 keeps at the top level
    if rope is not None:
        if unknown := set(rope) - {"rope_theta", "rope_type"}:
            raise MpqError(f"rope_parameters has {sorted(unknown)}: supported is rope_theta with rope_type 'default'")
        config |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": rope.get("rope_type", "default")}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    defaults = {"num_key_value_heads": heads, "head_dim": hidden // heads if heads and hidden else None}
    only = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None, "default"),
    }
    return parse_strictly(config, LlamaConfig, only=only, defaults=defaults)


def tensor_name(path: str) -> tuple[str, bool]:
    """Name in the checkpoint of the parameter at `path`, and whether it is transposed there."""
    name = re.sub(r"(kernel|embedding|scale)$", "weight", path)
    return name if name.startswith("lm_head") else f"model.{name}", path.endswith("kernel")


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    parse=parse_config,
    build=lambda config: Llama(config, rngs=nnx.Rngs(0)),
    tensor_name=tensor_name,
)


def _linear(dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[[int, int], nnx.Linear]:
    init = nnx.initializers.normal(0.02)
    return lambda k, n: nnx.Linear(k, n, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
