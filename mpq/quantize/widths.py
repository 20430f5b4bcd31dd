"""Integers of all widths share their compilations: to a compiled function the width is an argument.

A search for the best bits quantizes every weight to int2, int3, int4 ..., which differ in where codes are clipped and
in nothing that a compiler must know. So a function is compiled for a scheme's `common` form, which stands for all
widths, and gets the width beside it. What it returns is under the common form too: a compiled function's result cannot
hold a width that it learns when it runs.
"""

import dataclasses
from typing import cast

import jax

from mpq.formats.integer import Integer
from mpq.quantize import block_scales
from mpq.types import Scheme

_COMMON = Integer(8)


def common(scheme: Scheme) -> tuple[Scheme, int | None]:
    """What to compile for, and the width to run it with; None: the scheme is its own common form.

    Scales that are powers of two depend on the width in a way that is worked out before compilation, and so do those of
    ggml's K-quants; its Q4_0, Q5_0 and Q8_0 are integers as any others.
    """
    own = scheme.scale_dtype == "float8_e8m0fnu" or block_scales.applies(scheme)
    if own or not isinstance(scheme.format, Integer):
        return scheme, None
    return dataclasses.replace(scheme, format=_COMMON, blocks=None), scheme.format.bits


def with_width(scheme: Scheme, width: jax.Array | None) -> Scheme:
    """Inside the compiled function: the scheme that `common` came from. It can be neither hashed nor printed."""
    return scheme if width is None else dataclasses.replace(scheme, format=Integer(cast(int, width)))
