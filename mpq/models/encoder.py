"""Transformer encoder blocks (Vaswani et al. 2017, arXiv:1706.03762), which BERT and ViT share.

BERT normalizes after each residual sum (post-norm, as in the paper), ViT before each sub-block (pre-norm,
Dosovitskiy et al. 2021, arXiv:2010.11929, equations 2 and 3). All else is one: attention without a causal mask, biases,
and an MLP of two layers. What a checkpoint calls the parts is the family's name map.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mpq.models.layers import activation, layer_norm
from mpq.types import MpqError


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """What a block is built from.

    Attributes:
      hidden_size, intermediate_size: width of the residual stream, and inside the MLP.
      num_heads: attention heads; they divide `hidden_size`.
      hidden_act: name in `layers.ACTIVATIONS`.
      epsilon: of the layer norms.
      pre_norm: normalize before the sub-blocks (ViT), not after the residual sums (BERT).
      qkv_bias: whether query, key and value have biases.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    hidden_act: str
    epsilon: float
    pre_norm: bool
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise MpqError(
                f"config key 'num_attention_heads' is {self.num_heads}: it has to divide hidden_size {self.hidden_size}"
            )


class Attention(nnx.Module):
    """Multi-head attention in which every position sees every other that is not masked."""

    def __init__(self, shape: EncoderShape, rngs: nnx.Rngs):
        d = shape.hidden_size
        self.num_heads = shape.num_heads
        self.query = nnx.Linear(d, d, use_bias=shape.qkv_bias, rngs=rngs)
        self.key = nnx.Linear(d, d, use_bias=shape.qkv_bias, rngs=rngs)
        self.value = nnx.Linear(d, d, use_bias=shape.qkv_bias, rngs=rngs)
        self.output = nnx.Linear(d, d, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """`x[batch, time, hidden]` to the same shape; `mask`: see `Block`."""
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
        # JAX masks with a large negative number, not with -inf: a row of nothing but padding is finite.
        y = jax.nn.dot_product_attention(
            heads(self.query(x)),
            heads(self.key(x)),
            heads(self.value(x)),
            mask=None if mask is None else mask[:, None, None, :],
        )
        return self.output(y.reshape(x.shape))


class Block(nnx.Module):
    """Attention and MLP, each with a residual sum and a layer norm."""

    def __init__(self, shape: EncoderShape, rngs: nnx.Rngs):
        d = shape.hidden_size
        self.act, self.pre_norm = activation(shape.hidden_act), shape.pre_norm
        self.attention = Attention(shape, rngs)
        self.attention_norm = layer_norm(d, shape.epsilon, rngs)
        self.intermediate = nnx.Linear(d, shape.intermediate_size, rngs=rngs)
        self.output = nnx.Linear(shape.intermediate_size, d, rngs=rngs)
        self.output_norm = layer_norm(d, shape.epsilon, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """One block.

        Args:
          x: `[batch, time, hidden]`.
          mask: `bool[batch, time]`, True where a position may be seen; None: everywhere.

        Returns:
          The same shape.
        """
        mlp = lambda y: self.output(self.act(self.intermediate(y)))
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), mask)
            return x + mlp(self.output_norm(x))
        x = self.attention_norm(x + self.attention(x, mask))
        return self.output_norm(x + mlp(x))


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x[batch, time, d]` over the positions where `mask[batch, time]`; zero where there is none."""
    weight = mask.astype(x.dtype)
    count = jnp.maximum(weight.sum(axis=1), 1)
    return (x * weight[..., None]).sum(axis=1) / count[:, None]


def l2_normalize(x: jax.Array) -> jax.Array:
    """`x[..., d]` at unit Euclidean length; zero stays zero, and its derivative finite."""
    # The bound is on the square: a derivative of the root at zero would be infinite, and NaN after the chain rule.
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(axis=-1, keepdims=True), 1e-24))


def rename(path: str, names: Mapping[str, str]) -> str:
    """`path` with the longest of the block's parts that lead it, after `layers.i.`, spelled as in the checkpoint.

    Args:
      path: of a parameter: `layers.0.attention.query.kernel`.
      names: part of `Block` -> name in the checkpoint, after the checkpoint's `encoder.layer.i.`.
    """
    parts = "|".join(re.escape(part) for part in sorted(names, key=len, reverse=True))
    return re.sub(rf"^layers\.(\d+)\.({parts})\.", lambda m: f"encoder.layer.{m[1]}.{names[m[2]]}.", path)
