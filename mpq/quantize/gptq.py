"""GPTQ: rows are rounded one after another, each making up for the errors of those before it.

Frantar et al. 2022, arXiv:2210.17323, Alg. 1, in the form of Babai's nearest plane (Chen et al. 2025,
arXiv:2507.18553), which gives the same codes without an inverse. Write the damped gram as H = R RT with R upper
triangular. The layer's loss for the error e = w - q of one output column is then

    tr(eT H e) = sum_j ( sum_{i <= j} R_ij e_i )^2,

and row j, which comes after rows i < j, can only zero its own square: it rounds  w_j + (sum_{i < j} R_ij e_i) / R_jj.

Differences from the paper:
- Loops run over groups, over blocks of a group, and over the rows of a block. Scales of a group are chosen when all
  earlier rows have had their effect on it, wherever blocks begin. So the result does not depend on `block_size`, up to
  float32 rounding.
- Inputs that calibration never excited (zero on the gram's diagonal) are rounded to nearest, not set to zero: other
  text may excite them.
- What all groups of a matrix share (a tensor scale, learned levels, or the one scale of a scheme per tensor) is that of
  the original weights: it has to be known before the first row is rounded.
- In blocks of ggml the groups of a block have their scales and minima, all at once, when its first row is reached.
- Output columns are independent; one whose loss comes out above RTN's, because clipping made the greedy order fail,
  gets RTN's codes and scales. So the layer loss is never above RTN's, by construction. Of columns that are encoded
  together (`mpq.formats.trellis`) the row is rounded at once, and a whole span takes the one or the other.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq.formats.ggml import require_fit
from mpq.grids import encode_scaled
from mpq.quantize import block_scales, scales, tiles
from mpq.quantize.chain import Chain, at_places, below, factor, in_turn, unplace
from mpq.quantize.loss import choose, dot
from mpq.quantize.rtn import RTN
from mpq.quantize.widths import common, with_width
from mpq.types import MpqError, QTensor, Scheme

_Fit = tuple[jax.Array, jax.Array | None] | block_scales.BlockFit  # scale and zero point, or what blocks store


class _Grid(NamedTuple):
    """What rows are rounded to, `[rows, n]` each; None where the scheme has none."""

    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None

    def encode(self, x: jax.Array, scheme: Scheme) -> jax.Array:
        if block_scales.applies(scheme):
            return block_scales.encode(x, self.scale, self.offset, scheme)
        shift = 0.0 if self.zero_point is None else scheme.format.decode(self.zero_point)
        return encode_scaled(scheme.format, x / self.scale + shift, self.scale)

    def decode(self, qvalue: jax.Array, scheme: Scheme) -> jax.Array:
        if block_scales.applies(scheme):
            return block_scales.decode(qvalue, self.scale, self.offset, scheme)
        shift = 0.0 if self.zero_point is None else scheme.format.decode(self.zero_point)
        return (scheme.format.decode(qvalue) - shift) * self.scale


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Error-compensating rounding with the gram of the layer's inputs.

    Float formats are cast. Without a gram (a weight that is only looked up, never multiplied) it is RTN with the same
    scales.

    Attributes:
      damping: added to the gram's diagonal, as a fraction of its mean; raised tenfold until the factorization is
        finite.
      act_order: round the rows of the largest E[x^2] first; scales are then those of the original weights.
      block_size: rows whose effect on later blocks is applied at once. For speed only.
      scale: as in `RTN`.
      columns: output columns computed at once, of weights of 2048 columns and more up to sixteen times as many. They
        are independent, so this only bounds memory and lets weights of different n share one compilation; raise it
        where launching many small steps costs more than computing.
    """

    damping: float = 0.01
    act_order: bool = False
    block_size: int = 32
    scale: str = "mse"
    columns: int = 256

    def __post_init__(self) -> None:
        scales.check_method(self.scale)
        if not 0 <= self.damping < float("inf"):
            raise MpqError(f"damping is {self.damping}: it must be a finite fraction of at least 0, such as 0.01")
        if self.block_size < 1 or self.columns < 1:
            raise MpqError(
                f"block size {self.block_size} and columns {self.columns} must be at least 1, such as 32 and 256"
            )

    @property
    def name(self) -> str:
        """`gptq`, or `gptq_act_order`."""
        return "gptq_act_order" if self.act_order else "gptq"

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
        require_fit(scheme, w.shape[-2])
        if gram is None or not scheme.has_scale:
            return RTN(self.scale)(w, scheme, gram)
        block, place = _places(gram, scheme, self)
        chunks = 1 if self.act_order else _chunks(scheme, w.shape[-2])[0]
        chain = factor(gram, place, jnp.float32(self.damping), chunks)
        n, shared = w.shape[-1], scales.Shared()
        if scheme.per_tensor or scheme.has_tensor_scale or scheme.has_codebook:
            row_weight = scales.row_weight(gram.diagonal(axis1=-2, axis2=-1))
            shared = _fit_matrix(w, row_weight, *common(scheme), self.scale)
        arguments = (gram, place, chain, shared, *common(scheme), self.scale, block, self.act_order)
        width = tiles.width(n, self.columns + -self.columns % scheme.format.span)
        parts = [_quantize(part, *arguments) for part in tiles.cut(w, n, width)]
        return shared.restore(dataclasses.replace(tiles.join(parts, n), scheme=scheme))


