"""The types that join the stages, and nothing else.

Conventions, stated once. Weights are `w[k, n]` with `y = x @ w`; groups of weights that share a scale run along `k`;
leading axes are batch axes (experts, or equal shapes stacked). Losses are in nats per output: token, image, example.
Sizes are Python ints in bits. Arrays that enter a table are NumPy float64. Everything is frozen.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import jax
import numpy as np

from mpq.grids import Blocks, LearnedFormat, NumberFormat

Params = Mapping[str, jax.Array]
"""A model's parameters by path; paths join the module's attribute names with dots: `layers.0.mlp.up_proj.kernel`."""


SCALE_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {
        "float16": "",
        "float32": "_sfloat32",
        "bfloat16": "_sbfloat16",
        "float8_e4m3fn": "_sfp8",
        "float8_e8m0fnu": "_se8m0",
    }
)
"""Dtype name of stored scales -> what it adds to the text of a scheme."""


class MpqError(Exception):
    """Input that a person can mend. The message is one sentence: what was given, what is allowed, what to try."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one weight is stored: number format, granularity, scale type. `str()` is its text form, such as `int4_g128`.

    Attributes:
      format: the element grid.
      group_size: rows of `k` that share a scale; None: one scale per output channel (the whole column).
      zero_point: affine (asymmetric) if True; only for integer formats.
      scale_dtype: dtype name of the stored scale, a key of `SCALE_SUFFIXES`. `float16` is what llama.cpp and GPTQ
        store. `float8_e4m3fn` are factors of one float32 scale of the whole matrix, as in NVFP4. `float8_e8m0fnu` are
        powers of two, as in the OCP Microscaling formats.
      per_tensor: one scale for the whole matrix; then `group_size` is None.
      blocks: of a block type of ggml, how its scales are stored; else None.
    """

    format: NumberFormat
    group_size: int | None = None
    zero_point: bool = False
    scale_dtype: str = "float16"
    per_tensor: bool = False
    blocks: Blocks | None = None

    def __str__(self) -> str:
        if self.blocks is not None:
            return self.blocks.name
        if not self.has_scale:
            return self.format.name
        whole = "tensor" if self.per_tensor else "channel"
        granularity = whole if self.group_size is None else f"g{self.group_size}"
        return f"{self.format.name}_{granularity}{'_zp' if self.zero_point else ''}{SCALE_SUFFIXES[self.scale_dtype]}"

    @property
    def has_scale(self) -> bool:
        """False for plain float storage."""
        return self.format.max_magnitude is not None

    @property
    def has_tensor_scale(self) -> bool:
        """True if scales are factors of one float32 scale of the whole matrix."""
        return self.has_scale and self.scale_dtype == "float8_e4m3fn"

    @property
    def has_codebook(self) -> bool:
        """True if every matrix has levels of its own."""
        return self.format.learned

    def with_levels(self, codebook: jax.Array | None) -> Self:
        """The scheme that encodes and decodes with learned levels, as `QTensor` has them; it cannot be hashed."""
        if codebook is None:
            return self
        return dataclasses.replace(self, format=cast(LearnedFormat, self.format).with_levels(codebook))

    def fits(self, k: int) -> bool:
        """Whether a weight of `k` rows can be stored so; blocks of ggml are never padded."""
        return self.blocks is None or k % self.blocks.rows == 0

    def num_groups(self, k: int) -> int:
        """Scales per column of `k` rows; the last group may be shorter."""
        if not self.has_scale:
            return 0
        return 1 if self.group_size is None else -(-k // self.group_size)

    def scale_shape(self, k: int, n: int) -> tuple[int, int]:
        """Shape of the scales of one `w[k, n]`, and of its zero points or minima; of ggml's, one for every block."""
        return k // self.blocks.rows if self.blocks else self.num_groups(k), 1 if self.per_tensor else n

    def part_bits(self, k: int, n: int) -> dict[str, int]:
        """Bits of each stored array of one `w[k, n]`; sub-byte arrays are bit streams padded to whole bytes."""
        scales = math.prod(self.scale_shape(k, n))
        parts = {"qvalue": _whole_bytes(k * n * self.format.bits)}
        if self.has_scale:
            parts["scale"] = scales * 8 * np.dtype(self.scale_dtype).itemsize
        if self.zero_point:
            parts["zero_point"] = _whole_bytes(scales * self.format.bits)
        if self.has_tensor_scale:
            parts["tensor_scale"] = 32
        if self.has_codebook:
            parts["codebook"] = 16 << self.format.bits
        if self.blocks is not None:
            sub = _whole_bytes(self.num_groups(k) * n * (self.blocks.sub_bits or 0))
            parts |= {"sub_scale": sub} if sub else {}
            parts |= {"minimum": 16 * scales} if self.blocks.minimum else {}
            parts |= {"sub_minimum": sub} if sub and self.blocks.minimum else {}
        return parts

    def size_bits(self, k: int, n: int, batch: int = 1) -> int:
        """Exact stored size of `batch` weights `w[k, n]`: qvalues, scales, zero points, levels and padding to bytes."""
        return batch * sum(self.part_bits(k, n).values())


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a weight is read.

    Attributes:
      kind: `matmul`, `conv` or `embedding`.
      input: id of the array it multiplies; uses with equal ids read the same input. Embeddings: of the indices.
      macs: multiply-accumulates in one evaluation of the traced inputs: one that takes the most expensive branch of
        every `cond` (uses in other branches have 0) and runs the body of every `while` loop once, for how often it runs
        is known only when it does.
    """

    kind: str
    input: str
    macs: int


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One quantizable weight, as `trace` finds it.

    The parameter array is `params[param]` (of it the slice `where`, for scanned layers); transposed by `permutation`
    and reshaped to `[batch, k, n]` it is the canonical matrix view. Where the view divides one axis (the output
    channels of a grouped convolution), the array is first reshaped to `factors`.

    Attributes:
      path: unique name: `param`, or `param[index]` for a slice.
      index: position along each axis up to the last sliced one, None along a whole axis; `()` for the whole array.
      group: weights of equal group read the same input (q/k/v, gate/up) and share a scheme.
      uses: every place that reads it; a tied embedding has two.
      factors: `shape` with axes divided, or empty where `permutation` acts on `shape` itself.
    """

    path: str
    param: str
    index: tuple[int | None, ...]
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    batch: int
    k: int
    n: int
    group: str
    uses: tuple[Use, ...]
    factors: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`, also after JSON has made lists of the tuples."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
        return cls(**{**values, "uses": tuple(Use(**use) for use in body["uses"])})

    @property
    def kind(self) -> str:
        """Kinds of all uses, joined by `+`: `matmul`, `embedding+matmul`."""
        return "+".join(dict.fromkeys(use.kind for use in self.uses))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all uses."""
        return sum(use.macs for use in self.uses)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.batch * self.k * self.n

    @property
    def where(self) -> tuple[int | slice, ...]:
        """What indexes the parameter array: `params[self.param][self.where]`."""
        return tuple(slice(None) if at is None else at for at in self.index)

    def size_bits(self, scheme: Scheme) -> int:
        """Stored size of this weight under `scheme`."""
        return scheme.size_bits(self.k, self.n, self.batch)

    def read(self, params: Params) -> jax.Array:
        """The weight in float32, `[batch, k, n]`."""
        return self.to_matrix(jax.numpy.asarray(params[self.param], np.float32))

    def write(self, params: Params, matrix: jax.Array) -> dict[str, jax.Array]:
        """`params` with this weight replaced by `matrix[batch, k, n]`; equal tree and shapes, so nothing recompiles."""
        return {**params, self.param: self.from_matrix(matrix, params[self.param])}

    def to_matrix(self, param: jax.Array) -> jax.Array:
        """The matrix view `[batch, k, n]` of the whole parameter array `params[self.param]`."""
        factored = param[self.where].reshape(self.factors or self.shape)
        return factored.transpose(self.permutation).reshape(self.batch, self.k, self.n)

    def from_matrix(self, matrix: jax.Array, param: jax.Array) -> jax.Array:
        """`param` with this weight replaced by `matrix[batch, k, n]`; inverse of `to_matrix`."""
        permuted = tuple((self.factors or self.shape)[axis] for axis in self.permutation)
        weight = (
            matrix.reshape(permuted).transpose(np.argsort(self.permutation)).reshape(self.shape).astype(param.dtype)
        )
        return param.at[self.where].set(weight) if self.index else weight


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStats:
    """What one calibration pass keeps for one weight; weights of one group share it.

    Attributes:
      gram: `float32[batch, k, k]`, E[x xT] over counted positions. The Hessian of the layer's squared error is twice
        that; the 2 is never folded in. Embedding uses read one-hot rows and contribute nothing.
      absmax: `float32[batch, k]`, largest |x|.
      num_tokens: positions counted.
    """

    gram: np.ndarray
    absmax: np.ndarray
    num_tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class SensitivityTable:
    """Predicted loss increase when one weight alone takes a scheme: all that `allocate` needs to know of the model.

    Attributes:
      weights, schemes: rows and columns.
      loss_increase: `float64[L, S]`, nats per output; without meaning where a scheme does not fit (`Scheme.fits`).
      stderr: `float64[L, S]`, standard error over documents or probes; 0 where the metric is deterministic, NaN where a
        single document or probe leaves it unknown.
      metric: name of the metric and its options.
      quantizer: name of the rounding algorithm whose error was scored.
      model_digest, data_digest: what it was made from.
    """

    weights: tuple[WeightSpec, ...]
    schemes: tuple[Scheme, ...]
    loss_increase: np.ndarray
    stderr: np.ndarray
    metric: str
    quantizer: str
    model_digest: str
    data_digest: str


class Status(enum.Enum):
    """How good a solution is known to be."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """A bit allocation: one scheme for every weight.

    Attributes:
      choice: path -> scheme, in the table's order.
      loss: predicted loss increase, nats per token, with `stderr` (NaN: unknown).
      size_bits: of the quantized weights, exactly.
      budget_bits: the limit it was solved for.
      lower_bound: no allocation within the budget has a smaller predicted loss.
      status: `OPTIMAL` if `loss` equals the bound, up to rounding.
      solver: name of the solver.
    """

    choice: dict[str, Scheme]
    loss: float
    stderr: float
    size_bits: int
    budget_bits: int
    lower_bound: float
    status: Status
    solver: str

    @property
    def gap(self) -> float:
        """`loss - lower_bound`, nats per token."""
        return self.loss - self.lower_bound


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized weight: `w ~= (decode(qvalue) - decode(zero_point)) * scale * tensor_scale`.

    Scales and zero points are repeated along `k`, or looked up where the rows of a group are not neighbours; where the
    whole matrix has one, `[batch, 1, 1]`, along `n` too. In
    blocks of ggml `w ~= decode(qvalue) * scale * sub_scale - minimum * sub_minimum`, or without integers of groups
    `decode(qvalue) * scale + minimum`.

    Attributes:
      qvalue: `int8[batch, k, n]` logical codes, or the values themselves for a format without scale.
      scale: `[batch, groups, n]` in the scheme's scale dtype; None without scale. May be negative.
      zero_point: `int8[batch, groups, n]` or None.
      scheme: static.
      tensor_scale: `float32[batch, 1, 1]`, positive, under scales of 8 bits (`Scheme.has_tensor_scale`); else None.
      sub_scale, sub_minimum: `int8[batch, groups, n]`, of blocks of ggml that have them (`Blocks`).
      minimum: `float16[batch, blocks, n]`, of blocks of ggml that have it.
      codebook: `float16[batch, levels, 1]`, of each code its level, if those are learned (`Scheme.has_codebook`).
      row_group: `int32[batch, k]`, the group of each row, where they are not neighbours: GPTQ with `desc_act`, which is
        only read. None: the first `group_size` rows are group 0, and so on.
    """

    qvalue: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    tensor_scale: jax.Array | None = None
    sub_scale: jax.Array | None = None
    minimum: jax.Array | None = None
    sub_minimum: jax.Array | None = None
    codebook: jax.Array | None = None
    row_group: jax.Array | None = None

    @property
    def grid(self) -> NumberFormat:
        """The element grid, with this weight's levels if they are learned."""
        return self.scheme.with_levels(self.codebook).format

    @property
    def effective_scale(self) -> jax.Array | None:
        """`float32[batch, groups, n]`: what a step of the grid is worth."""
        if self.scale is None:
            return None
        scale = self._by_group(self.scale.astype(np.float32), self.sub_scale)
        return scale if self.tensor_scale is None else scale * self.tensor_scale

    @property
    def offset(self) -> jax.Array | None:
        """`float32[batch, groups, n]`: what blocks with a minimum add to every value; None without."""
        if self.minimum is None:
            return None
        offset = self._by_group(self.minimum.astype(np.float32), self.sub_minimum)
        return offset if self.sub_minimum is None else -offset

    def dequantize(self) -> jax.Array:
        """`float32[batch, k, n]`."""
        value = self.grid.decode(self.qvalue).astype(np.float32)
        scale, offset = self.effective_scale, self.offset
        if scale is None:
            return value
        if self.zero_point is not None:
            value = value - self.spread(self.grid.decode(self.zero_point).astype(np.float32))
        value = value * self.spread(scale)
        return value if offset is None else value + self.spread(offset)

    def require_neighbours(self, path: str) -> None:
        """Refuse groups whose rows are not neighbours, for what has no form for those.

        Raises:
          MpqError: names the weight.
        """
        if self.row_group is not None:
            raise MpqError(
                f"weight {path} has groups of rows that are not neighbours (desc_act of GPTQ), which can be read, "
                "dequantized and evaluated alone: quantize the model anew to export or pack it"
            )

    def _by_group(self, per_block: jax.Array, integer: jax.Array | None) -> jax.Array:
        if integer is None:
            return per_block
        repeats = integer.shape[-2] // per_block.shape[-2]
        return jax.numpy.repeat(per_block, repeats, axis=-2) * integer.astype(np.float32)

    def spread(self, per_group: jax.Array) -> jax.Array:
        """One number a group to one a row: `[batch, groups, n]` to `[batch, k, n]`."""
        if self.row_group is not None:
            return jax.numpy.take_along_axis(per_group, self.row_group[..., None], axis=-2)
        k = self.qvalue.shape[-2]
        return jax.numpy.repeat(per_group, self.scheme.group_size or k, axis=-2)[..., :k, :]


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8) * 8
