"""Signed integers of 2 to 8 bits: qvalues `-2^(bits-1) .. 2^(bits-1) - 1`."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Integer:
    """A uniform grid with step 1. With a zero point (`Scheme.zero_point`) the same codes serve affine quantization.

    Attributes:
      bits: width of a code. In a compiled function it may be an `int32` argument, so that one compilation serves all
        widths (`mpq.quantize.widths`); then so are the bounds, and there is no name.
    """

    bits: int

    @property
    def name(self) -> str:
        """`int2` .. `int8`."""
        return f"int{self.bits}"

    @property
    def min_qvalue(self) -> int:
        """Most negative code."""
        return -(1 << (self.bits - 1))

    @property
    def max_qvalue(self) -> int:
        """Most positive code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def max_magnitude(self) -> float:
        """Largest |decode(q)| reached on both sides: absmax scale = absmax / this."""
        given = isinstance(self.bits, int)
        return float(self.max_qvalue) if given else cast(float, jnp.asarray(self.max_qvalue, jnp.float32))

    @property
    def uniform(self) -> bool:
        """True: equal steps, so a zero point makes sense."""
        return True

    @property
    def learned(self) -> bool:
        """False."""
        return False

    @property
    def span(self) -> int:
        """1: of one element each."""
        return 1

    def encode(self, x: jax.Array) -> jax.Array:
        """Nearest qvalue (ties to even) of each element of `x`, already divided by its scale. `int8`, same shape."""
        lowest, highest = (jnp.asarray(end, x.dtype) for end in (self.min_qvalue, self.max_qvalue))
        return jnp.clip(jnp.round(x), lowest, highest).astype(jnp.int8)

    def decode(self, qvalue: jax.Array) -> jax.Array:
        """Unscaled value of each qvalue. `float32`, same shape."""
        return qvalue.astype(jnp.float32)
