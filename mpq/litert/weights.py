"""Quantized weights in a LiteRT graph: as its own quantized tensors where it has them, scaled by operators elsewhere.

Codes are rows, `[batch * n, k]`, as fully connected layers, convolutions (`[n, height, width, inputs]`) and embedding
tables want them. What LiteRT 2.3 was seen to run alike in XNNPACK, its own and its reference kernels:

- a scale for each row or the tensor, float32, with a zero point of 64 bits beside it: `DEQUANTIZE` of 8, 4 and 2 bits;
- blocks along `k` with scales in float16, of int4 and int2 without zero points: `EMBEDDING_LOOKUP` of all rows
  (`DEQUANTIZE` of blocks gives wrong values, or ends the process);
- any other: codes are numbers (`DEQUANTIZE` with scale 1), less zero points, times scales.

Values are then those of `QTensor.dequantize`, bit for bit, and inputs are not rounded. *Hybrid* operators, which round
their inputs to 8 bits as they run, take tensors of the first two kinds as they are: of blocks those of int4 in 32 rows
and more (the reference kernel gives wrong values for them), in convolutions int8 and int4 for a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.formats.integer import Integer
from mpq.litert.call import reshape
from mpq.litert.graph import Content, Graph, Quantization
from mpq.types import QTensor, Scheme, WeightSpec

WIDTHS = (2, 4, 8)
FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_LEAST = np.float32(2.0**-100)  # a scale of 0, which runtimes refuse
SCALE_BITS, ZERO_BITS = 32, 64
"""Of a row's scale and of its zero point. Zero points that are 0 are written once for all weights of so many rows
(`mpq.litert.graph`), and are no part of any of them."""


def refusal(spec: WeightSpec, scheme: Scheme) -> str | None:
    """Why LiteRT cannot have a weight under a scheme; None where it can."""
    if spec.index:
        return "it is a slice of a parameter"
    if not scheme.has_scale:
        return None
    if not isinstance(scheme.format, Integer) or scheme.blocks is not None or scheme.format.bits not in WIDTHS:
        return "it takes int2, int4 and int8"
    if np.dtype(scheme.scale_dtype).itemsize == 1:
        return "its scales are float16, bfloat16 or float32"
    if scheme.group_size and spec.k % scheme.group_size:
        return f"it takes whole groups, and the weight has {spec.k} rows"
    return None


def size_bits(spec: WeightSpec, scheme: Scheme) -> int:
    """Bits of a weight in the file: a scale for a row or the tensor has 32 bits there, a zero point beside it 64."""
    if not scheme.has_scale or scheme.group_size is not None:
        return spec.size_bits(scheme)
    channel = SCALE_BITS + ZERO_BITS * scheme.zero_point
    return -(-spec.size * scheme.format.bits // 8) * 8 + channel * _channels(spec, scheme)


def has_blocks(scheme: Scheme) -> bool:
    """Whether LiteRT has the blocks of the scheme in a quantized tensor."""
    small = scheme.has_scale and scheme.group_size is not None and scheme.format.bits < 8
    return small and not scheme.zero_point and scheme.scale_dtype == "float16"


def has_table(scheme: Scheme) -> bool:
    """Whether `EMBEDDING_LOOKUP` reads codes of the scheme."""
    return scheme.has_scale and not scheme.zero_point and (scheme.group_size is None or has_blocks(scheme))


def has_hybrid(scheme: Scheme) -> bool:
    """Whether a fully connected layer multiplies rounded inputs by the codes as they are."""
    if not scheme.has_scale or scheme.zero_point:
        return False
    return scheme.group_size is None or (has_blocks(scheme) and scheme.format.bits == 4 and scheme.group_size % 32 == 0)


def has_integer(spec: WeightSpec, scheme: Scheme, rounded_twice: bool) -> bool:
    """Whether a convolution multiplies int8 by the codes as they are.

    Args:
      spec: the weight.
      scheme: its scheme.
      rounded_twice: whether sums may be: those by codes of 4 bits are, by LiteRT's own kernel, which scales them in
        fixed point. XNNPACK scales those by 8 bits in float32, and rounds them once.
    """
    plain = (spec.batch == 1 and not spec.factors) or spec.n == 1  # or each channel has its own kernel
    whole = scheme.has_scale and scheme.group_size is None and not scheme.zero_point
    return plain and whole and scheme.format.bits in ((4, 8) if rounded_twice else (8,))


def folds(scheme: Scheme) -> bool:
    """Whether XNNPACK dequantizes the weight before the first run, and multiplies by a constant then."""
    if not scheme.has_scale:
        return scheme.format.name != "bf16"
    return scheme.group_size is None and scheme.format.bits == 8


class Weights:
    """The quantized weights of one graph, each stored once."""

    def __init__(self, graph: Graph, qtensors: Mapping[str, QTensor]) -> None:
        """Prepare.

        Args:
          graph: to add to.
          qtensors: weight path -> quantized weight.
        """
        self._graph, self._qtensors = graph, qtensors
        self._stored: dict[str, int] = {}
        self._integers: dict[str, int] = {}

    def scheme(self, spec: WeightSpec) -> Scheme:
        """Of a weight."""
        return self._qtensors[spec.path].scheme

    def codes(self, spec: WeightSpec, shape: Sequence[int] | None = None) -> int:
        """The tensor of a quantized kind, or of floats: rows, in the shape that is first asked for."""
        if spec.path not in self._stored:
            self._stored[spec.path] = self._store(spec, list(shape or (spec.batch * spec.n, spec.k)))
        return self._stored[spec.path]

    def hybrid(self, spec: WeightSpec, shape: Sequence[int] | None = None) -> tuple[int, np.ndarray] | None:
        """The codes of a weight for a hybrid operator, and what its channels are multiplied by then: 1 or -1.

        Runtimes want positive scales; where the plan has others, they lie beside. None: blocks have such scales.
        """
        scale = np.asarray(self._qtensors[spec.path].scale).astype(np.float32).reshape(-1)
        if (scale > 0).all():
            return self.codes(spec, shape), np.ones(spec.n)
        if self.scheme(spec).group_size is not None:
            return None
        if spec.path not in self._integers:
            self._beside(spec, "scale", scale)
            bits, shape = self.scheme(spec).format.bits, shape or (spec.n, spec.k)
            content = _packed(spec.size, bits, lambda: _rows(self._qtensors[spec.path].qvalue))
            quantization = Quantization(np.maximum(np.abs(scale), _LEAST))
            self._integers[spec.path] = self._graph.tensor(spec.path, shape, f"int{bits}", content, quantization)
        return self._integers[spec.path], np.broadcast_to(np.where(scale < 0, -1.0, 1.0), spec.n)

    def integer(self, spec: WeightSpec, shape: Sequence[int], axis: int, factor: np.ndarray) -> int | None:
        """The codes of a weight with a scale for a channel, its channels multiplied by `factor`.

        Channels whose scale is negative then have the codes of the opposite sign; which they are lies beside, and the
        scales of the plan. None: the weight lies elsewhere in the graph as it is, or a channel has no such codes.

        Args:
          spec: the weight.
          shape: `[n, height, width, inputs]`, or with the channels last.
          axis: of the channels.
          factor: `float64[channels]`.
        """
        q, bits = self._qtensors[spec.path], self.scheme(spec).format.bits
        scale = np.broadcast_to(np.asarray(q.scale).astype(np.float32).reshape(spec.batch, -1), (spec.batch, spec.n))
        scale = np.ascontiguousarray(scale.reshape(-1))
        rows, sign = _rows(q.qvalue).reshape(-1, spec.k), np.sign(scale * factor).astype(np.int8)
        elsewhere = spec.path in self._stored or spec.path in self._integers
        if elsewhere or not sign.all() or (rows[sign < 0] == -(2 ** (bits - 1))).any():
            return None
        if (factor != 1).any() or (scale < 0).any():
            self._beside(spec, "scale", scale)
        if (sign < 0).any():
            self._beside(spec, "sign", sign)
        turned = lambda: np.ascontiguousarray((rows * sign[:, None]).T if axis else rows * sign[:, None])
        quantization = Quantization(np.abs(scale * factor).astype(np.float32), None, axis)
        content = _packed(spec.size, bits, turned)
        self._integers[spec.path] = self._graph.tensor(spec.path, shape, f"int{bits}", content, quantization)
        return self._integers[spec.path]

    def _beside(self, spec: WeightSpec, part: str, array: np.ndarray) -> None:
        """A tensor that nothing reads but `load`."""
        content = Content(array.nbytes, array.tobytes)
        self._graph.tensor(f"{spec.path}.{part}", array.shape, array.dtype.name, content)

    def values(self, spec: WeightSpec, shape: Sequence[int] | None = None) -> int:
        """The weight in float32: rows, in any shape of as many elements."""
        graph, scheme, rows = self._graph, self.scheme(spec), (spec.batch * spec.n, spec.k)
        whole = shape if shape is not None and not (scheme.has_scale and scheme.group_size) else None
        stored = self.codes(spec, whole)
        given = graph.shape_of(stored)
        if not scheme.has_scale:
            value = self.as_float(stored, FLOATS[scheme.format.name], given)
        elif scheme.group_size is None:
            value = graph.op("DEQUANTIZE", [stored], given, "float32")
        elif has_blocks(scheme):
            every = graph.constant(np.arange(rows[0]), np.int32)
            value = graph.op("EMBEDDING_LOOKUP", [every, stored], rows, "float32")
        else:
            value = self._scaled(spec, stored)
        return reshape(graph, value, shape or rows, "float32")

    def as_float(self, stored: int, dtype: str, shape: Sequence[int]) -> int:
        """`stored` in float32."""
        if dtype == "float32":
            return stored
        return self._graph.op("DEQUANTIZE" if dtype == "float16" else "CAST", [stored], shape, "float32")

    def _scaled(self, spec: WeightSpec, stored: int) -> int:
        graph, q = self._graph, self._qtensors[spec.path]
        shape = self._grouped(spec)
        small = [*shape[:2], 1]
        value = graph.op("DEQUANTIZE", [stored], shape, "float32")
        if q.zero_point is not None:
            zero = self._numbers(f"{spec.path}.zero_point", small, q.scheme.format.bits, lambda: _rows(q.zero_point))
            zero = graph.op("DEQUANTIZE", [zero], small, "float32")
            value = graph.op("SUB", [value, zero], shape, "float32", fusedActivationFunction=0)
        scale = self._scales(spec, small)
        scale = self.as_float(scale, q.scheme.scale_dtype, small)
        return graph.op("MUL", [value, scale], shape, "float32", fusedActivationFunction=0)

    def _grouped(self, spec: WeightSpec) -> list[int]:
        size = self.scheme(spec).group_size or 0
        return [spec.batch * spec.n, spec.k // size, size]

    def _numbers(self, name: str, shape: Sequence[int], bits: int, make: Callable[[], np.ndarray]) -> int:
        """Codes that are read as numbers."""
        one = Quantization(np.ones(1, np.float32))
        return self._graph.tensor(name, shape, f"int{bits}", _packed(math.prod(shape), bits, make), one)

    def _scales(self, spec: WeightSpec, shape: Sequence[int]) -> int:
        q = self._qtensors[spec.path]
        nbytes = math.prod(shape) * np.dtype(q.scheme.scale_dtype).itemsize
        content = Content(nbytes, lambda: _rows(q.scale).tobytes())
        return self._graph.tensor(f"{spec.path}.scale", shape, q.scheme.scale_dtype, content)

    def _store(self, spec: WeightSpec, shape: list[int]) -> int:
        graph, q = self._graph, self._qtensors[spec.path]
        scheme, bits = q.scheme, q.scheme.format.bits
        name = f"{spec.path}.again" if spec.path in self._integers else spec.path
        if not scheme.has_scale:
            dtype = FLOATS[scheme.format.name]
            content = Content(spec.size * np.dtype(dtype).itemsize, lambda: _rows(q.qvalue).tobytes())
            return graph.tensor(spec.path, shape, dtype, content)
        codes = lambda: _rows(q.qvalue)
        if scheme.group_size is None:
            flat = lambda array: np.ascontiguousarray(np.asarray(array).astype(np.float32).reshape(-1))
            spread = lambda array: np.repeat(array, spec.n) if scheme.per_tensor and spec.batch > 1 else array
            zero = None if q.zero_point is None else spread(np.asarray(q.zero_point).reshape(-1))
            quantization = Quantization(spread(flat(q.scale)), zero)
            return graph.tensor(name, shape, f"int{bits}", _packed(spec.size, bits, codes), quantization)
        if not has_blocks(scheme):
            return self._numbers(spec.path, self._grouped(spec), bits, codes)
        scales = self._scales(spec, self._grouped(spec)[:2])
        quantization = Quantization(None, block=scheme.group_size, scales=scales)
        rows = [spec.batch * spec.n, spec.k]
        return graph.tensor(spec.path, rows, f"int{bits}", _packed(spec.size, bits, codes), quantization)


def parameter(graph: Graph, spec: WeightSpec, rows: int) -> int:
    """Rows `[batch * n, k]` as the parameter that they are of."""
    given = [(spec.factors or spec.shape)[axis] for axis in spec.permutation]
    batch_axes, k_axes, n_axes = _divide(spec, given)
    shape = [given[i] for i in (*batch_axes, *n_axes, *k_axes)]
    value = reshape(graph, rows, shape, "float32")
    order = [spec.permutation[i] for i in (*batch_axes, *n_axes, *k_axes)]  # axes of the parameter, as they lie now
    back = [int(i) for i in np.argsort(order)]
    if back != sorted(back):
        turned = [shape[i] for i in back]
        value = graph.op("TRANSPOSE", [value, graph.constant(back, np.int32)], turned, "float32")
    return reshape(graph, value, spec.shape, "float32")


def _divide(spec: WeightSpec, sizes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Positions of the permuted axes that are batch, `k` and `n`."""
    axes, found = iter(enumerate(sizes)), []
    pending = next(axes, None)
    for whole in (spec.batch, spec.k):
        part, product = [], 1
        while pending is not None and product * pending[1] <= whole and (product < whole or pending[1] == 1):
            part.append(pending[0])
            product *= pending[1]
            pending = next(axes, None)
        found.append(part)
    rest = [] if pending is None else [pending[0], *(i for i, _ in axes)]
    return found[0], found[1], rest


