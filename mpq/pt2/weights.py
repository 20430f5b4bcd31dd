"""Quantized weights in a graph of PyTorch: what is stored of them, and how it is made floats or integers of.

A weight lies in the file as in the Orbax folder (`mpq.export.parts`), in as many bytes as the plan says: bit streams of
codes, scales in their dtype, zero points. Codes of 8 bits are int8 tensors `[batch, k, n]`. Operators of ATen, shifts
and products, unpack and scale them where the weight is read; no other kernels are needed.
"""

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.export.parts import from_parts, to_parts
from mpq.formats.floating import Float
from mpq.formats.integer import Integer
from mpq.formats.trellis import STATE_BITS, Trellis, levels
from mpq.pt2.graph import Graph
from mpq.pt2.ops import permuted
from mpq.types import QTensor, Scheme, WeightSpec


def refusal(spec: WeightSpec, scheme: Scheme) -> str | None:
    """Why a program cannot have a weight under a scheme; None where it can."""
    if spec.index:
        return "it is a slice of a parameter"
    return "blocks of ggml are for gguf" if scheme.blocks is not None else None


def has_integers(spec: WeightSpec, scheme: Scheme, kind: str) -> bool:
    """Whether the weight is a tensor of integers with a scale for a channel, as `matmul` or `conv` multiply them."""
    whole = scheme.has_scale and isinstance(scheme.format, Integer) and scheme.group_size is None
    return whole and np.dtype(scheme.scale_dtype).itemsize > 1 and (kind == "conv" or spec.batch == 1)


