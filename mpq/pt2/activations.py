"""Rounded activations in a graph of PyTorch, by the formulas of `mpq.activations.scheme`.

A static range is a pair of `quantize_per_tensor` and `dequantize_per_tensor` before the product, uint8, and the weight
of such a product is dequantized by channel: the form in which PT2E leaves a quantized model, which Inductor replaces by
products of integers where `torch._inductor.config.freezing` is set. Run as it is, it multiplies floats. These operators
are registered by `import torch.ao.quantization.fx._decomposed`, or by torchao's `quantization.pt2e`.

Ranges that are made of the values themselves are rounded by operators of ATen and scaled back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import ActivationSpec
from mpq.activations.scheme import SCALE_DTYPE, ActivationScheme
from mpq.export.graphs import PlannedRows, require_windows_first
from mpq.pt2.graph import Graph

MIDDLE = 128
"""Zero point of symmetric codes as uint8."""


def refusal(row: ActivationSpec, scheme: ActivationScheme) -> str | None:
    """Why a program cannot round a row so; None where it can."""
    if scheme.threshold:
        return f"the program keeps no features in floating point; {scheme.of_tokens} rounds them all"
    if scheme.minifloat or scheme.group_size:
        lacks = "rounds to no FP8" if scheme.minifloat else "has one scale before each sum, none for groups of features"
        return f"the program {lacks}; use int{scheme.bits}_token"
    return "the program keeps no KV cache" if row.kind == "kv" else None


class Activations(PlannedRows):
    """How they are rounded."""

    _graph: Graph

    def rounded(self, row: RoundedActivation, x: Any, shape: Sequence[Any], axes: Sequence[int]) -> Any:
        """`x` rounded and scaled back.

        Args:
          row: how.
          x: the value.
          shape: of it.
          axes: of its features.
        """
        key = row.spec.path, x, tuple(axes)
        if key not in self._made:
            value = self._smoothed(row, x, shape, axes)
            make: Callable[..., Any] = self._dynamic if row.limits is None else self._static
            self._made[key] = make(row, value, shape, axes)
        return self._made[key]

    def _static(self, row: RoundedActivation, value: Any, shape: Sequence[Any], axes: Sequence[int]) -> Any:
        torch, scheme, (scale, zero) = self._graph.torch, row.scheme, row.step
        middle = zero if scheme.asymmetric else MIDDLE
        how = scale, middle, 0 if scheme.asymmetric else MIDDLE - scheme.top, scheme.top + middle - zero
        pair, dtype = torch.ops.quantized_decomposed, torch.uint8
        codes = self._graph.one(pair.quantize_per_tensor.default, value, *how, dtype)
        return self._graph.one(pair.dequantize_per_tensor.default, codes, *how, dtype)

    def _dynamic(self, row: RoundedActivation, value: Any, shape: Sequence[Any], axes: Sequence[int]) -> Any:
        graph, torch, scheme = self._graph, self._graph.torch, row.scheme
        if scheme.granularity == "tensor":
            require_windows_first(row, shape, self._batch, "pt2")
            axes = range(1, len(shape))
        over: dict[str, Any] = {"dim": sorted(axes), "keepdim": True}
        divided = lambda a, b: graph.one(torch.round, graph.one(torch.div, a, b))
        if not scheme.asymmetric:
            scale = self._half(graph.one(torch.amax, graph.one(torch.abs, value), **over), scheme.top)
            codes = graph.one(torch.clamp, divided(value, scale), -scheme.top, scheme.top)
            return graph.one(torch.mul, codes, scale)
        low = graph.one(torch.clamp, graph.one(torch.amin, value, **over), max=0)
        high = graph.one(torch.clamp, graph.one(torch.amax, value, **over), min=0)
        scale = self._half(graph.one(torch.sub, high, low), scheme.top)
        zero = divided(graph.one(torch.neg, low), scale)
        codes = graph.one(torch.clamp, graph.one(torch.add, divided(value, scale), zero), 0, scheme.top)
        return graph.one(torch.mul, graph.one(torch.sub, codes, zero), scale)

    def _half(self, span: Any, top: int) -> Any:
        """`span / top` in half precision, as `mpq.quantize.rounding.round_scale` has it."""
        graph, info = self._graph, jnp.finfo(SCALE_DTYPE)
        scale = graph.one(graph.torch.div, span, float(top))
        scale = graph.one(graph.torch.clamp, scale, float(info.smallest_subnormal), float(info.max))
        return graph.cast(graph.cast(scale, SCALE_DTYPE), "float32")

    def _smoothed(self, row: RoundedActivation, x: Any, shape: Sequence[Any], axes: Sequence[int]) -> Any:
        if row.smooth is None:
            return x
        factors = np.array(row.smooth, np.float32)
        factors = factors.reshape([int(size) if axis in axes else 1 for axis, size in enumerate(shape)])
        return self._graph.one(self._graph.torch.div, x, self._graph.constant(factors))
