"""Rounded activations in a graph, and the products that ONNX Runtime's CPU provider then has in integers.

What a plan rounds, `mpq.activations.scheme`, is computed here by the same formulas, by one of these:

    static    QuantizeLinear with one scale and zero point, uint8
    dynamic   the scale of every token, or of every image, from its largest magnitude; then QuantizeLinear at scale 1

Sums are of integers where the weight is of integers with one scale for a column or the matrix, and one scale of the
activation stands before a sum: a static range is a pair of QuantizeLinear and DequantizeLinear before MatMul, which
ONNX Runtime 1.32 fuses to `MatMulIntegerToFloat`; a dynamic one feeds MatMulInteger; convolutions are ConvInteger,
because its QLinearConv rounds the output too. Elsewhere the rounded values are scaled back and multiplied as floats.

Both operands are uint8, their codes less than the zero point 128 by what they are: the kernels of unsigned by signed
codes for x86 without VNNI add pairs of products in 16 bits, which saturate (255 * 127 * 2 > 2^15), and the optimizer
makes such ones of signed codes in QDQ pairs. Those of unsigned by unsigned codes are exact on all processors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import ActivationSpec
from mpq.activations.scheme import SCALE_DTYPE, ActivationScheme
from mpq.export.graphs import PlannedRows, require_windows_first
from mpq.formats.integer import Integer
from mpq.onnx.graph import TYPES, Graph, Stored, Tensor
from mpq.onnx.weights import column_parts, offset_codes
from mpq.types import QTensor, WeightSpec

MIDDLE = 128
"""Zero point of symmetric codes as uint8."""


class Codes(NamedTuple):
    """A rounded value: names of `uint8` codes, of their scale and of the code that is 0."""

    codes: str
    scale: str
    zero: str


def refusal(row: ActivationSpec, scheme: ActivationScheme) -> str | None:
    """Why ONNX Runtime cannot round a row so; None where it can."""
    if scheme.threshold:
        return f"the graph keeps no features in floating point; {scheme.of_tokens} rounds them all"
    if scheme.minifloat or scheme.group_size:
        lacks = "no products of FP8" if scheme.minifloat else "one scale before each sum, none for groups of features"
        return f"its CPU provider has {lacks}; use int{scheme.bits}_token"
    return "the graph keeps no KV cache" if row.kind == "kv" else None


def is_integer(row: RoundedActivation, spec: WeightSpec, qtensor: QTensor, kind: str) -> bool:
    """Whether a product of the row with the weight is one of integers.

    Args:
      row: the activation.
      spec: the weight.
      qtensor: its codes.
      kind: `matmul` or `conv`.
    """
    scheme, of = qtensor.scheme, row.scheme
    plain = scheme.has_scale and isinstance(scheme.format, Integer) and scheme.blocks is None
    if not plain or scheme.group_size is not None or (of.asymmetric and of.static is None):
        return False
    if kind == "conv":  # positions with a scale each are added up; zero points by channel are not implemented
        return of.granularity == "tensor" and qtensor.zero_point is None
    return spec.batch == 1


class Activations(PlannedRows):
    """How they are rounded."""

    _graph: Graph

    def rounded(self, row: RoundedActivation, x: Tensor, axes: Sequence[int]) -> str:
        """`x` rounded and scaled back; `axes` are those of its features."""
        graph, scheme = self._graph, row.scheme

        def make() -> str:
            if scheme.static is not None:
                return graph.one("DequantizeLinear", *self.codes(row, x, axes))
            value = self._smoothed(row, x, axes)
            if not scheme.asymmetric:
                scale = self._scale(row, x, value, axes)
                codes = graph.one("Round", graph.one("Div", value, scale))
                return graph.one("Mul", self._clip(codes, -scheme.top, scheme.top), scale)
            low, high = (self._reduce(kind, row, x, value, axes) for kind in ("ReduceMin", "ReduceMax"))
            nothing = graph.constant(0, np.float32)
            low, high = graph.one("Min", low, nothing), graph.one("Max", high, nothing)
            scale = self._half(graph.one("Sub", high, low), scheme.top)
            zero = graph.one("Round", graph.one("Div", graph.one("Neg", low), scale))
            codes = graph.one("Add", graph.one("Round", graph.one("Div", value, scale)), zero)
            return graph.one("Mul", graph.one("Sub", self._clip(codes, 0, scheme.top), zero), scale)

        return self._once("rounded", row, x, make)

    def codes(self, row: RoundedActivation, x: Tensor, axes: Sequence[int]) -> Codes:
        """Codes of `x`, its scale a scalar or of the shape of `x` with 1 at every axis that shares it."""
        graph, scheme = self._graph, row.scheme

        def make() -> Codes:
            value = self._smoothed(row, x, axes)
            if row.limits is None:
                scale, zero = self._scale(row, x, value, axes), self._code(MIDDLE)
                value = graph.one("Div", value, scale)
                if scheme.bits < 8:  # at 8 bits no value is beyond the largest code: the scale is made of that value
                    value = self._clip(value, -scheme.top, scheme.top)
                return Codes(graph.one("QuantizeLinear", value, graph.constant(1, np.float32), zero), scale, zero)
            step, zero = row.step
            zero = zero if scheme.asymmetric else MIDDLE
            # QuantizeLinear itself has 0 to 255 for limits; a symmetric range stops at -127, which is code 1.
            least, most = (0, scheme.top) if scheme.asymmetric else (MIDDLE - scheme.top, MIDDLE + scheme.top)
            if (least, most) != (0, 255):
                value = self._clip(value, (least - zero) * step, (most - zero) * step if most < 255 else None)
            scale, zero = graph.constant(step, np.float32), self._code(zero)
            return Codes(graph.one("QuantizeLinear", value, scale, zero), scale, zero)

        return self._once("codes", row, x, make)

    def matmul(self, row: RoundedActivation, x: Tensor, spec: WeightSpec, qtensor: QTensor) -> str:
        """`x[..., k] @ w[k, n]`, of integers."""
        graph, axes = self._graph, (len(x.shape) - 1,)
        codes, w = self.codes(row, x, axes), offset_codes(graph, spec, qtensor)
        scale, zeros = column_parts(graph, spec, qtensor, (-1,))
        if row.limits is None:
            zeros = self._code(MIDDLE) if zeros is None else zeros
            sums = graph.one("Cast", graph.one("MatMulInteger", codes.codes, w, codes.zero, zeros), to=TYPES["float32"])
            # Not by the product of both scales: ONNX Runtime 1.32 makes one operation of that and of a bias behind it,
            # which multiplies the bias by the scales of the tokens too.
            return graph.one("Mul", graph.one("Mul", sums, codes.scale), scale)
        if zeros is None:
            zeros = graph.one("Expand", self._code(MIDDLE), graph.shape([1 if qtensor.scheme.per_tensor else spec.n]))
        left = graph.one("DequantizeLinear", *codes)
        return graph.one("MatMul", left, graph.one("DequantizeLinear", w, scale, zeros, axis=1))

    def conv(
        self,
        row: RoundedActivation,
        x: Tensor,
        features: int,
        spec: WeightSpec,
        qtensor: QTensor,
        convolve: Callable[..., str],
    ) -> str:
        """A convolution of integers.

        Args:
          row: the activation.
          x: its value.
          features: its axis of channels.
          spec: the kernel.
          qtensor: its codes.
          convolve: `mpq.onnx.ops.convolution` of the equation: kind, inputs, zero points, and what is done to the
            result, `[batch, channels, ...]`.
        """
        graph, spatial = self._graph, len(x.shape) - 2
        codes, w = self.codes(row, x, (features,)), offset_codes(graph, spec, qtensor, placed=True)
        scale, _ = column_parts(graph, spec, qtensor, (-1, *[1] * spatial))

        def scaled(sums: str) -> str:
            return graph.one("Mul", graph.one("Cast", sums, to=TYPES["float32"]), graph.one("Mul", codes.scale, scale))

        return convolve("ConvInteger", [codes.codes, w], [codes.zero, self._code(MIDDLE)], scaled)

    def _once(self, form: str, row: RoundedActivation, x: Tensor, make: Callable[[], Any]) -> Any:
        key = form, row.spec.path, x.name
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _smoothed(self, row: RoundedActivation, x: Tensor, axes: Sequence[int]) -> str:
        if row.smooth is None:
            return x.name
        factors = np.array(row.smooth, np.float32)
        shape = [int(size) if axis in axes else 1 for axis, size in enumerate(x.shape)]
        name = self._graph.store(
            f"{row.spec.path}.smooth", Stored("float32", tuple(shape), factors.nbytes, factors.tobytes)
        )
        return self._graph.one("Div", x.name, name)

    def _scale(self, row: RoundedActivation, x: Tensor, value: str, axes: Sequence[int]) -> str:
        """Of a dynamic symmetric range."""
        largest = self._reduce("ReduceMax", row, x, self._graph.one("Abs", value), axes)
        return self._half(largest, row.scheme.top)

    def _half(self, span: str, top: int) -> str:
        """`span / top` in half precision, as `mpq.quantize.rounding.round_scale` has it."""
        graph, info = self._graph, jnp.finfo(SCALE_DTYPE)
        scale = graph.one("Div", span, graph.constant(top, np.float32))
        scale = self._clip(scale, float(info.smallest_subnormal), float(info.max))
        return graph.one("Cast", graph.one("Cast", scale, to=TYPES[SCALE_DTYPE]), to=TYPES["float32"])

    def _reduce(self, kind: str, row: RoundedActivation, x: Tensor, value: str, axes: Sequence[int]) -> str:
        """Over what shares a scale; its axes stay, of size 1."""
        if row.scheme.granularity == "tensor":
            require_windows_first(row, x.shape, self._batch, "onnx")
            axes = range(1, len(x.shape))
        return self._graph.one(kind, value, self._graph.constant(sorted(axes), np.int64), keepdims=1)

    def _clip(self, value: str, low: float, high: float | None) -> str:
        graph = self._graph
        value = graph.one("Max", value, graph.constant(low, np.float32))
        return value if high is None else graph.one("Min", value, graph.constant(high, np.float32))

    def _code(self, code: int) -> str:
        return self._graph.constant(code, np.uint8)