class Weights:
    """The quantized weights of one graph, each stored once."""

    def __init__(self, graph: Graph, qtensors: Mapping[str, QTensor]) -> None:
        """Prepare.

        Args:
          graph: to add to.
          qtensors: weight path -> quantized weight.
        """
        self._graph, self._qtensors = graph, qtensors
        self._stored: dict[str, dict[str, Any]] = {}
        self._made: dict[tuple[str, ...], Any] = {}

    def dequantized(self, spec: WeightSpec) -> Any:
        """The weight as an array of its parameter's shape, `float32`."""
        return self._once(("floats", spec.path), lambda: self._dequantized(spec))

    def integers(self, spec: WeightSpec, order: tuple[int, ...]) -> Any:
        """The weight, its axes in an order that begins with that of the channels: integers, and dequantized by channel.

        `dequantize_per_channel` and its like are what PT2E makes of a quantized model, and what others read as such.
        """
        return self._once(("integers", spec.path, str(order)), lambda: self._integers(spec, order))

    def _once(self, key: tuple[str, ...], make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _dequantized(self, spec: WeightSpec) -> Any:
        graph, q = self._graph, self._qtensors[spec.path]
        scheme, parts = q.scheme, self._parts(spec)
        if not scheme.has_scale:
            return self._placed(spec, graph.cast(parts["qvalue"], "float32"))
        groups = scheme.scale_shape(spec.k, spec.n)
        value, scale = self._decoded(spec, "qvalue", (spec.k, spec.n)), graph.cast(parts["scale"], "float32")
        if "tensor_scale" in parts:
            scale = graph.one(operator.mul, scale, parts["tensor_scale"])
        if scheme.zero_point:
            value = graph.one(operator.sub, value, self._spread(spec, self._decoded(spec, "zero_point", groups)))
        return self._placed(spec, graph.one(operator.mul, value, self._spread(spec, scale)))

    def _integers(self, spec: WeightSpec, order: tuple[int, ...]) -> Any:
        graph, q = self._graph, self._qtensors[spec.path]
        torch, scheme, parts = graph.torch, q.scheme, self._parts(spec)
        codes = self._codes(spec, "qvalue", (spec.k, spec.n), "int8")
        # Inductor of PyTorch 2.13 packs a transposed constant for its integer products as if it were none.
        codes = graph.one(torch.Tensor.contiguous, permuted(graph, self._placed(spec, codes), order))
        columns = scheme.scale_shape(spec.k, spec.n)[1]

        def flat(value: Any) -> Any:
            if columns != spec.n:
                value = graph.one(torch.broadcast_to, value, (spec.batch, 1, spec.n))
            return graph.one(torch.reshape, value, (spec.batch * spec.n,))

        if scheme.zero_point:
            zero = flat(self._codes(spec, "zero_point", (1, columns), "int64"))
        else:
            zero = graph.one(torch.zeros, (spec.batch * spec.n,), dtype=torch.int64)
        scale, grid = flat(graph.cast(parts["scale"], "float32")), scheme.format
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        return graph.one(dequantize, codes, scale, zero, 0, grid.min_qvalue, grid.max_qvalue, torch.int8)

    def _parts(self, spec: WeightSpec) -> dict[str, Any]:
        """Nodes of what is stored."""
        if spec.path not in self._stored:
            arrays = stored(self._qtensors[spec.path])
            self._stored[spec.path] = {p: self._graph.store(f"{spec.path}.{p}", array) for p, array in arrays.items()}
        return self._stored[spec.path]

    def _codes(self, spec: WeightSpec, part: str, shape: tuple[int, int], dtype: str, least: int | None = None) -> Any:
        """Codes `[batch, *shape]`, the smallest of them `least`; None: that of the format."""
        graph, grid, node = self._graph, self._qtensors[spec.path].scheme.format, self._parts(spec)[part]
        torch, bits, least = graph.torch, grid.bits, grid.min_qvalue if least is None else least
        if part == "qvalue" and is_int8(grid):
            return node if dtype == "int8" else graph.cast(node, dtype)
        bytes_, each = bits // math.gcd(bits, 8), 8 // math.gcd(bits, 8)  # so many bytes are so many whole codes
        count = math.prod(shape)
        if short := -(-(count * bits) // 8) % bytes_:
            node = graph.one(torch.nn.functional.pad, node, [0, bytes_ - short])
        word = graph.cast(graph.one(torch.reshape, node, (spec.batch, -1, bytes_)), "int32")
        first = np.arange(each) * bits // 8
        if bytes_ > 1:
            second = graph.one(torch.index_select, word, 2, graph.constant(np.minimum(first + 1, bytes_ - 1), np.int64))
            word = graph.one(torch.index_select, word, 2, graph.constant(first, np.int64))
            word = graph.one(operator.add, word, graph.one(operator.mul, second, 256))
        if bits < 8:
            shifts = graph.constant(np.arange(each) * bits % 8, np.int32)
            word = graph.one(torch.bitwise_and, graph.one(torch.bitwise_right_shift, word, shifts), 2**bits - 1)
        flat = graph.one(torch.reshape, word, (spec.batch, -1))
        if count % each:
            flat = graph.one(operator.getitem, flat, (slice(None), slice(0, count)))
        codes = graph.one(torch.reshape, flat, (spec.batch, *shape))
        codes = graph.one(operator.add, codes, least) if least else codes
        return codes if dtype == "int32" else graph.cast(codes, dtype)

    def _decoded(self, spec: WeightSpec, part: str, shape: tuple[int, int]) -> Any:
        """Values of codes, `float32[batch, *shape]`."""
        graph, grid = self._graph, self._qtensors[spec.path].scheme.format
        if isinstance(grid, Integer):
            return self._codes(spec, part, shape, "float32")
        if grid.learned:
            return self._looked_up(spec, shape)
        if isinstance(grid, Trellis):
            return self._along_trellis(grid, self._codes(spec, part, shape, "int32", 0), (spec.batch, *shape))
        every = jnp.arange(grid.min_qvalue, grid.max_qvalue + 1, dtype=jnp.int8)
        levels = graph.constant(np.asarray(grid.decode(every)), np.float32)
        return graph.one(operator.getitem, levels, self._codes(spec, part, shape, "int32", 0))

    def _along_trellis(self, grid: Trellis, codes: Any, shape: tuple[int, int, int]) -> Any:
        """Values of codes `int32[batch, k, n]`: `Trellis.decode`, operation by operation."""
        graph, torch, (*rows, n) = self._graph, self._graph.torch, shape
        length, factors = min(n, grid.span), grid.factors
        spans = -(-n // length)
        if short := spans * length - n:
            codes = graph.one(torch.nn.functional.pad, codes, [0, short])
        codes = graph.one(torch.reshape, codes, (*rows, spans, length))
        codes = graph.one(torch.nn.functional.pad, codes, [len(factors) - 1, 0], "constant", grid.choice.start)
        taps = []
        for ago, factor in enumerate(factors):
            first = len(factors) - 1 - ago
            tap = graph.one(operator.getitem, codes, (Ellipsis, slice(first, first + length)))
            taps.append(graph.one(operator.mul, tap, factor))
        rank = functools.reduce(lambda total, tap: graph.one(operator.add, total, tap), taps)
        rank = graph.one(torch.bitwise_and, rank, (1 << STATE_BITS) - 1)
        value = graph.one(operator.getitem, graph.constant(levels(grid.choice.gain), np.float32), rank)
        value = graph.one(torch.reshape, value, (*rows, spans * length))
        return graph.one(operator.getitem, value, (Ellipsis, slice(0, n))) if short else value

    def _looked_up(self, spec: WeightSpec, shape: tuple[int, int]) -> Any:
        """Values of codes in the table of each matrix, `float32[batch, *shape]`."""
        graph = self._graph
        codes = graph.one(graph.torch.reshape, self._codes(spec, "qvalue", shape, "int64", 0), (spec.batch, -1))
        levels = graph.cast(self._parts(spec)["codebook"], "float32")
        levels = graph.one(graph.torch.reshape, levels, (spec.batch, -1))
        return graph.one(graph.torch.reshape, graph.one(graph.torch.gather, levels, 1, codes), (spec.batch, *shape))

    def _spread(self, spec: WeightSpec, value: Any) -> Any:
        """One number a group to one a row, as far as they differ."""
        graph, size = self._graph, self._qtensors[spec.path].scheme.group_size
        if size is None:
            return value
        rows = graph.one(graph.torch.repeat_interleave, value, size, dim=1)
        return graph.one(operator.getitem, rows, (slice(None), slice(0, spec.k))) if spec.k % size else rows

    def _placed(self, spec: WeightSpec, matrix: Any) -> Any:
        """`[batch, k, n]` in the shape of the parameter."""
        torch = self._graph.torch
        shape = tuple((spec.factors or spec.shape)[axis] for axis in spec.permutation)
        value = self._graph.one(torch.reshape, matrix, shape)
        value = permuted(self._graph, value, np.argsort(spec.permutation))
        return self._graph.one(torch.reshape, value, spec.shape) if spec.factors else value


def is_int8(grid: Any) -> bool:
    """Whether codes are a tensor of int8, and no bit stream."""
    return isinstance(grid, Integer) and grid.bits == 8


def stored(qtensor: QTensor) -> dict[str, np.ndarray]:
    """The arrays of a weight in the file."""
    parts = to_parts(qtensor)
    if is_int8(qtensor.scheme.format):
        parts["qvalue"] = np.asarray(qtensor.qvalue)
    if "scale" in parts and parts["scale"].dtype == np.uint8:
        parts["scale"] = parts["scale"].view(qtensor.scheme.scale_dtype)
    return parts


def read_codes(arrays: Mapping[str, np.ndarray], scheme: Scheme, k: int, n: int, batch: int) -> QTensor:
    """The quantized weight `[batch, k, n]` back from what `stored` gave.

    Args:
      arrays: their bytes, `uint8`, by name.
      scheme: its scheme.
      k: rows.
      n: columns.
      batch: matrices.
    """
    groups = scheme.scale_shape(k, n)
    how = {"scale": (scheme.scale_dtype, (batch, *groups)), "tensor_scale": ("float32", (batch, 1, 1))}
    how["codebook"] = "float16", (batch, 1 << scheme.format.bits, 1)
    how |= {"qvalue": ("uint8", (batch, -1)), "zero_point": ("uint8", (batch, -1))}
    if isinstance(scheme.format, Float):
        how["qvalue"] = scheme.format.dtype, (batch, k, n)

    def part(name: str) -> np.ndarray:
        dtype, shape = how[name]
        array = arrays[name].view(jnp.dtype(dtype)).reshape(shape)
        return array ^ 128 if name == "qvalue" and is_int8(scheme.format) else array  # as a stream has them

    return from_parts(part, scheme, k, n, batch)
