"""What an element of a weight is rounded to: number formats, and how blocks of ggml store their scales."""

import dataclasses
from typing import Protocol, cast

import jax


class NumberFormat(Protocol):
    """The grid of one element, before any scale.

    `encode` maps values already divided by their scale to the nearest qvalue; `decode` is its inverse on qvalues. A
    format without a scale (`bf16`) has `max_magnitude = None` and its qvalues are the values themselves.
    Where `learned`, every matrix has levels of its own, and only a `LearnedFormat` with them encodes and decodes.
    `span` is 1, or how many neighbouring columns are encoded together: then arrays are whole rows, `[..., n]`, and the
    format is a `SpanFormat`.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def min_qvalue(self) -> int: ...
    @property
    def max_qvalue(self) -> int: ...
    @property
    def max_magnitude(self) -> float | None: ...
    @property
    def uniform(self) -> bool: ...
    @property
    def learned(self) -> bool: ...
    @property
    def span(self) -> int: ...
    def encode(self, x: jax.Array) -> jax.Array: ...
    def decode(self, qvalue: jax.Array) -> jax.Array: ...


class LearnedFormat(NumberFormat, Protocol):
    """A grid of levels that are fitted to every matrix."""

    def with_levels(self, levels: jax.Array) -> NumberFormat:
        """The grid of these levels: `float16[..., levels, 1]`, the leading axes those of what is encoded."""
        ...


class SpanFormat(NumberFormat, Protocol):
    """A grid whose codes depend on those of the columns before them."""

    def encode(self, x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Codes of the least sum of `weight * squared error`."""
        ...


def encode_scaled(grid: NumberFormat, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Codes of values that are already divided by their scales, of the least squared error of what they stood for.

    Element by element scales do not matter to that.
    """
    return grid.encode(x) if grid.span == 1 else cast(SpanFormat, grid).encode(x, scale**2)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a block type of ggml stores its scales; with the format and the group size of a scheme it is the whole type.

    Attributes:
      name: the type's name in lower case, the text form of the scheme.
      rows: rows of `k` in a block, which has one float16 scale.
      sub_bits: width of the integer that each group multiplies the block's scale by; None: a block is one group.
      minimum: whether a float16 of the block is added to every value; with `sub_bits` it is subtracted, times an
        integer of each group, never negative.
    """

    name: str
    rows: int
    sub_bits: int | None = None
    minimum: bool = False
