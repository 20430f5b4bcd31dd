"""Floating point of 4 or 8 bits as the grid of a scaled format: `fp4`, `fp8_e4m3`, `fp8_e5m2`.

A qvalue is a signed magnitude: its absolute value is the exponent and mantissa bits read as an integer, so qvalues
ascend with the values and there is one zero. With e exponent and m mantissa bits, bias 2^(e-1) - 1, E = |q| >> m and
M = |q| mod 2^m,

    |decode(q)| = 2^(1 - bias - m) M               if E = 0 (subnormal),
                  2^(E - bias - m) (2^m + M)       else.

e2m1 is that of the OCP Microscaling Formats specification 1.0 (2023); e4m3, without infinities and up to 448, and e5m2,
up to 57344, are those of Micikevicius et al. 2022, arXiv:2209.05433.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Minifloat:
    """A sign, `exponent_bits` and `mantissa_bits`; rounds to nearest, ties to even, and saturates.

    Attributes:
      name: key in `FORMATS`.
      exponent_bits, mantissa_bits: widths.
      max_qvalue: the exponent and mantissa bits of the largest finite value.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_qvalue: int

    @property
    def bits(self) -> int:
        """Code width: the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_qvalue(self) -> int:
        """The same magnitude as `max_qvalue`."""
        return -self.max_qvalue

    @property
    def max_magnitude(self) -> float:
        """Largest finite value: 6, 448, 57344."""
        exponent, mantissa = divmod(self.max_qvalue, 2**self.mantissa_bits)
        return float(2.0 ** (exponent - 1 + self._lowest) * (2**self.mantissa_bits + mantissa))

    @property
    def uniform(self) -> bool:
        """False: the steps differ."""
        return False

    @property
    def learned(self) -> bool:
        """False."""
        return False

    @property
    def span(self) -> int:
        """1: of one element each."""
        return 1

    @property
    def _lowest(self) -> int:
        """Binary exponent of the smallest step."""
        return 2 - 2 ** (self.exponent_bits - 1) - self.mantissa_bits

    def encode(self, x: jax.Array) -> jax.Array:
        """Nearest qvalue of each element of `x`, already divided by its scale. `int8`, same shape."""
        magnitude = jnp.minimum(jnp.abs(x.astype(jnp.float32)), self.max_magnitude)
        exponent = (jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> 23) - 127
        step = jnp.maximum(exponent - self.mantissa_bits, self._lowest)
        # Rounding up to the next power of two carries into the exponent bits, as it should.
        code = jnp.round(magnitude * _power(-step)).astype(jnp.int32) + ((step - self._lowest) << self.mantissa_bits)
        return jnp.where(x < 0, -code, code).astype(jnp.int8)

    def decode(self, qvalue: jax.Array) -> jax.Array:
        """Value of each qvalue. `float32`, same shape."""
        code = jnp.abs(qvalue.astype(jnp.int32))
        exponent, mantissa = code >> self.mantissa_bits, code & (2**self.mantissa_bits - 1)
        whole = mantissa + jnp.where(exponent > 0, 2**self.mantissa_bits, 0)
        magnitude = whole.astype(jnp.float32) * _power(jnp.maximum(exponent - 1, 0) + self._lowest)
        return jnp.where(qvalue < 0, -magnitude, magnitude)


def _power(exponent: jax.Array) -> jax.Array:
    """`2^exponent`, exactly, which `exp2` does not promise; `-126 <= exponent <= 127`."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
