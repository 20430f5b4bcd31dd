"""Number formats, and the text form of schemes.

`FORMATS` is the table of every element grid, `TRELLISES` of what encodes columns together; `parse_scheme` reads
FORMAT[_gN|_channel|_tensor][_zp][_sDTYPE]:

    int4_g128         one float16 scale for 128 rows of a column
    int8_channel      one for a column, that is an output channel
    int8_tensor       one for the whole matrix
    int3_g32_zp       with a zero point of 3 bits beside each scale
    nf4_g64_sfp8      scales of 8 bits (e4m3) under one float32 for the whole matrix; so `nvfp4` is fp4_g16_sfp8
    tcq3_g64          codes of 3 bits along a trellis, see `mpq.formats.trellis`; tcq2 to tcq5
    lut3_g64          8 levels fitted to each matrix, under scales of groups; so lut2 and lut4
    fp4_g32_se8m0     scales that are powers of two, 8 bits; `mxfp4` is this one in whole blocks, as ggml has it
    int4_g64_sfloat32 scales of float32, or of bfloat16 with `_sbfloat16`
    bf16              no scale
    q4_k, q8_0        a block type of ggml, see `mpq.formats.ggml`; f16 and f32 are what ggml calls fp16 and fp32

Sizes are exact: `Scheme.size_bits` counts codes, scales, zero points, learned levels and what fills up the last byte.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from mpq.formats.codebook import NF3_LEVELS, NF4_LEVELS, Codebook
from mpq.formats.floating import Float
from mpq.formats.ggml import GGML_SCHEMES
from mpq.formats.integer import Integer
from mpq.formats.learned import Learned
from mpq.formats.minifloat import Minifloat
from mpq.formats.trellis import CHOICES, Trellis
from mpq.grids import NumberFormat
from mpq.types import SCALE_SUFFIXES, MpqError, Scheme

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
        "lut2": Learned(2),
        "lut3": Learned(3),
        "lut4": Learned(4),
        "fp4": Minifloat("fp4", 2, 1, max_qvalue=7),
        "fp8_e4m3": Minifloat("fp8_e4m3", 4, 3, max_qvalue=126),
        "fp8_e5m2": Minifloat("fp8_e5m2", 5, 2, max_qvalue=123),
        "bf16": Float("bf16", "bfloat16"),
        "fp16": Float("fp16", "float16"),
        "fp32": Float("fp32", "float32"),
    }
)

TRELLISES: Mapping[str, NumberFormat] = MappingProxyType({f"tcq{bits}": Trellis(bits) for bits in CHOICES})

ALIASES: Mapping[str, str] = MappingProxyType({"nvfp4": "fp4_g16_sfp8", "f16": "fp16", "f32": "fp32"})
"""Names that `parse_scheme` also takes -> the text that `str()` gives. NVFP4 is that of NVIDIA's Blackwell: e4m3 scales
of 16 values under one float32."""

_SCALES = {suffix: dtype for dtype, suffix in SCALE_SUFFIXES.items()} | {"_sfloat16": "float16"}
_TEXT = re.compile(
    r"(?P<format>[a-z]+\d+(_e\dm\d)?)(_(?P<granularity>channel|tensor|g[1-9]\d*))?(?P<zp>_zp)?"
    rf"(?P<scale>{'|'.join(filter(None, _SCALES))})?"
)


def parse_scheme(text: str) -> Scheme:
    """The scheme that `text` names; `str()` of the result gives `text` back, of an alias what it stands for.

    Raises:
      MpqError: the text is not of the form FORMAT[_gN|_channel|_tensor][_zp][_sDTYPE], or the parts do not go together.
    """
    allowed = (
        f"a format of {', '.join((*FORMATS, *TRELLISES))} with _gN, _channel or _tensor, _zp for affine, and "
        f"{', '.join(filter(None, _SCALES))} for the scales: int4_g64, int8_channel, bf16; or "
        f"{', '.join((*ALIASES, *GGML_SCHEMES))}"
    )
    if text in GGML_SCHEMES:
        return GGML_SCHEMES[text]
    match = _TEXT.fullmatch(ALIASES.get(text, text))
    number_format = {**FORMATS, **TRELLISES}.get(match["format"]) if match else None
    if match is None or number_format is None:
        raise MpqError(f"unknown scheme {text!r}: allowed is {allowed}")
    granularity, zero_point, scale = match["granularity"], bool(match["zp"]), match["scale"] or ""
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
    if zero_point and scale == "_se8m0":
        raise MpqError(f"scheme {text!r} is wrong: a range with a zero point needs other scales than powers of two")
    if number_format.span > 1 and scale == "_se8m0":
        raise MpqError(f"scheme {text!r} is wrong: the scale is a root mean square, no power of two; write _sfp8")
    if number_format.learned and scale == "_se8m0":
        raise MpqError(f"scheme {text!r} is wrong: a table of levels is mirrored by negative scales; write _sfp8")
    if granularity == "tensor" and scale == "_sfp8":
        raise MpqError(f"scheme {text!r} is wrong: a single scale needs no float32 beside it; write _tensor_sfloat32")
    group_size = int(granularity[1:]) if granularity.startswith("g") else None
    return Scheme(number_format, group_size, zero_point, _SCALES[scale], granularity == "tensor")
