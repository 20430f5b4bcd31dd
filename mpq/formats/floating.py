"""Plain floating-point storage: no scale, the qvalue is the value."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Float:
    """`bf16`, `fp16` or `fp32`."""

    name: str
    dtype: str

    @property
    def bits(self) -> int:
        """Width of the dtype."""
        return 8 * jnp.dtype(self.dtype).itemsize

    @property
    def min_qvalue(self) -> int:
        """Not an integer grid: 0."""
        return 0

    @property
    def max_qvalue(self) -> int:
        """Not an integer grid: 0."""
        return 0

    @property
    def max_magnitude(self) -> None:
        """None: there is no scale."""
        return None

    @property
    def uniform(self) -> bool:
        """False."""
        return False

    @property
    def learned(self) -> bool:
        """False."""
        return False

    @property
    def span(self) -> int:
        """1: of one element each."""
        return 1

    def encode(self, x: jax.Array) -> jax.Array:
        """`x` rounded to the dtype; what is beyond its range becomes its largest value."""
        largest = float(jnp.finfo(self.dtype).max)
        return jnp.clip(x, -largest, largest).astype(self.dtype)

    def decode(self, qvalue: jax.Array) -> jax.Array:
        """`float32`, same values."""
        return qvalue.astype(jnp.float32)
