"""HQQ: scales fitted to all weights of a group but its outliers, without data.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": the error of a group is measured by
a norm that forgives outliers, sum |w - q|^p with p < 1. With outliers e of their own, half-quadratic splitting gives
two steps in turn, each in closed form:

    e      <-  sign(d) max(0, |d| - |d|^(p - 1) / beta),   d = w - q        (proximal step, their eq. 5)
    scale, zero point  <-  least squares fit of q to w - e                  (their eq. 7 for the zero point)

Differences from the paper:
- Its zero points are real numbers and all that it fits. Here they are codes, so the mean that it takes as the zero
  point is rounded, which seldom moves it, and the *scale* is fitted too: s = <c, w - e> / <c, c> for what the codes
  decode to, less the zero point. In symmetric schemes it alone takes the place of the zero point.
- d is measured in steps of the group (of uneven levels, in their mean), not in units of the weight: the result does not
  depend on the size of the weights.
- Of all rounds, the absmax start among them, a group keeps the one of the smallest norm whose squared error is not
  above the start's. So the squared error is never above that of RTN, by construction.
- What all groups of a matrix share (a tensor scale, learned levels, or the one scale of a scheme per tensor) is RTN's,
  and so is all of a block of ggml with integers of groups or a minimum.

It knows nothing of the inputs, so where some of them are much larger than others, algorithms that see a gram do better.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpq.quantize import scales
from mpq.quantize.rtn import RTN
from mpq.quantize.widths import common, with_width
from mpq.types import MpqError, QTensor, Scheme

_Fit = tuple[jax.Array, jax.Array | None]  # scale and zero point of every group


@dataclasses.dataclass(frozen=True)
class HQQ:
    """Half-quadratic refinement of absmax scales. Float formats are cast.

    Attributes:
      p: of the norm, above 0 and at most 1.
      beta: of the first proximal step; larger ones take less of an error for an outlier's.
      kappa: what beta is multiplied by after each round.
      rounds: of the two steps.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise MpqError(f"p is {self.p}: it must be above 0 and at most 1, such as 0.7")
        if not (0 < self.beta < float("inf") and 1 <= self.kappa < float("inf")):
            raise MpqError(f"beta {self.beta} must be positive and kappa {self.kappa} at least 1, such as 10 and 1.01")
        if self.rounds < 1:
            raise MpqError(f"rounds is {self.rounds}: it must be at least 1, such as 20")

    @property
    def name(self) -> str:
        """`hqq`."""
        return "hqq"

    @property
    def data_aware(self) -> bool:
        """Never."""
        return False

    def __call__(self, w: jax.Array, scheme: Scheme, gram: jax.Array | None = None) -> QTensor:
        """Quantize `w`.

        Args:
          w: `float32[batch, k, n]`, finite.
          scheme: any scheme.
          gram: not read.
        """
        if scheme.per_tensor or not scales.can_move(scheme):
            return RTN()(w, scheme)
        return dataclasses.replace(_hqq(w, *common(scheme), self), scheme=scheme)


@functools.partial(jax.jit, static_argnames=("scheme", "options"))
def _hqq(w: jax.Array, scheme: Scheme, width: jax.Array | None, options: HQQ) -> QTensor:
    inside = with_width(scheme, width)
    ones = jnp.ones((*w.shape[:-1], 1))
    shared = scales.fit_matrix(w, inside, "absmax", ones[..., 0])
    x, real = scales.grouped(w, inside), scales.grouped(ones, inside)
    grid = inside.with_levels(shared.codebook)
    start = scales.fit_group(x, grid, "absmax", real, shared.tensor_scale)
    fit = _refined(x, real, start, grid, shared.tensor_scale, options)
    got = scales.rounded(x, w.shape[-2], *fit, inside, shared)
    return dataclasses.replace(got, scheme=scheme)


def _refined(
    x: jax.Array, real: jax.Array, start: _Fit, scheme: Scheme, tensor_scale: jax.Array | None, options: HQQ
) -> _Fit:
    """The best scale and zero point of every group `x[..., rows, n]`; `real[..., rows, 1]` is 0 where rows fill up."""
    unit = jnp.float32(1) if tensor_scale is None else tensor_scale
    step = jnp.abs(start[0] * unit)[..., None, :] * _step(scheme)

    def codes(fit: _Fit) -> tuple[jax.Array, jax.Array]:
        """Codes, and the errors that they leave, in steps of the start."""
        scale, zero_point = fit[0] * unit, fit[1]
        qvalue = scales.encode(x, scale, zero_point, scheme)
        return qvalue, real * (x - scales.decode(qvalue, scale, zero_point, scheme)) / step

    def one_round(index: jax.Array, state: tuple[_Fit, _Fit, jax.Array]) -> tuple[_Fit, _Fit, jax.Array]:
        current, best, least = state
        qvalue, error = codes(current)
        beta = options.beta * options.kappa ** index.astype(jnp.float32)
        magnitude = jnp.abs(error)
        outlier = jnp.sign(error) * jnp.maximum(0.0, magnitude - magnitude ** (options.p - 1) / beta)
        target = (x / step - outlier) * real
        current = _least_squares(target, qvalue, step, real, current, scheme, unit)
        _, error = codes(current)
        norm, square = jnp.sum(jnp.abs(error) ** options.p, axis=-2), jnp.sum(error**2, axis=-2)
        better = (norm < least) & (square <= most)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), current, best)
        return current, best, jnp.where(better, norm, least)

    _, error = codes(start)
    least, most = jnp.sum(jnp.abs(error) ** options.p, axis=-2), jnp.sum(error**2, axis=-2)
    first: Any = (start, start, least)
    return jax.lax.fori_loop(0, options.rounds, one_round, first)[1]


def _least_squares(
    target: jax.Array,
    qvalue: jax.Array,
    step: jax.Array,
    real: jax.Array,
    current: _Fit,
    scheme: Scheme,
    unit: jax.Array,
) -> _Fit:
    """Zero point, then scale, that bring what the codes stand for close to `target`, which is in steps."""
    scale, zero_point = current
    level = scheme.format.decode(qvalue)
    if zero_point is not None:
        relative = step / (scale * unit)[..., None, :]  # the steps of integers are 1
        mean = jnp.sum((level - target * relative) * real, axis=-2) / jnp.sum(real, axis=-2)
        zero_point = scheme.format.encode(mean)
        level = (level - scheme.format.decode(zero_point)[..., None, :]) * real
    product, square = jnp.sum(level * target, axis=-2), jnp.sum(level**2, axis=-2)
    product, step = product * jnp.sign(scale), step * jnp.sign(scale)[..., None, :]  # scales keep their sign
    # A group of zeros, or a zero point that moved past all codes, leaves nothing to fit.
    fitted = jnp.where(product > 0, product / jnp.where(square > 0, square, 1.0) * step[..., 0, :] / unit, scale)
    return scales.round_scale(fitted, scheme.scale_dtype), zero_point


def _step(scheme: Scheme) -> float:
    """Mean distance of two levels, before any scale."""
    grid = scheme.format
    if grid.uniform:
        return 1.0
    assert grid.max_magnitude is not None
    return 2 * grid.max_magnitude / (grid.max_qvalue - grid.min_qvalue)  # they reach as far below zero as above