@functools.partial(jax.jit, static_argnames=("scheme", "method"))
def _fit_matrix(
    w: jax.Array, row_weight: jax.Array, scheme: Scheme, width: jax.Array | None, method: str
) -> scales.Shared:
    return scales.fit_matrix(w, with_width(scheme, width), method, row_weight)


def _places(gram: jax.Array, scheme: Scheme, options: GPTQ) -> tuple[int, jax.Array | None]:
    """Rows of a block, and `int32[batch, places]`: which row is rounded when, k where a place only fills up a block.

    None: every row in its turn, and none is missing.
    """
    batch, k = gram.shape[:2]
    if options.act_order:
        block = min(options.block_size, k)
        order = jnp.argsort(-gram.diagonal(axis1=-2, axis2=-1), axis=-1, stable=True)
        return block, jnp.pad(order, ((0, 0), (0, -k % block)), constant_values=k)
    groups, size = _chunks(scheme, k)
    block = -(-size // -(-size // options.block_size))  # as many blocks as it takes, as even as they can be
    if groups * size == k and size % block == 0:
        return block, None
    place = np.pad(np.arange(k), (0, groups * size - k), constant_values=k).reshape(groups, size)
    place = np.pad(place, ((0, 0), (0, -size % block)), constant_values=k)  # every group is whole blocks
    return block, jax.device_put(np.broadcast_to(place.reshape(-1).astype(np.int32), (batch, place.size)))


def _chunks(scheme: Scheme, k: int) -> tuple[int, int]:
    """How many parts of `k` get their scales at once, and their rows: groups, or blocks of ggml."""
    if scheme.blocks is not None:
        return k // scheme.blocks.rows, scheme.blocks.rows
    return scheme.num_groups(k), min(scheme.group_size or k, k)


@functools.partial(jax.jit, static_argnames=("scheme", "method", "block", "act_order"))
def _quantize(
    w: jax.Array,
    gram: jax.Array,
    place: jax.Array | None,
    chain: Chain,
    shared: scales.Shared,
    scheme: Scheme,
    width: jax.Array | None,
    method: str,
    block: int,
    act_order: bool,
) -> QTensor:
    """The better of GPTQ and RTN for every output column of `w[batch, k, n]`, rows in the order of `place`."""

    def one(*entry: Any) -> QTensor:
        got = _one(*entry, scheme=with_width(scheme, width), method=method, block=block, act_order=act_order)
        return dataclasses.replace(got, scheme=scheme)

    entries = (w, gram.diagonal(axis1=-2, axis2=-1), place, chain, shared)
    if len(w) == 1:  # the usual case compiles a quarter faster without the batch axis
        return jax.tree.map(lambda a: a[None], one(*jax.tree.map(lambda a: a[0], entries)))
    return jax.vmap(one)(*entries)


def _one(
    w: jax.Array,
    diagonal: jax.Array,
    place: jax.Array | None,
    chain: Chain,
    shared: scales.Shared,
    scheme: Scheme,
    method: str,
    block: int,
    act_order: bool,
) -> QTensor:
    """`_quantize` of one batch entry: `w[k, n]`, `diagonal[k]` of its gram, `place[places]`.

    What is shared comes back along `n`, as everything that is chosen by column.
    """
    k, row_weight = w.shape[0], scales.row_weight(diagonal)
    nearest, grid = scales.quantize(w, scheme, method, row_weight, shared), scheme.with_levels(shared.codebook)
    if act_order:
        assert place is not None
        qvalue, loss = _in_order(at_places(w, place), chain, nearest, grid, place, block)
        got = dataclasses.replace(nearest, qvalue=unplace(qvalue, place, k))
    else:
        placed = at_places(w, place), at_places(row_weight[:, None], place)
        qvalue, fit, loss = _in_groups(*placed, chain, shared, grid, _chunks(scheme, k)[0], method, block)
        qvalue = unplace(qvalue, place, k)
        if isinstance(fit, block_scales.BlockFit):
            got = block_scales.store(qvalue, fit, scheme)
        else:
            got = dataclasses.replace(
                nearest, qvalue=qvalue, scale=fit[0].astype(scheme.scale_dtype), zero_point=fit[1]
            )
    error = at_places(w - nearest.dequantize(), place)
    return choose(below(loss, chain, error, scheme.format.span), got, nearest)


def _in_order(
    w: jax.Array, chain: Chain, nearest: QTensor, scheme: Scheme, place: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """Codes of rows in any order, under the scales of `nearest`; and the loss `[n]`."""
    effective = nearest.effective_scale
    assert effective is not None
    k = nearest.qvalue.shape[0]
    group = jnp.minimum(place, k - 1) // (nearest.scheme.group_size or k)
    grid = jax.tree.map(lambda a: a[group], _Grid(effective, nearest.zero_point, nearest.offset))
    return _round_rows(w, jnp.zeros_like(w), chain, grid, block, scheme)[1]


def _in_groups(
    w: jax.Array,
    row_weight: jax.Array,
    chain: Chain,
    shared: scales.Shared,
    scheme: Scheme,
    groups: int,
    method: str,
    block: int,
) -> tuple[jax.Array, _Fit, jax.Array]:
    """Codes, fit and the loss `[n]`, rows in storage order.

    A group takes its scales when all earlier rows have had their effect on it.
    """
    shared = jax.tree.map(lambda a: a[0], shared._replace(codebook=None))

    def group(pull: jax.Array, links: jax.Array, row: tuple[Any, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        w, row_weight, weight, solve = row
        part = chain._replace(links=links, weight=weight)
        updated = w if solve is None else w + dot(solve, pull)
        fit, grid = _fit_rows(updated, row_weight, shared, scheme, method)
        error, (qvalue, loss) = _round_rows(w, pull, part, grid, block, scheme)
        return error, (qvalue, fit, loss)

    rows = (a.reshape(groups, -1, *a.shape[1:]) for a in (w, row_weight, chain.weight))
    _, (qvalue, fit, loss) = in_turn(group, chain.links, jnp.zeros_like(w), (*rows, chain.solve))
    return qvalue.reshape(w.shape), fit, loss.sum(axis=0)


def _fit_rows(
    w: jax.Array, row_weight: jax.Array, shared: scales.Shared, scheme: Scheme, method: str
) -> tuple[_Fit, _Grid]:
    """Scales of `w[rows, n]`, one group or one block of ggml and what fills it up, and the grid of each row."""
    if block_scales.applies(scheme):
        assert scheme.blocks is not None
        size = scheme.blocks.rows
        x, row = (block_scales.in_groups(a[:size], scheme)[0] for a in (w, row_weight))
        fit = block_scales.fit_blocks(x, scheme, method, row)
        spread = lambda a: jnp.pad(jnp.repeat(a, x.shape[1], axis=0), ((0, len(w) - size), (0, 0)))
        step, offset = jax.tree.map(spread, (fit.step, fit.offset))
        return fit, _Grid(step, None, offset)
    scale, zero_point = shared.scale, shared.zero_point
    if scale is None:
        scale, zero_point = scales.fit_group(w, scheme, method, row_weight, shared.tensor_scale)
    effective = scale if shared.tensor_scale is None else scale * shared.tensor_scale
    each, zero = jax.tree.map(lambda a: jnp.broadcast_to(a, w.shape), (effective, zero_point))
    return (scale, zero_point), _Grid(each, zero, None)


def _round_rows(
    w: jax.Array,
    pull: jax.Array,
    chain: Chain,
    grid: _Grid,
    block: int,
    scheme: Scheme,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Rounds `w[rows, n]` row by row: block by block, so that most of the work is matrix products.

    Args:
      w: `float32[rows, n]`.
      pull: `float32[rows, n]`, what rows outside add to the target of each row.
      chain: of these rows.
      grid: what every row is rounded to.
      block: rows of a block; divides `rows`.
      scheme: the scheme.

    Returns:
      error `w - dequantized`, `[rows, n]`; codes, and what these rows add to the loss, `[n]`.
    """

    def one_row(error: jax.Array, row: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        index, base, link, value, grid = row
        qvalue = grid.encode(base + dot(link, error), scheme)
        return error.at[index].set(value - grid.decode(qvalue, scheme)), qvalue

    def one_by_one(pull: jax.Array, links: jax.Array, given: tuple[Any, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        w, weight, grid = given
        table = (jnp.arange(block), w + pull, links, w, grid)
        error, qvalue = jax.lax.scan(one_row, jnp.zeros_like(w), table)
        squares = weight[:, None] * (pull + dot(links, error)) ** 2 - chain.damping * error**2
        return error, (qvalue, jnp.sum(squares, axis=0))

    blocks = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), (w, chain.weight, grid))
    error, (qvalue, loss) = in_turn(one_by_one, chain.links, pull, blocks)
    return error, (qvalue.reshape(w.shape), loss.sum(axis=0))
