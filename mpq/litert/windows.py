"""Windows over images: padding as LiteRT has it, and pooling."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpq.export.jaxprs import shape_of
from mpq.litert.call import Call
from mpq.types import MpqError

SAME, VALID = 0, 1
"""Of `Padding`."""


def padded(call: Call, x: int, shape: Sequence[Any], pads: Sequence[tuple[int, int]], how: Any, value: Any) -> Any:
    """Input and `Padding` of a window over the middle axes of `[batch, height, width, channels]`.

    Args:
      call: the equation.
      x: its input.
      shape: of the input.
      pads: below and above, for height and width.
      how: size, stride and dilation of the window, for height and width.
      value: what is padded with; None: zero.
    """
    if all(pad == (0, 0) for pad in pads):
        return x, VALID
    reach = [(size - 1) * dilation + 1 for size, _, dilation in how]
    total = [max((-(-d // s) - 1) * s + r - d, 0) for d, (_, s, _), r in zip(shape[1:3], how, reach, strict=True)]
    if all(pad == (t // 2, t - t // 2) for pad, t in zip(pads, total, strict=True)):
        return x, SAME
    larger = [shape[0], *(d + low + high for d, (low, high) in zip(shape[1:3], pads, strict=True)), shape[3]]
    around = call.graph.constant([(0, 0), *pads, (0, 0)], np.int32)
    if value is None:
        return call.one("PAD", x, around, shape=larger), VALID
    return call.one("PADV2", x, around, call.graph.constant(value), shape=larger, options="PadV2Options"), VALID


def max_pool(call: Call) -> int:
    """Over the middle axes of `[batch, height, width, channels]`."""
    p, shape = call.eqn.params, shape_of(call.eqn.invars[0])
    window, strides, padding = (list(p[k]) for k in ("window_dimensions", "window_strides", "padding"))
    outer = [(window[i], strides[i], *padding[i]) for i in (0, len(window) - 1)]
    dilated = {*p["base_dilation"], *p["window_dilation"]} != {1}
    if len(window) != 4 or dilated or any(o != (1, 1, 0, 0) for o in outer):
        raise MpqError("a window over batch or channels has no form in LiteRT here")
    how = [(window[i], strides[i], 1) for i in (1, 2)]
    pads = [(int(padding[i][0]), int(padding[i][1])) for i in (1, 2)]
    x, padding = padded(call, call.full(0), shape, pads, how, np.float32(-np.inf))
    sizes = {"filterHeight": window[1], "filterWidth": window[2], "strideH": strides[1], "strideW": strides[2]}
    return call.one("MAX_POOL_2D", x, padding=padding, options="Pool2DOptions", **sizes)
