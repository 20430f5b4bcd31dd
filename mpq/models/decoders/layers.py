"""Parts that dense and sparse blocks share."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mpq.models.decoders.config import DecoderConfig
from mpq.models.layers import ACTIVATIONS

INIT = nnx.initializers.normal(0.02)


class MakeLinear(Protocol):
    """Makes a linear layer."""

    def __call__(self, k: int, n: int, bias: bool = False) -> nnx.Linear:
        """A linear layer of `k` inputs and `n` outputs."""
        ...


def linear_of(dtype: DTypeLike, rngs: nnx.Rngs) -> MakeLinear:
    """A maker of linear layers that compute in `dtype`."""
    return lambda k, n, bias=False: nnx.Linear(k, n, use_bias=bias, dtype=dtype, kernel_init=INIT, rngs=rngs)


class OffsetRMSNorm(nnx.Module):
    """RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467) that stores its scale minus one, as Gemma does."""

    def __init__(self, size: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., size]` to the same shape, float32."""
        x = x.astype(jnp.float32)
        return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon) * (1 + self.scale[...])


def norm_of(config: DecoderConfig, rngs: nnx.Rngs, size: int) -> Callable[[jax.Array], jax.Array]:
    """The norm that `config` asks for, over `size` features."""
    if config.norm == "rms_offset":
        return OffsetRMSNorm(size, config.norm_eps)
    if config.norm == "rms":
        return nnx.RMSNorm(size, epsilon=config.norm_eps, rngs=rngs)
    # E[x^2] - E[x]^2 cancels where a few features are large, as in trained models of this kind
    return nnx.LayerNorm(size, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)


class MLP(nnx.Module):
    """Feed-forward block: plain, or gated by a second projection (GLU; Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, size: int, dtype: DTypeLike, rngs: nnx.Rngs):
        linear, d = linear_of(dtype, rngs), config.hidden_size
        self.kind, self.activation = config.mlp, config.activation
        if config.mlp == "gated":
            self.gate_proj = linear(d, size, config.mlp_bias)
        if config.mlp == "gated_fused":
            self.gate_up_proj = linear(d, 2 * size, config.mlp_bias)
        else:
            self.up_proj = linear(d, size, config.mlp_bias)
        self.down_proj = linear(size, d, config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., hidden]` to the same shape."""
        activate = ACTIVATIONS[self.activation]
        if self.kind == "plain":
            return self.down_proj(activate(self.up_proj(x)))
        if self.kind == "gated":
            return self.down_proj(activate(self.gate_proj(x)) * self.up_proj(x))
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(activate(gate) * up)
