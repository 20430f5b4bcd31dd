"""Sparse feed-forward block: a router and experts (Shazeer et al. 2017, arXiv:1701.06538).

Every expert is computed for every token, and what the router did not choose is multiplied by zero: the result is that
of sending each token to its experts alone, without its speed. In return the block is three batched matmuls with
weights `[experts, k, n]`, whatever the router decides.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mpq.models.decoders.config import DecoderConfig, ExpertsConfig
from mpq.models.decoders.layers import INIT, MLP, linear_of
from mpq.models.layers import ACTIVATIONS


def route(logits: jax.Array, experts: ExpertsConfig) -> jax.Array:
    """How much each expert contributes to each token.

    Softmax over all experts, of which the largest `per_token` stay (Qwen1.5-MoE; Mixtral, arXiv:2401.04088, section
    2.1, whose softmax over the chosen logits alone is the same as `normalize`).

    Args:
      logits: `[batch, time, experts]`.
      experts: how many are chosen, and whether their weights are made to sum to one.

    Returns:
      `float32[batch, time, experts]`, zero where an expert is not chosen.
    """
    chosen, index = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), experts.per_token)
    if experts.normalize:
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    return (jax.nn.one_hot(index, experts.number) * chosen[..., None]).sum(axis=-2)


class ExpertLinear(nnx.Module):
    """One linear layer an expert, without bias."""

    def __init__(self, number: int, k: int, n: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(INIT(rngs.params(), (number, k, n), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[experts, batch, time, k]` to `[experts, batch, time, n]`."""
        return jnp.einsum("ebtk,ekn->ebtn", x.astype(self.dtype), self.kernel[...].astype(self.dtype))


class Experts(nnx.Module):
    """Gated feed-forward blocks, one an expert."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        number, d, size = experts.number, config.hidden_size, experts.intermediate_size
        self.activation = config.activation
        self.gate_proj = ExpertLinear(number, d, size, dtype, rngs)
        self.up_proj = ExpertLinear(number, d, size, dtype, rngs)
        self.down_proj = ExpertLinear(number, size, d, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[experts, batch, time, hidden]` to the same shape."""
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class SparseMLP(nnx.Module):
    """Router, experts and, in some families, an expert that every token passes behind a gate of its own."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        linear, d = linear_of(dtype, rngs), config.hidden_size
        self.routing = experts
        self.router = linear(d, experts.number)
        self.experts = Experts(config, experts, dtype, rngs)
        if experts.shared_size is not None:
            self.shared_expert = MLP(config, experts.shared_size, dtype, rngs)
            self.shared_expert_gate = linear(d, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, time, hidden]` to the same shape."""
        weight = jnp.moveaxis(route(self.router(x), self.routing), -1, 0)[..., None]  # [experts, batch, time, 1]
        # An expert sees zeros for tokens that are not its own: its statistics are those of the tokens routed to it.
        y = self.experts(jnp.where(weight > 0, x, 0)).astype(jnp.float32)
        y = (y * weight).sum(axis=0)
        if self.routing.shared_size is not None:
            gate = jax.nn.sigmoid(self.shared_expert_gate(x))
            y = y + (gate * self.shared_expert(x)).astype(jnp.float32)
        return y
