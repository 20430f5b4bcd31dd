"""Number formats, and the text form of schemes.

`FORMATS` is the table of every element grid; `parse_scheme` reads `int4_g128`, `int3_g32_zp`, `int8_channel`,
`nf4_g64`, `bf16`.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from mpq.formats.codebook import NF3_LEVELS, NF4_LEVELS, Codebook
from mpq.formats.floating import Float
from mpq.formats.integer import Integer
from mpq.formats.minifloat import Minifloat
from mpq.types import MpqError, NumberFormat, Scheme

FORMATS: Mapping[str, NumberFormat] = MappingProxyType(
    {
        "int2": Integer(2),
        "int3": Integer(3),
        "int4": Integer(4),
        "int5": Integer(5),
        "int6": Integer(6),
        "int7": Integer(7),
        "int8": Integer(8),
        "nf3": Codebook("nf3", NF3_LEVELS),
        "nf4": Codebook("nf4", NF4_LEVELS),
        "fp4": Minifloat("fp4", 2, 1, max_qvalue=7),
        "fp8_e4m3": Minifloat("fp8_e4m3", 4, 3, max_qvalue=126),
        "fp8_e5m2": Minifloat("fp8_e5m2", 5, 2, max_qvalue=123),
        "bf16": Float("bf16", "bfloat16"),
        "fp16": Float("fp16", "float16"),
        "fp32": Float("fp32", "float32"),
    }
)

_TEXT = re.compile(
    r"(?P<format>[a-z]+\d+(_e\dm\d)?)(_(?P<granularity>channel|g[1-9]\d*))?(?P<zp>_zp)?(_s(?P<scale>float16|float32))?"
)


def parse_scheme(text: str) -> Scheme:
    """The scheme that `text` names; `str()` of the result gives `text` back.

    Raises:
      MpqError: the text is not of the form FORMAT[_gN|_channel][_zp][_sDTYPE], or the parts do not go together.
    """
    allowed = f"a format of {', '.join(FORMATS)} with _gN or _channel, and _zp for affine: int4_g64, int8_channel, bf16"
    match = _TEXT.fullmatch(text)
    number_format = FORMATS.get(match["format"]) if match else None
    if match is None or number_format is None:
        raise MpqError(f"unknown scheme {text!r}: allowed is {allowed}")
    granularity, zero_point, scale = match["granularity"], bool(match["zp"]), match["scale"]
    if number_format.max_magnitude is None:
        if granularity or zero_point or scale:
            raise MpqError(f"scheme {text!r} is wrong: {number_format.name} has no scale; write {number_format.name!r}")
        return Scheme(number_format)
    if granularity is None:
        raise MpqError(f"scheme {text!r} lacks a granularity: write {text}_g64 or {text}_channel")
    if zero_point and not number_format.uniform:
        raise MpqError(
            f"scheme {text!r} is wrong: a zero point goes with integer formats only, not {number_format.name}"
        )
    group_size = None if granularity == "channel" else int(granularity[1:])
    return Scheme(number_format, group_size, zero_point, scale or "float16")
