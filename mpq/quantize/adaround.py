"""AdaRound: down or up is learned for every weight, under given scales.

Nagel et al. 2020, arXiv:2004.10568. Between the levels below and above a weight it is

    below + h(v) (above - below),   h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)                              (eq. 23)

and v minimizes the error of the layer's output plus lambda sum_i 1 - |2 h(v_i) - 1|^beta, which drives every h to 0 or
1 as beta falls from 20 to 2 (eqs. 24 and 25). At first there is no such term, at last the nearer end is taken.

Differences from the paper:
- The loss is tr(eT H e) of one matrix, for the error e = w - quantized and the gram H: all of the calibration data at
  once instead of batches; inputs are those of the original model, and no activation function follows.
- It is measured in that of the start, and the second term is a mean over the rows of a column. So neither the size of
  the weights nor that of the inputs changes the result, and columns are independent.
- Scales, zero points and what a matrix shares are those of the start. Each column keeps the better of start and result:
  so its layer loss is never above that of the start, nor of RTN, by construction.
- For formats with uneven levels above and below are the two nearest ones.

A large lambda is what makes it work: at 0.1, as many of the layer's losses as the paper's own, h stays in between, and
rounding it at last costs more than was won.

It fails where a weight should go further than to one of the two nearest levels, as GPTQ lets it at 2 bits.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpq.quantize import scales
from mpq.quantize.gptq import GPTQ
from mpq.quantize.loss import better, dot
from mpq.quantize.rtn import RTN
from mpq.quantize.tiles import by_columns
from mpq.quantize.widths import common, with_width
from mpq.types import MpqError, QTensor, Scheme

_STRETCH = 0.1  # how far the sigmoid reaches beyond 0 and 1: there h is flat, and v stops
_INSIDE = 0.01  # how far inside of 0 and 1 every h begins
_LEAST = 1e-5  # slopes smaller than this move little: at first h is exact, and what there is of slopes is rounding
_WARM = 0.2  # of the steps, before the second term sets in
_BETA = 20.0, 2.0
_GPTQ = GPTQ()


@dataclasses.dataclass(frozen=True)
class AdaRound:
    """Rounding down or up, learned by Adam on the layer loss. Float formats are cast.

    Without a gram (a weight that is only looked up, never multiplied) it is its start.

    Attributes:
      steps: of Adam.
      rate: of Adam, in units of v.
      regularization: lambda, in units of the start's layer loss.
      start: gives the scales, and what has to be beaten.
      columns: output columns computed at once, as in `GPTQ`.
    """

    steps: int = 400
    rate: float = 0.2
    regularization: float = 10.0
    start: RTN | GPTQ = _GPTQ
    columns: int = 256

    def __post_init__(self) -> None:
        if self.steps < 1 or self.columns < 1:
            raise MpqError(f"steps {self.steps} and columns {self.columns} must be at least 1, such as 400 and 256")
        if not (0 < self.rate < float("inf") and 0 <= self.regularization < float("inf")):
            raise MpqError(
                f"rate {self.rate} must be positive and regularization {self.regularization} at least 0, "
                "such as 0.2 and 10"
            )

    @property
    def name(self) -> str:
        """`adaround`."""
        return "adaround"

    @property
    def scale(self) -> str:
        """How the start chooses its scales."""
        return self.start.scale

    @property
    def data_aware(self) -> bool:
        """Always."""
        return True

    def __call__(self, w: jax.Array, scheme: Scheme, gram: jax.Array | None = None) -> QTensor:
        """Quantize `w` so that `x @ w` changes little.

        Args:
          w: `float32[batch, k, n]`, finite.
          scheme: any scheme.
          gram: `float32[batch, k, k]`, E[x xT], finite and positive semidefinite; or None.

        Raises:
          MpqError: `k` does not fill the blocks of the scheme.
        """
        start = self.start(w, scheme, gram)
        if gram is None or not scales.can_move(scheme):
            return start
        form, width = common(scheme)
        options = dataclasses.replace(self, columns=1)  # what is compiled does not depend on it
        learn = lambda w, start: _learn(w, start, gram, width, options)
        learned = by_columns(learn, w, dataclasses.replace(start, scheme=form), self.columns)
        return dataclasses.replace(learned, scheme=scheme)


class _Between(NamedTuple):
    """Where weights lie, `[batch, k, n]` each.

    Attributes:
      code: `int8`, of the level below; the one above has the next.
      below: what that level stands for.
      step: from there to the level above.
    """

    code: jax.Array
    below: jax.Array
    step: jax.Array


@functools.partial(jax.jit, static_argnames="options")
def _learn(w: jax.Array, start: QTensor, gram: jax.Array, width: jax.Array | None, options: AdaRound) -> QTensor:
    """The better of `start` and what is learned, for every output column of `w[batch, k, n]`."""
    form, scheme = start.scheme, with_width(start.scheme, width)
    between = _between(w, start, scheme.with_levels(start.codebook))
    start = dataclasses.replace(start, scheme=scheme)
    error = w - start.dequantize()
    least = jnp.sum(error * dot(gram, error), axis=-2, keepdims=True)
    h = _settled(w, between, gram, jnp.where(least > 0, least, 1.0), options)
    learned = dataclasses.replace(start, qvalue=between.code + (h > 0.5).astype(jnp.int8))
    return dataclasses.replace(better(learned, start, w, gram), scheme=form)


def _settled(w: jax.Array, between: _Between, gram: jax.Array, unit: jax.Array, options: AdaRound) -> jax.Array:
    """What h of every weight is after all steps; `unit[batch, 1, n]` is what layer losses are measured in."""

    def term(v: jax.Array, beta: jax.Array) -> jax.Array:
        return jnp.sum(1 - jnp.abs(2 * _rectified(v) - 1) ** beta) / w.shape[-2]

    def one_step(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        v, mean, square = state
        step = index.astype(jnp.float32)
        time = (step / options.steps - _WARM) / (1 - _WARM)
        beta = _BETA[1] + (_BETA[0] - _BETA[1]) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(time, 0.0, 1.0)))
        h, back = jax.vjp(_rectified, v)
        error = w - between.below - h * between.step
        (slope,) = back(-2 * between.step * dot(gram, error) / unit)
        slope += jnp.where(time > 0, options.regularization, 0.0) * jax.grad(term)(v, beta)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2  # Adam
        move = mean / (1 - 0.9 ** (step + 1)) / (jnp.sqrt(square / (1 - 0.999 ** (step + 1))) + _LEAST)
        return v - options.rate * move, mean, square

    # The inverse of h. At its ends it is flat, and v would stay there.
    share = jnp.clip((w - between.below) / between.step, _INSIDE, 1 - _INSIDE)
    v = jax.scipy.special.logit((share + _STRETCH) / (1 + 2 * _STRETCH))
    first = (v, jnp.zeros_like(v), jnp.zeros_like(v))
    return _rectified(jax.lax.fori_loop(0, options.steps, one_step, first)[0])


def _rectified(v: jax.Array) -> jax.Array:
    """h, the rectified sigmoid."""
    return jnp.clip((1 + 2 * _STRETCH) * jax.nn.sigmoid(v) - _STRETCH, 0.0, 1.0)


def _between(w: jax.Array, start: QTensor, scheme: Scheme) -> _Between:
    """The two levels that each weight lies between, or the outermost two, under the scales of `start`."""
    assert start.scale is not None
    grid, unit = scheme.format, jnp.float32(1) if start.tensor_scale is None else start.tensor_scale
    x, scale = scales.grouped(w, scheme), start.scale.astype(jnp.float32) * unit
    zero = jnp.zeros_like(scale) if start.zero_point is None else grid.decode(start.zero_point)
    value = x / scale[..., None, :] + zero[..., None, :]
    nearest = grid.encode(value)
    lower = nearest - (grid.decode(nearest) > value).astype(jnp.int8)
    lower = jnp.clip(lower, grid.min_qvalue, grid.max_qvalue - 1).astype(jnp.int8)
    level = lambda code: (grid.decode(code) - zero[..., None, :]) * scale[..., None, :]
    rows = lambda a: a.reshape(*w.shape[:-2], -1, w.shape[-1])[..., : w.shape[-2], :]
    below = level(lower)
    return _Between(rows(lower), rows(below), rows(level(lower + jnp.int8(1)) - below))
