"""A cache of a fixed length: for decoding in a loop that is compiled once."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


class Slots:
    """Keys and values of the tokens of a window, each in a place of its own; a decoder fills in one token a call.

    It is read as `mpq.models.decoders.cache.Cache` is.
    """

    def __init__(self, place: jax.Array, past: Sequence[tuple[jax.Array, jax.Array]], read: int) -> None:
        """Before the call.

        Args:
          place: `int32[]`, of the token given, below `read`.
          past: of every layer keys and values `[batch, length, key-value heads, head_dim]`.
          read: places from the first on that are looked at; of them those behind `place` are not seen.
        """
        self.place, self.past, self.read = place, tuple(past), read
        self.present: list[tuple[jax.Array, jax.Array]] = []

    @property
    def positions(self) -> jax.Array:
        """`int32[batch, 1]`, of the token given."""
        return jnp.full((len(self.past[0][0]), 1), self.place)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.past[0][0].shape[1]

    def extend(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[batch, read, heads, head_dim]` of the next layer, given those of the token."""
        before = self.past[len(self.present)]
        k, v = (lax.dynamic_update_slice_in_dim(a, b, self.place, 1) for a, b in zip(before, (k, v), strict=True))
        self.present.append((k, v))
        return k[:, : self.read], v[:, : self.read]

    def seen(self, window: int | None) -> jax.Array:
        """`bool[batch, 1, read]`: which keys the token reads, of the last `window`."""
        distance = self.place - jnp.arange(self.read)
        near = (distance >= 0) & (distance < (self.read if window is None else window))
        return jnp.broadcast_to(near, (len(self.past[0][0]), 1, self.read))
