"""Keys and values of the tokens before: what a decoder reads and extends where it is run token by token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


class Cache:
    """What attention reads beside its queries. It is made for one call of a decoder, which fills `present`.

    Windows may be padded on the left: padding is where `mask` is 0, and `positions` count what is not.
    """

    def __init__(self, positions: jax.Array, mask: jax.Array, past: Sequence[tuple[jax.Array, jax.Array]]) -> None:
        """Before the call.

        Args:
          positions: `int32[batch, time]`, of the tokens given.
          mask: `int[batch, past + time]`, 0 at padding.
          past: of every layer keys and values of the tokens before, `[batch, key-value heads, past, head_dim]`; keys
            have their rotary positions.
        """
        self.positions, self.mask, self.past = positions, mask, tuple(past)
        self.present: list[tuple[jax.Array, jax.Array]] = []

    @property
    def length(self) -> int:
        """Tokens before and tokens given."""
        return self.mask.shape[1]

    def extend(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[batch, past + time, heads, head_dim]` of the next layer, given those of `time` tokens."""
        before = self.past[len(self.present)]
        joined = [jnp.concatenate([a, b.transpose(0, 2, 1, 3)], axis=2) for a, b in zip(before, (k, v), strict=True)]
        self.present.append((joined[0], joined[1]))
        return joined[0].transpose(0, 2, 1, 3), joined[1].transpose(0, 2, 1, 3)

    def seen(self, window: int | None) -> jax.Array:
        """`bool[batch, time, past + time]`: which keys a query reads, of the last `window`."""
        length, time = self.length, self.positions.shape[1]
        distance = (jnp.arange(time) + (length - time))[:, None] - jnp.arange(length)
        near = (distance >= 0) & (distance < (length if window is None else window))
        return near & (self.mask != 0)[:, None, :]