def read_codes(arrays: Mapping[str, np.ndarray], scheme: Scheme, k: int, n: int, batch: int) -> QTensor:
    """The quantized weight `[batch, k, n]` back from what is stored of it, all in rows.

    Args:
      arrays: `qvalue`, unpacked, `scale`, `zero_point` and the `sign` that codes were multiplied by, of any shape.
      scheme: its scheme.
      k: rows of the weight.
      n: its columns.
      batch: matrices.
    """
    turn = lambda array, rows: jnp.asarray(array.reshape(batch, n, rows).transpose(0, 2, 1))
    values, scale = turn(arrays["qvalue"], k), arrays.get("scale")
    if "sign" in arrays:
        values = values * turn(arrays["sign"], 1)
    if not scheme.has_scale:
        return QTensor(values, None, None, scheme)
    groups = scheme.scale_shape(k, n)
    if scheme.per_tensor:
        view = lambda array: jnp.asarray(array.reshape(batch, -1)[:, :1, None])
    else:
        view = lambda array: turn(array, groups[0])
    scale = view(scale).astype(scheme.scale_dtype)
    zero = view(arrays["zero_point"]).astype(np.int8) if scheme.zero_point else None
    return QTensor(values.astype(np.int8), scale, zero, scheme)


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Signed codes in C order, the first in the lowest bits of a byte."""
    if bits == 8:
        return np.asarray(codes, np.int8).tobytes()
    each = 8 // bits
    flat = codes.reshape(-1).view(np.uint8) & np.uint8(2**bits - 1)
    flat = np.append(flat, np.zeros(-flat.size % each, np.uint8)).reshape(-1, each)
    packed = flat[:, 0].copy()
    for i in range(1, each):
        packed |= flat[:, i] << (bits * i)
    return packed.tobytes()


def unpack(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """`int8[count]`: inverse of `pack`."""
    if bits == 8:
        return data.view(np.int8)[:count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    flat = ((data[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:count].astype(np.int8)
    return np.where(flat >= 2 ** (bits - 1), flat - 2**bits, flat).astype(np.int8)


def _packed(count: int, bits: int, make: Callable[[], np.ndarray]) -> Content:
    return Content(-(-count * bits // 8), lambda: pack(make(), bits))


def _rows(array: Any) -> np.ndarray:
    """`[batch, rows, n]` as `[batch, n, rows]`."""
    return np.ascontiguousarray(np.asarray(array).transpose(0, 2, 1))


def _channels(spec: WeightSpec, scheme: Scheme) -> int:
    return 1 if scheme.per_tensor and spec.batch == 1 else spec.batch * spec.n
