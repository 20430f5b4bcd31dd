"""How the blocks of a kernel share its steps.

Steps are numbered through all rows of a strip of columns and then those of the next, and each block takes an equal
range of the numbers (the idea is Stream-K's, Osama et al. 2023, arXiv:2301.03598). Of a strip that several blocks have
parts of, the first adds the sums of the others to its own, in their order: no atomics, and the same bits every time.

So a block hands on at most one sum, that of the strip which it begins with, and waits at its last strip alone.
"""

import dataclasses
from typing import Any

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

    @property
    def split(self) -> bool:
        """Whether several blocks have parts of a strip."""
        return any(self.owner(strip * self.steps) != self.last(strip) for strip in range(self.strips))


def _quotient(a: Any, b: int) -> Any:
    """Of what is not negative: `//` of traced values would ask for a sign."""
    return a // b if isinstance(a, int) else lax.div(a, b)
