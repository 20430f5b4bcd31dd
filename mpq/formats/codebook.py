"""Formats given by a short list of levels."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

# 16 quantiles of the unit normal, halves joined at an exact zero: Dettmers et al. 2023, arXiv:2305.14314, App. E.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# The same recipe for 3 bits: with b bits, c = 1 - (1 / 2^(b+1) + 1 / (2^(b+1) - 2)) / 2 and P the quantile function of
# the unit normal, the levels are P at 2^(b-1) even steps from c to 1/2 without that end, -P at one step fewer, and 0,
# over the largest. That gives NF4 to 3e-7, which was computed in single precision.
NF3_LEVELS = (
    -1.0,
    -0.5350227084855379,
    -0.24693143181157526,
    0.0,
    0.18333748033548752,
    0.3819939543209139,
    0.6229857417143423,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Levels in ascending order, with an exact zero among them; the qvalue is the level's index."""

    name: str
    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Code width."""
        return math.ceil(math.log2(len(self.levels)))

    @property
    def min_qvalue(self) -> int:
        """Always 0."""
        return 0

    @property
    def max_qvalue(self) -> int:
        """Index of the last level."""
        return len(self.levels) - 1

    @property
    def max_magnitude(self) -> float:
        """Largest |level|."""
        return max(abs(level) for level in self.levels)

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

    def encode(self, x: jax.Array) -> jax.Array:
        """Index of the nearest level of each element of `x`, already divided by its scale. `int8`, same shape."""
        levels = jnp.asarray(self.levels, x.dtype)
        # A few comparisons an element, added up as they are made; a search would be a loop over gathers.
        above = [(x > middle).astype(jnp.int8) for middle in (levels[1:] + levels[:-1]) / 2]
        return functools.reduce(jnp.add, above)

    def decode(self, qvalue: jax.Array) -> jax.Array:
        """Level of each qvalue. `float32`, same shape."""
        return jnp.asarray(self.levels, jnp.float32)[qvalue]
