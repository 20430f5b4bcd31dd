"""How the blocks of a kernel share its steps.

Steps are numbered through all rows of a strip of columns and then those of the next, and each block takes an equal
range of the numbers (the idea is Stream-K's, Osama et al. 2023, arXiv:2301.03598). A strip that several blocks have
parts of has as many sums. They are added in the order of the blocks: no atomics, and the same bits every time.

With at least a strip for every block, the first of a strip's blocks adds the sums of the others to its own. So a block
hands on at most one sum, that of the strip which it begins with, and waits at its last strip alone. With fewer, a strip
has many blocks, and waiting for one after the other takes longer than a second pass over all sums (`added`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Shares:
    """How blocks share the steps of a matmul. Arguments may be traced; of integers the answers are integers.

    Attributes:
      steps: of one strip.
      strips: of columns for a batch of tokens, of one expert after the other. Batches of the same columns follow each
        other: codes are in a cache.
      blocks: or clusters of them; at most as many as there are steps.
    """

    steps: int
    strips: int
    blocks: int

    def begin(self, block: Any) -> Any:
        """The first step of a block, of all strips; of `blocks`: their number."""
        return _quotient(block * (self.steps * self.strips), self.blocks)

    def owner(self, step: Any) -> Any:
        """The block that has a step."""
        return _quotient((step + 1) * self.blocks - 1, self.steps * self.strips)

    def last(self, strip: Any) -> Any:
        """The last block that has a part of a strip."""
        return self.owner((strip + 1) * self.steps - 1)

    def part(self, block: Any, strip: Any) -> Any:
        """Which of a strip's sums a block has."""
        return block - self.owner(strip * self.steps)

    @property
    def inside(self) -> bool:
        """Whether blocks add the sums of others to their own; else there is a second pass."""
        return self.strips >= self.blocks

    @property
    def parts(self) -> int:
        """Sums that a second pass has to add, at most."""
        return 1 if self.inside else 1 + max(self.part(self.last(strip), strip) for strip in range(self.strips))

    @property
    def split(self) -> bool:
        """Whether several blocks have parts of a strip."""
        return any(self.owner(strip * self.steps) != self.last(strip) for strip in range(self.strips))


def _quotient(a: Any, b: int) -> Any:
    """Of what is not negative: `//` of traced values would ask for a sign."""
    return a // b if isinstance(a, int) else lax.div(a, b)


def added(parts: jax.Array, shares: Shares, columns: int, tokens: int) -> jax.Array:
    """The second pass: the sums of every strip in the order of its blocks; what no block wrote is left out.

    Args:
      parts: `float32[parts, experts, m, n]`, all of them whole strips.
      shares: which block has what.
      columns: of a strip.
      tokens: of a strip.
    """
    _, experts, m, _ = parts.shape
    if shares.parts == 1:
        return parts[0]
    expert, token, column = (lax.broadcasted_iota(jnp.int32, parts.shape[1:], axis) for axis in (0, 1, 2))
    within = lax.div(column, columns) * (m // tokens) + lax.div(token, tokens)
    strip = expert * (shares.strips // experts) + within
    last = shares.part(shares.last(strip), strip)
    written = [parts[0], *(jnp.where(i <= last, parts[i], 0.0) for i in range(1, shares.parts))]
    return functools.reduce(jnp.add, written)
