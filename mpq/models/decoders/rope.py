"""Rotary position embedding and the ways in which checkpoints stretch it to longer contexts.

RoPE: Su et al. 2021, arXiv:2104.09864. The rotation of feature pair `i` of `dim` at position `m` is `m * f_i` radians
with `f_i = theta**(-2i / dim)`. A scaling changes the frequencies `f` and, for some, the magnitude of cosine and sine.
The fields of a scaling are the keys of `rope_scaling` (`rope_parameters` since transformers 5) in a `config.json`.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mpq.types import MpqError


class Scaling(Protocol):
    """How frequencies and magnitude differ from plain RoPE."""

    def frequencies(self, theta: float, dim: int, time: int) -> np.ndarray:
        """Radians per position, `float64[dim / 2]`, for a window of `time` tokens."""
        ...

    @property
    def magnitude(self) -> float:
        """Factor on cosine and sine, so on queries and keys each."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """RoPE as published."""

    def frequencies(self, theta: float, dim: int, time: int) -> np.ndarray:
        """`theta**(-2i / dim)`, `float64[dim / 2]`."""
        del time
        half = dim // 2
        return theta ** (-np.arange(half) / half)

    @property
    def magnitude(self) -> float:
        """One."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation: every frequency over `factor` (Chen et al. 2023, arXiv:2306.15595, equation 4)."""

    factor: float

    def frequencies(self, theta: float, dim: int, time: int) -> np.ndarray:
        """`f / factor`, `float64[dim / 2]`."""
        return Plain().frequencies(theta, dim, time) / self.factor

    @property
    def magnitude(self) -> float:
        """One."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Dynamic NTK scaling: a larger theta for windows beyond the trained ones (YaRN, arXiv:2309.00071, section 3.3).

    The window's length is static under `jit`, so each length compiles with its own frequencies. Decoding with a cache
    of keys would mix several; inside the trained context there is but one.
    """

    factor: float
    max_position_embeddings: int

    def frequencies(self, theta: float, dim: int, time: int) -> np.ndarray:
        """Plain frequencies of `theta * (s * t / c - (s - 1))**(dim / (dim - 2))`, `t` at least the context `c`."""
        stretch = self.factor * max(time, self.max_position_embeddings) / self.max_position_embeddings
        return Plain().frequencies(theta * (stretch - (self.factor - 1)) ** (dim / (dim - 2)), dim, time)

    @property
    def magnitude(self) -> float:
        """One."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1: long waves interpolated, short ones kept, a linear blend between (code of arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, theta: float, dim: int, time: int) -> np.ndarray:
        """`((1 - s) / factor + s) * f`; `s` rises from 0 to 1 with the turns in the original context."""
        frequency = Plain().frequencies(theta, dim, time)
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, 0, 1)
        return (1 - share) * frequency / self.factor + share * frequency

    @property
    def magnitude(self) -> float:
        """One."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: NTK by parts with a temperature (Peng et al. 2023, arXiv:2309.00071, sections 3.2 and 3.4).

    `mscale` and `mscale_all_dim` weigh the temperature as DeepSeek-V2 does (arXiv:2405.04434, section 3.1.4).
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, theta: float, dim: int, time: int) -> np.ndarray:
        """Features that turn more than `beta_fast` times are kept, fewer than `beta_slow` times interpolated."""

        def feature_that_turns(times: float) -> float:
            return dim * math.log(self.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = feature_that_turns(self.beta_fast or 32), feature_that_turns(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        frequency = Plain().frequencies(theta, dim, time)
        ramp = (np.arange(dim // 2) - low) / (high - low or 0.001)
        interpolated = np.clip(ramp, 0, 1)
        return frequency / self.factor * interpolated + frequency * (1 - interpolated)

    @property
    def magnitude(self) -> float:
        """`0.1 ln(factor) + 1` unless given: the square root of the attention's temperature."""
        if self.attention_factor is not None:
            return self.attention_factor
        term = lambda weight: 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        if self.mscale and self.mscale_all_dim:
            return term(self.mscale) / term(self.mscale_all_dim)
        return term(1.0)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE: one searched divisor a frequency (Ding et al. 2024, arXiv:2402.13753), as Phi-3 uses it.

    Windows up to the original context take `short_factor`, longer ones `long_factor`.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None

    def frequencies(self, theta: float, dim: int, time: int) -> np.ndarray:
        """`f / factor_i`, `float64[dim / 2]`.

        Raises:
          MpqError: not one divisor for each frequency.
        """
        divisor = self.long_factor if time > self.original_max_position_embeddings else self.short_factor
        if len(divisor) != dim // 2:
            raise MpqError(f"longrope has {len(divisor)} factors: a head that rotates {dim} features needs {dim // 2}")
        return Plain().frequencies(theta, dim, time) / np.asarray(divisor)

    @property
    def magnitude(self) -> float:
        """`sqrt(1 + ln(factor) / ln(original context))` unless given."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


SCALINGS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "default": Plain,
        "linear": Linear,
        "dynamic": Dynamic,
        "llama3": Llama3,
        "yarn": Yarn,
        "longrope": LongRope,
        "su": LongRope,  # its name in the first Phi-3 checkpoints
    }
)
"""`rope_type` of a `config.json` -> scaling."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer.

    Attributes:
      theta: base of the geometric frequencies.
      fraction: share of a head's features that is rotated, the first ones.
      scaling: for longer contexts.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling = Plain()

    def __call__(self, x: jax.Array, positions: jax.Array | None = None, length: int | None = None) -> jax.Array:
        """Rotate queries or keys, in the layout that pairs feature `i` with `i + dim / 2`.

        Args:
          x: `[batch, time, heads, head_dim]`; position is the index along `time`.
          positions: `int32[batch, time]`, where that is not so.
          length: tokens of the window, where it has others before `x`.

        Returns:
          The rotated array, same shape and dtype; computed in float32.

        Raises:
          MpqError: an odd number of features to rotate.
        """
        dim = int(x.shape[-1] * self.fraction)
        if dim % 2:
            raise MpqError(f"rotary positions turn {dim} of {x.shape[-1]} features a head: the number must be even")
        half = dim // 2
        # They are constants of the model, made in float64: an error here is multiplied by the position.
        time = x.shape[1] if length is None else length
        frequency = self.scaling.frequencies(self.theta, dim, time).astype(np.float32)
        if positions is None:
            angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency  # [time, half]
        else:
            angle = positions.astype(jnp.float32)[..., None] * frequency  # [batch, time, half]
        cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
        if (magnitude := self.scaling.magnitude) != 1:
            cos, sin = cos * magnitude, sin * magnitude
        a, b = x[..., :half].astype(jnp.float32), x[..., half:dim].astype(jnp.float32)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
        return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], axis=-1)


def parse_rope(parameters: Mapping[str, Any], context: int, key: str = "rope_scaling") -> Rope:
    """The `Rope` that a config describes.

    Args:
      parameters: `rope_theta`, `partial_rotary_factor`, `rope_type` (or `type`) and the fields of that scaling.
      context: `max_position_embeddings`; the original context where none is given, and with it the default factor.
      key: where the parameters stood, for the message.

    Raises:
      MpqError: an unknown type, or a key that the type lacks or does not know.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    theta, fraction = given.pop("rope_theta", 10000.0), given.pop("partial_rotary_factor", 1.0)
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    if kind not in SCALINGS:
        raise MpqError(f"config key {key!r} has the type {kind!r}: supported is {', '.join(map(repr, SCALINGS))}")
    fields = {field.name: field for field in dataclasses.fields(SCALINGS[kind])}
    if unknown := sorted(set(given) - set(fields)):
        known = ", ".join(fields) or "no further key"
        raise MpqError(f"config key {key!r} has {unknown}: a rope of type {kind!r} takes {known}")
    original = given.get("original_max_position_embeddings", context)
    implied = {"original_max_position_embeddings": original, "max_position_embeddings": context}
    if SCALINGS[kind] is LongRope:
        implied["factor"] = context / original
    values = {name: value for name, value in implied.items() if name in fields} | given
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise MpqError(f"config key {key!r} lacks {name!r}: a rope of type {kind!r} needs it")
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Rope(float(theta), float(fraction), SCALINGS[kind](**frozen))
