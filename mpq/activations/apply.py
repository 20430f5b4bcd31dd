"""A model whose activations and KV cache are rounded as a plan says: any stage that runs a `Model` runs it too.

chosen = choose_activations({row: scheme for row in rows}, ranges)
rounded = with_activations(model, traced, chosen)          # its `apply` rounds; parameters stay what they were
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.clip import choose_columns, choose_range
from mpq.activations.ranges import ActivationRange
from mpq.activations.rows import ActivationSpec, replacing, require_schemes
from mpq.activations.scheme import (
    ActivationScheme,
    fake_quantize,
    outliers,
    parse_activation_scheme,
    quantize,
    scale_and_zero,
)
from mpq.equalize.orthogonal import Rotation, random_rotation
from mpq.inputs import Tokens
from mpq.models.model import Model
from mpq.trace import Trace
from mpq.types import MpqError, Params


@functools.cache
def turn_of(width: int, seed: int) -> Rotation:
    """The rotation of a row, which its width and seed give."""
    return random_rotation(width, jax.random.key(seed))


RANGE_BITS = 64
"""Stored for a part of a static row: the float32 ends of its range."""


@dataclasses.dataclass(frozen=True)
class RoundedActivation:
    """One row of a plan.

    Attributes:
      spec: the row.
      scheme: how it is rounded.
      low, high: ends of a static range, one a head or one for the tensor; None: dynamic, or not yet calibrated.
      smooth: `[width]`, what values are divided by before they are rounded, and weights were multiplied by
        (`mpq.activations.smooth`); None: nothing.
      columns: features that stay in floating point, of a scheme with outliers known from calibration; None: the scheme
        has none, or they are not yet calibrated.
      turn: seed of the rotation that values go through after that, as rows of the weights did (`mpq.activations.turn`);
        None: none.
    """

    spec: ActivationSpec
    scheme: ActivationScheme
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    smooth: tuple[float, ...] | None = None
    columns: tuple[int, ...] | None = None
    turn: int | None = None

    @property
    def limits(self) -> tuple[jax.Array, jax.Array] | None:
        """Ends as `fake_quantize` takes them."""
        if self.low is None or self.high is None:
            return None
        return jnp.asarray(self.low, jnp.float32), jnp.asarray(self.high, jnp.float32)

    @property
    def step(self) -> tuple[float, int]:
        """Of a static range of a whole tensor, the scale and the zero point, which is 0 of a symmetric one."""
        assert self.limits is not None
        low, high = (jnp.minimum(self.limits[0], 0.0)[0], jnp.maximum(self.limits[1], 0.0)[0])
        scale, zero = scale_and_zero(low, high, self.scheme.asymmetric, jnp.float32(self.scheme.top))
        return float(scale), int(zero)

    @property
    def kept(self) -> np.ndarray | None:
        """`bool[width]`: `columns` as `fake_quantize` takes them."""
        return None if self.columns is None else np.isin(np.arange(self.spec.width), self.columns)

    def quantize(self, x: jax.Array, windows: int) -> tuple[jax.Array, jax.Array]:
        """Codes of `x[batch, positions, width]` and their scales, as `mpq.activations.scheme.quantize` says."""
        return quantize(self.prepared(x), self.scheme.kind, self.scheme.top, **self._options(windows))

    def outliers(self, x: jax.Array, windows: int) -> jax.Array:
        """What `quantize` has no codes for: `x` where a feature stays in floating point, and 0 elsewhere."""
        x, options = self.prepared(x), self._options(windows)
        return jnp.where(outliers(x, self.scheme.kind, real=options["real"], columns=options["columns"]), x, 0)

    def __call__(self, x: jax.Array, windows: int) -> jax.Array:
        """`x[batch, positions, width]` rounded; the positions of each of so many windows are neighbours."""
        return fake_quantize(self.prepared(x), self.scheme.kind, self.scheme.top, **self._options(windows))

    def prepared(self, x: jax.Array) -> jax.Array:
        """What is rounded of `x[..., width]`: divided and rotated, where it is."""
        x = x if self.smooth is None else x / jnp.asarray(self.smooth, x.dtype)
        return x if self.turn is None else turn_of(self.spec.width, self.turn).on_device(x)

    def _options(self, windows: int) -> dict[str, Any]:
        return {"heads": self.spec.heads, "real": jnp.ones(windows, bool), **self.fixed}

    @property
    def fixed(self) -> dict[str, Any]:
        """What calibration found, for `fake_quantize`."""
        return {"limits": self.limits, "columns": None if self.columns is None else jnp.asarray(self.kept)}

    @property
    def range_bits(self) -> int:
        """Bits stored with the model, whatever the context: a static range, float32 factors, a bit a feature."""
        parts = self.spec.heads if self.scheme.granularity == "head" else 1
        ends = 0 if self.scheme.static is None else RANGE_BITS * parts
        return ends + 32 * len(self.smooth or ()) + (-(-self.spec.width // 8) * 8 if self.scheme.fixed else 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as plans hold it; the range of a static scheme lies with the model's arrays."""
        body = {**dataclasses.asdict(self.spec), "scheme": str(self.scheme), "range_bits": self.range_bits}
        return body if self.turn is None else body | {"turn": self.turn}

    @classmethod
    def from_json(
        cls,
        body: Mapping[str, Any],
        limits: np.ndarray | None = None,
        smooth: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ) -> Self:
        """Inverse of `to_json`.

        Args:
          body: plain data.
          limits: `float32[2, parts]`, ends of a static range.
          smooth: `float32[width]`, factors.
          columns: `uint8[ceil(width / 8)]`, a bit for every feature, set where it stays in floating point.
        """
        fields = {key: value for key, value in body.items() if key not in ("scheme", "range_bits", "turn")}
        scheme = parse_activation_scheme(body["scheme"])
        low, high = (None, None) if limits is None else (tuple(map(float, end)) for end in limits)
        factors = None if smooth is None else tuple(map(float, smooth))
        kept = None if columns is None else tuple(np.flatnonzero(np.unpackbits(columns)).tolist())
        return cls(ActivationSpec.from_json(fields), scheme, low, high, factors, kept, body.get("turn"))


