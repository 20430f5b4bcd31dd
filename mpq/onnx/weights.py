"""Quantized weights in a graph: block-quantized matmuls of ONNX Runtime, and dequantization where they do not fit.

`MatMulNBits` (com.microsoft, `ContribOperators.md` of ONNX Runtime 1.32) multiplies by codes of 2, 4 or 8 bits as they
are: `B` is `uint8[n, blocks, block * bits / 8]`, low bits first along `k`, scales are `[n, blocks]`, zero points packed
alike along the blocks of a column. Blocks are powers of two from 16 on, and the last may stand over. `DequantizeLinear`
(opset 21) has int8 and int4, two codes a byte, with a scale for a block: embeddings and convolutions take that. With
one scale for a column or the matrix codes are multiplied by it.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from mpq.formats.integer import Integer
from mpq.hf.container import signed, unsigned
from mpq.hf.words import pack_rows, unpack_rows
from mpq.onnx.graph import CONTRIB, TYPES, Graph, Stored, Tensor
from mpq.types import QTensor, Scheme, WeightSpec

WIDTHS = (2, 4, 8)
FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def refusal(spec: WeightSpec, scheme: Scheme) -> str | None:
    """Why ONNX Runtime cannot have a weight under a scheme; None where it can."""
    if spec.index:
        return "it is a slice of a parameter"
    if not scheme.has_scale:
        return None
    if not isinstance(scheme.format, Integer) or scheme.blocks is not None or scheme.format.bits not in WIDTHS:
        return "it takes int2, int4 and int8"
    if np.dtype(scheme.scale_dtype).itemsize == 1:
        return "its scales are float16, bfloat16 or float32"
    if not is_matmul(spec, scheme):
        if scheme.format.bits == 2:
            return "it has 2 bits in matmuls with groups of 16, 32, 64, 128 or 256 only"
        if scheme.group_size and spec.k % scheme.group_size:
            return f"it takes whole groups here, and the weight has {spec.k} rows"
    return None


def is_matmul(spec: WeightSpec, scheme: Scheme) -> bool:
    """Whether `MatMulNBits` has the weight under the scheme."""
    plain = spec.kind == "matmul" and spec.batch == 1 and not spec.factors and len(spec.shape) == 2 and not spec.index
    return plain and scheme.has_scale and scheme.group_size in (16, 32, 64, 128, 256)


def matmul(graph: Graph, spec: WeightSpec, qtensor: QTensor, x: Tensor) -> str:
    """`x[..., k] @ w[k, n]`."""
    scheme, bits = qtensor.scheme, qtensor.scheme.format.bits
    block, groups = scheme.group_size or 0, scheme.num_groups(spec.k)
    shape = (spec.n, groups, block * bits // 8)

    def codes() -> bytes:
        padded = np.zeros((spec.n, groups * block), np.uint8)
        padded[:, : spec.k] = unsigned(qtensor.qvalue, bits).T
        return pack_rows(padded, bits).view(np.uint8)[:, : groups * block * bits // 8].tobytes()

    inputs = [x.name, _store(graph, spec, "qvalue", "uint8", shape, int(np.prod(shape)), codes)]
    inputs.append(_scale(graph, spec, qtensor, (spec.n, groups), lambda scale: scale[0].T))
    if qtensor.zero_point is not None:
        width = -(-groups * bits // 8)

        def zeros() -> bytes:
            return pack_rows(unsigned(qtensor.zero_point, bits).T, bits).view(np.uint8)[:, :width].tobytes()

        inputs.append(_store(graph, spec, "zero_point", "uint8", (spec.n, width), spec.n * width, zeros))
    sizes = {"K": spec.k, "N": spec.n, "bits": bits, "block_size": block}
    return graph.one("MatMulNBits", *inputs, domain=CONTRIB, **sizes)


def dequantized(graph: Graph, spec: WeightSpec, qtensor: QTensor) -> str:
    """The weight as an array of its parameter's shape."""
    scheme, matrix = qtensor.scheme, _matrix(spec)
    if not scheme.has_scale:
        dtype = FLOATS[scheme.format.name]
        nbytes = spec.size * np.dtype(np.asarray(qtensor.qvalue).dtype).itemsize
        name = _store(graph, spec, "qvalue", dtype, matrix, nbytes, lambda: np.asarray(qtensor.qvalue).tobytes())
        return _placed(graph, spec, name if dtype == "float32" else graph.one("Cast", name, to=1))
    codes, scale, zero = _parts(graph, spec, qtensor)
    if scheme.group_size is not None:
        inputs = [codes, scale] if zero is None else [codes, scale, zero]
        values = graph.one("DequantizeLinear", *inputs, axis=len(matrix) - 2, block_size=scheme.group_size)
        return _placed(graph, spec, values)
    # ONNX Runtime makes of DequantizeLinear with a scale a column and MatMul one operation that rounds the inputs too.
    value = graph.one("Cast", codes, to=1)
    value = value if zero is None else graph.one("Sub", value, graph.one("Cast", zero, to=1))
    return _placed(graph, spec, graph.one("Mul", value, scale))


def offset_codes(graph: Graph, spec: WeightSpec, qtensor: QTensor, *, placed: bool = False) -> str:
    """Codes plus 128, `uint8`, as `[k, n]` or in the shape of the parameter; ONNX Runtime computes them as it loads."""
    codes = _offset(graph, _parts(graph, spec, qtensor)[0])
    return _placed(graph, spec, codes) if placed else codes


