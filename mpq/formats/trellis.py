"""Trellis-coded quantization: what a code stands for depends on the codes of the columns before it.

A grid of one element has 2^bits levels; of independent Gaussian values no such grid reaches the distortion-rate bound
4^-bits. A trellis does better with codes as wide (Marcellin and Fischer 1990, IEEE Trans. Commun. 38(1)). Here it is a
bitshift trellis (Tseng et al. 2024, "QTIP", arXiv:2406.11235, sec. 3.1): the state of a column is the last
`STATE_BITS` bits of the codes up to its own, and each of the 2^STATE_BITS states has a level,

    state_j = (state_{j-1} << bits | code_j) mod S,    value_j = level[multiplier * state_j mod S],    S = 2^STATE_BITS

with the levels the S quantiles (i + 1/2) / S of a normal distribution of variance `gain`^2, ascending. Modulo S a
product with the state is a sum of products with the codes, so that decoding needs no recursion: it filters the codes of
a row with `STATE_BITS / bits` integers, and looks up. The codes of least squared error are found by the Viterbi
algorithm, exactly.

Differences from QTIP: a multiplication spreads states over levels, not a hash (the multipliers are those of the least
error on normal values, `experiments/trellis.py`); sequences run along a row, over `SPAN` output columns, not through
tiles of it. The columns of a row do not depend on each other in GPTQ, which rounds row after row, so that its feedback
stays exact. Sequences do not bite their tail, they start from a state that is given: a row may be cut anywhere behind a
span.

Values are over the root mean square of their group, which is the scale; none of the levels is zero.
"""

import dataclasses
import functools
from collections.abc import Mapping
from statistics import NormalDist
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

STATE_BITS = 10
SPAN = 256
"""Columns that are encoded together, the last of a row fewer."""

_AT_ONCE = 64  # sequences that are searched together: what the search remembers of them is 4 MB at 2 bits
_FAR = 1e3  # values are clipped there: far beyond the last level, and their squares stay finite
_NEVER = np.float32(1e30)  # cost of what a sequence cannot start from


@dataclasses.dataclass(frozen=True)
class Choice:
    """What belongs to a width: `multiplier` of states, `gain` of levels, and the `start`, a code that precedes all."""

    multiplier: int
    gain: float
    start: int


CHOICES: Mapping[int, Choice] = MappingProxyType(
    {2: Choice(263, 1.05, 2), 3: Choice(131, 1.11, 3), 4: Choice(67, 1.13, 10), 5: Choice(199, 1.18, 18)}
)


