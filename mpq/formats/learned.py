"""Levels that every weight matrix has of its own: a look-up table (LUT), fitted to it and stored beside its codes.

`lut2`, `lut3` and `lut4`, as SqueezeLLM (Kim et al. 2023, arXiv:2306.07629) and Core ML's palettization call them.
Differences from both: a table belongs to a matrix, not to a channel, and stands under the scales of groups as NF4's
does. So it costs 16 bits a level and matrix, which is next to nothing, and its levels need no unit: the first is -1.

Scales may be negative: a group whose long tail is above zero takes the table mirrored. None of the levels need be zero;
so a group of zeros has the smallest scale there is, and decodes to what is nearest to them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Learned:
    """2^bits levels in ascending order, the first -1, the others up to 1; the qvalue is the level's index.

    Attributes:
      bits: width of a code.
      levels: `float16[..., 2^bits, 1]`, one table for each matrix of what is encoded; None: of the name alone, which
        neither encodes nor decodes. Half precision has 11 bits for what lies between -1 and 1, bfloat16 8.
    """

    bits: int
    levels: jax.Array | None = None

    @property
    def name(self) -> str:
        """`lut2` .. `lut4`."""
        return f"lut{self.bits}"

    @property
    def min_qvalue(self) -> int:
        """Always 0."""
        return 0

    @property
    def max_qvalue(self) -> int:
        """Index of the last level."""
        return (1 << self.bits) - 1

    @property
    def max_magnitude(self) -> float:
        """1: that of the first level."""
        return 1.0

    @property
    def uniform(self) -> bool:
        """False: the steps differ."""
        return False

    @property
    def learned(self) -> bool:
        """True."""
        return True

    @property
    def span(self) -> int:
        """1: of one element each."""
        return 1

    def with_levels(self, levels: jax.Array) -> "Learned":
        """The format of one weight. It cannot be hashed."""
        return Learned(self.bits, levels)

    def encode(self, x: jax.Array) -> jax.Array:
        """Index of the nearest level of each element of `x`, already divided by its scale. `int8`, same shape."""
        tables = self._tables
        levels = jnp.moveaxis(tables, -1, 0).reshape(-1, *tables.shape[:-1], *(1,) * (x.ndim + 1 - tables.ndim))
        above = [(x > middle).astype(jnp.int8) for middle in (levels[1:] + levels[:-1]) / 2]
        return functools.reduce(jnp.add, above)

    def decode(self, qvalue: jax.Array) -> jax.Array:
        """Level of each qvalue, `float32`, same shape; codes whose leading axes are 1 are looked up in every table."""
        tables = self._tables
        shape = (*tables.shape[:-1], *qvalue.shape[tables.ndim - 1 :])
        codes = jnp.broadcast_to(qvalue, shape).reshape(*tables.shape[:-1], -1)
        return jnp.take_along_axis(tables, codes.astype(jnp.int32), axis=-1, mode="clip").reshape(shape)

    @property
    def _tables(self) -> jax.Array:
        """`float32[..., levels]`."""
        assert self.levels is not None, f"{self.name} has levels of its own in every weight: QTensor.grid has them"
        return self.levels[..., 0].astype(jnp.float32)