def column_parts(graph: Graph, spec: WeightSpec, qtensor: QTensor, shape: tuple[int, ...]) -> tuple[str, str | None]:
    """Scales in float32 and zero points plus 128, of columns or of the matrix, in this shape; matrices go first."""
    _, scale, zero = _parts(graph, spec, qtensor)
    reshaped = lambda name: graph.one("Reshape", name, graph.shape(shape))
    return reshaped(scale), None if zero is None else reshaped(_offset(graph, zero))


def _offset(graph: Graph, codes: str) -> str:
    wide = graph.one("Cast", codes, to=TYPES["int32"])
    return graph.one("Cast", graph.one("Add", wide, graph.constant(128, np.int32)), to=TYPES["uint8"])


def _matrix(spec: WeightSpec) -> tuple[int, ...]:
    return (*((spec.batch,) if spec.batch > 1 else ()), spec.k, spec.n)


def _placed(graph: Graph, spec: WeightSpec, values: str) -> str:
    """A matrix in the shape of the parameter."""
    matrix = _matrix(spec)
    permuted = tuple((spec.factors or spec.shape)[axis] for axis in spec.permutation)
    if permuted != matrix:
        values = graph.one("Reshape", values, graph.shape(permuted))
    if spec.permutation != tuple(range(len(permuted))):
        values = graph.one("Transpose", values, perm=[int(axis) for axis in np.argsort(spec.permutation)])
    return graph.one("Reshape", values, graph.shape(spec.shape)) if spec.factors else values


def _parts(graph: Graph, spec: WeightSpec, qtensor: QTensor) -> tuple[str, str, str | None]:
    """Codes `[k, n]`, scales in float32 and zero points, as they are stored outside `MatMulNBits`."""
    scheme, bits = qtensor.scheme, qtensor.scheme.format.bits
    dtype, size = f"int{bits}", -(-spec.size * bits // 8)
    stored = lambda codes: np.asarray(codes).tobytes() if bits == 8 else nibbles(np.asarray(codes))
    codes = _store(graph, spec, "qvalue", dtype, _matrix(spec), size, lambda: stored(qtensor.qvalue))
    shape = ((spec.batch,) if spec.batch > 1 else ()) + scheme.scale_shape(spec.k, spec.n)
    scale, zero = _scale(graph, spec, qtensor, shape, lambda scale: scale.reshape(shape)), None
    if qtensor.zero_point is not None:
        nbytes = -(-int(np.prod(shape)) * bits // 8)
        zero = _store(graph, spec, "zero_point", dtype, shape, nbytes, lambda: stored(qtensor.zero_point))
    return codes, scale, zero


def read_codes(arrays: Mapping[str, np.ndarray], scheme: Scheme, k: int, n: int, batch: int) -> QTensor:
    """The quantized weight `[batch, k, n]` back from what is stored of it.

    Args:
      arrays: `qvalue`, `scale` and `zero_point` as they are stored; codes of 4 bits outside `MatMulNBits` unpacked.
      scheme: its scheme.
      k: rows.
      n: columns.
      batch: matrices.
    """
    values, bits = arrays["qvalue"], scheme.format.bits
    if not scheme.has_scale:
        return QTensor(jnp.asarray(values.reshape(batch, k, n)), None, None, scheme)
    groups, zero = scheme.scale_shape(k, n), arrays.get("zero_point")
    if values.dtype == np.uint8:
        rows = lambda packed, count: signed(unpack_rows(_words(packed.reshape(n, -1)), count, bits).T, bits)
        codes, scale = rows(values, k), arrays["scale"].T
        zero = None if zero is None else rows(zero, groups[0])
    else:
        codes, scale = values.astype(np.int8), arrays["scale"]
        zero = None if zero is None else zero.astype(np.int8).reshape(batch, *groups)
    where = None if zero is None else jnp.asarray(zero)
    return QTensor(jnp.asarray(codes.reshape(batch, k, n)), jnp.asarray(scale.reshape(batch, *groups)), where, scheme)


def _words(rows: np.ndarray) -> np.ndarray:
    """Bytes of rows as words, filled up with zeros."""
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).view("<i4")


def nibbles(codes: np.ndarray) -> bytes:
    """Signed codes of 4 bits in C order, two a byte, the first in the low bits."""
    flat = codes.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return (flat[::2] | (flat[1::2] << 4)).tobytes()


def _scale(
    graph: Graph, spec: WeightSpec, qtensor: QTensor, shape: tuple[int, ...], view: Callable[[np.ndarray], np.ndarray]
) -> str:
    """Scales in float32, stored as they are."""
    dtype = qtensor.scheme.scale_dtype
    nbytes = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
    make = lambda: np.ascontiguousarray(view(np.asarray(qtensor.scale))).tobytes()
    name = _store(graph, spec, "scale", dtype, shape, nbytes, make)
    return name if dtype == "float32" else graph.one("Cast", name, to=1)


def _store(
    graph: Graph,
    spec: WeightSpec,
    part: str,
    dtype: str,
    shape: tuple[int, ...],
    nbytes: int,
    make: Callable[[], bytes],
) -> str:
    return graph.store(f"{spec.path}.{part}", Stored(dtype, shape, nbytes, make))