@dataclasses.dataclass(frozen=True)
class Trellis:
    """Codes of `bits` bits, over `SPAN` neighbouring columns of a row.

    Attributes:
      bits: width of a code, 2 to 5.
    """

    bits: int

    @property
    def name(self) -> str:
        """`tcq2` .. `tcq5`."""
        return f"tcq{self.bits}"

    @property
    def min_qvalue(self) -> int:
        """Always 0."""
        return 0

    @property
    def max_qvalue(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def max_magnitude(self) -> float:
        """Of the outermost levels."""
        return float(levels(self.choice.gain)[-1])

    @property
    def uniform(self) -> bool:
        """False: the steps differ."""
        return False

    @property
    def learned(self) -> bool:
        """False: all weights have the same levels."""
        return False

    @property
    def span(self) -> int:
        """`SPAN`."""
        return SPAN

    @property
    def choice(self) -> Choice:
        """Of this width."""
        return CHOICES[self.bits]

    @property
    def factors(self) -> tuple[int, ...]:
        """Of a column's own code, and of those before it: their sum modulo S is the rank of its level."""
        shifts = range(0, STATE_BITS, self.bits)
        return tuple((self.choice.multiplier << shift) % (1 << STATE_BITS) for shift in shifts)

    def encode(self, x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Codes of the least squared error of every sequence.

        Args:
          x: `float32[..., n]`, values over their scales.
          weight: of their squared errors, at least 0; broadcasts against them. None: all count alike.

        Returns:
          `int8`, of the shape of `x`.
        """
        weight = _spans(jnp.broadcast_to(1.0 if weight is None else weight, x.shape), 0)
        weight /= jnp.maximum(
            weight.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny
        )  # so that sums are finite
        sequences = _spans(jnp.clip(x, -_FAR, _FAR), 0), weight
        flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), sequences)
        search = functools.partial(viterbi, level=by_state(self.choice), start=self.choice.start, bits=self.bits)
        codes, _ = jax.lax.map(lambda pair: search(*pair), flat, batch_size=_AT_ONCE)
        return codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]

    def decode(self, qvalue: jax.Array) -> jax.Array:
        """Values of the codes `[..., n]` of whole rows, or of their first columns. `float32`, same shape."""
        factors, states = self.factors, 1 << STATE_BITS
        codes = _spans(qvalue, 0).astype(jnp.int32)
        length, earlier = codes.shape[-1], len(factors) - 1
        before = jnp.full((*codes.shape[:-1], earlier), self.choice.start, jnp.int32)
        codes, rank = jnp.concatenate([before, codes], axis=-1), jnp.zeros(codes.shape, jnp.int32)
        for ago, factor in enumerate(factors):
            rank += factor * jax.lax.slice_in_dim(codes, earlier - ago, earlier - ago + length, axis=-1)
        value = jnp.asarray(levels(self.choice.gain))[rank % states]
        return value.reshape(*qvalue.shape[:-1], -1)[..., : qvalue.shape[-1]]


def viterbi(
    x: jax.Array, weight: jax.Array, level: jax.Array | np.ndarray, start: int, bits: int
) -> tuple[jax.Array, jax.Array]:
    """The best codes of one sequence, and the weighted squared error that they leave.

    States that differ in nothing but the bits that are shifted out have the same successors: of these the cheapest
    survives.

    Args:
      x: `float32[length]`.
      weight: of that shape.
      level: `float32[S]`, of each state.
      start: the code that precedes the sequence.
      bits: width of a code.

    Returns:
      `int8[length]` and `float32`.
    """
    codes = 1 << bits
    kept = (1 << STATE_BITS) // codes  # states, up to the bits that a shift loses
    level = jnp.asarray(level).reshape(kept, codes)
    begin = sum(start << shift for shift in range(0, STATE_BITS, bits)) % (kept * codes)

    def forward(cost: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, weight = column
        least, lost = _least(cost.reshape(codes, kept))
        return (least[:, None] + weight * (value - level) ** 2).reshape(-1), lost

    def back(state: jax.Array, lost: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = state // codes
        return lost[rest].astype(jnp.int32) * kept + rest, (state % codes).astype(jnp.int8)

    first = jnp.full(kept * codes, _NEVER).at[begin].set(0.0)
    cost, lost = jax.lax.scan(forward, first, (x, weight))
    return jax.lax.scan(back, cost.argmin().astype(jnp.int32), lost, reverse=True)[1], cost.min()


def _least(cost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Least entry of every column of `cost[rows, columns]`, and the first row that has it, `uint8`.

    Two minima in a row: compilers vectorize these, and no search for an index.
    """
    least, row = cost.min(axis=0), jnp.arange(len(cost), dtype=jnp.int32)[:, None]
    return least, jnp.where(cost == least, row, len(cost) - 1).min(axis=0).astype(jnp.uint8)


@functools.cache
def levels(gain: float) -> np.ndarray:
    """`float32[S]`, ascending; all are numbers of half precision."""
    states = 1 << STATE_BITS
    normal = [NormalDist().inv_cdf((2 * rank + 1) / (2 * states)) for rank in range(states)]
    return (gain * np.array(normal)).astype(np.float16).astype(np.float32)


def by_state(choice: Choice) -> np.ndarray:
    """`float32[S]`, the level of each state."""
    return levels(choice.gain)[choice.multiplier * np.arange(1 << STATE_BITS) % (1 << STATE_BITS)]


def _spans(a: jax.Array, fill: int) -> jax.Array:
    """`[..., n]` as `[..., spans, SPAN]`, or `[..., 1, n]` of fewer columns."""
    n = a.shape[-1]
    length = min(n, SPAN)
    a = jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, -n % length)], constant_values=fill)
    return a.reshape(*a.shape[:-1], -1, length)