def choose_activations(
    choice: Mapping[ActivationSpec, ActivationScheme],
    ranges: Mapping[str, ActivationRange],
    factors: Mapping[str, np.ndarray] | None = None,
    turns: Mapping[str, int] | None = None,
) -> tuple[RoundedActivation, ...]:
    """A scheme for every row, with the static ranges that calibration gives.

    Args:
      choice: rows and their schemes.
      ranges: by path of the row, from `calibrate_activations`; needed for what is static in a scheme alone.
      factors: by path of the row, from `search_smoothing`; ranges are of what was divided by them.
      turns: by path of the row, seeds of rotations; ranges are of what was rotated.

    Raises:
      MpqError: a scheme that does not suit a row, or a static range or outliers that cannot be told.
    """
    chosen = []
    for row, scheme in choice.items():
        require_schemes([row], [scheme])
        low = high = None
        if scheme.static is not None:
            low, high = (tuple(map(float, end)) for end in choose_range(ranges.get(row.path), scheme, row.path))
        smooth = tuple(map(float, factors[row.path])) if factors and row.path in factors else None
        columns = choose_columns(ranges.get(row.path), scheme, row.path) if scheme.fixed else None
        chosen.append(RoundedActivation(row, scheme, low, high, smooth, columns, (turns or {}).get(row.path)))
    return tuple(chosen)


def with_activations(model: Model, traced: Trace, chosen: Sequence[RoundedActivation]) -> Model:
    """`model` with rows rounded wherever it runs, its parameters given or replaced.

    Args:
      model: the function.
      traced: its trace, for inputs of any shape.
      chosen: rows of this trace.

    Raises:
      MpqError: a static range is missing; a row is none of this trace; or a text model is to find the range of a whole
        window while it runs, which its padding would count in.
    """
    if not chosen:
        return model
    inputs = {site.use.input for site in traced.sites} | {spec.path for spec in traced.weights}
    for one in chosen:
        if one.scheme.is_calibrated and one.limits is None and one.columns is None:
            raise MpqError(f"{one.spec.path} at {one.scheme} has no calibrated range: give ranges with mpq calibrate")
        if one.spec.at not in inputs:
            raise MpqError(f"{one.spec.path} is no activation of {model.name}: the plan was made for another model")
        if one.scheme.granularity == "tensor" and one.scheme.static is None and isinstance(model.inputs, Tokens):
            raise MpqError(
                f"{one.scheme} takes the range of a whole window, its padding too, and {model.name} reads text: use "
                f"{one.scheme.of_tokens}, or {one.scheme.number}_tensor_static"
            )
    rows = [one.spec for one in chosen]

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        change = lambda number, x: chosen[number](x, len(inputs))
        return traced.on(inputs.shape).evaluate(params, inputs, replacing(rows, change))

    return dataclasses.replace(model, apply=apply, decoder=None)
