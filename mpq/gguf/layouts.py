"""Bytes of ggml's blocks: the parts of a quantized weight to what lies in a GGUF file, and back, bit for bit.

A row of the file is an output channel, a column of `w[k, n]`: its blocks follow one another, each a few fields. Most
fields hold some bits of integers. Of every `parts * width` consecutive integers, number `i * width + j` lies in byte
`j`, its `8 / parts` bits above those of number `(i - 1) * width + j`. Layouts as in ggml's `ggml-common.h`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np

from mpq.formats.ggml import require_fit
from mpq.formats.minifloat import Minifloat
from mpq.types import MpqError, Scheme

Parts = Mapping[str, np.ndarray]


FLOATS = ("scale", "minimum")
"""Parts that are no integers."""


@dataclasses.dataclass(frozen=True)
class _Float:
    """A float of the block: `scale` or `minimum`."""

    part: str
    dtype: type[np.generic] = np.float16

    def size(self, counts: Mapping[str, int]) -> int:
        return np.dtype(self.dtype).itemsize

    def write(self, parts: Parts) -> np.ndarray:
        return np.ascontiguousarray(parts[self.part][:, None]).view(np.uint8)

    def read(self, data: np.ndarray, into: dict[str, np.ndarray]) -> None:
        into[self.part] = np.ascontiguousarray(data).view(self.dtype)[:, 0]


@dataclasses.dataclass(frozen=True)
class _Bits:
    """Bits `low .. low + bits - 1` of the integers of a part; `width` bytes apart, as the module says."""

    part: str
    low: int
    bits: int
    width: int

    def size(self, counts: Mapping[str, int]) -> int:
        return counts[self.part] * self.bits // 8

    def write(self, parts: Parts) -> np.ndarray:
        stored = (parts[self.part] >> self.low) & (2**self.bits - 1)
        folded = stored.reshape(len(stored), -1, 8 // self.bits, self.width)
        packed = folded[:, :, 0]
        for index in range(1, 8 // self.bits):
            packed = packed | (folded[:, :, index] << (self.bits * index))
        return packed.reshape(len(stored), -1)

    def read(self, data: np.ndarray, into: dict[str, np.ndarray]) -> None:
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
        folded = (data.reshape(len(data), -1, 1, self.width) >> shifts) & (2**self.bits - 1)
        value = folded.reshape(len(data), -1) << self.low
        into[self.part] = into[self.part] | value if self.part in into else value


class _Signs(_Bits):
    """Of MXFP4: codes of a sign and three bits of magnitude. Its negative zero is read as zero."""

    def write(self, parts: Parts) -> np.ndarray:
        code = parts[self.part].astype(np.int8)
        return super().write({self.part: np.where(code < 0, 8 - code, code).astype(np.uint8)})

    def read(self, data: np.ndarray, into: dict[str, np.ndarray]) -> None:
        found: dict[str, np.ndarray] = {}
        super().read(data, found)
        magnitude = (found[self.part] & 7).astype(np.int8)
        into[self.part] = np.where(found[self.part] > 7, -magnitude, magnitude).astype(np.uint8)


class _Nibbles:
    """Of Q2_K: a byte a group, its scale below and its minimum above."""

    def size(self, counts: Mapping[str, int]) -> int:
        return counts["sub_scale"]

    def write(self, parts: Parts) -> np.ndarray:
        return parts["sub_scale"] | (parts["sub_minimum"] << 4)

    def read(self, data: np.ndarray, into: dict[str, np.ndarray]) -> None:
        into |= {"sub_scale": data & 15, "sub_minimum": data >> 4}


class _Sixes:
    """Of Q4_K and Q5_K: eight scales and eight minima of 6 bits; 2 bits of the last four lie with the first four."""

    def size(self, counts: Mapping[str, int]) -> int:
        return 12

    def write(self, parts: Parts) -> np.ndarray:
        scale, minimum = parts["sub_scale"], parts["sub_minimum"]
        first = [a[:, :4] | ((a[:, 4:] >> 4) << 6) for a in (scale, minimum)]
        return np.concatenate([*first, (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4)], axis=1)

    def read(self, data: np.ndarray, into: dict[str, np.ndarray]) -> None:
        scale, minimum, last = data[:, :4], data[:, 4:8], data[:, 8:]
        join = lambda first, low: np.concatenate([first & 63, low | ((first >> 6) << 4)], axis=1)
        into |= {"sub_scale": join(scale, last & 15), "sub_minimum": join(minimum, last >> 4)}


_Field = _Float | _Bits | _Nibbles | _Sixes
_SCALE, _MINIMUM = _Float("scale"), _Float("minimum")
_code = lambda low, bits, width: _Bits("qvalue", low, bits, width)
_sub = lambda low, bits, width: _Bits("sub_scale", low, bits, width)

LAYOUTS: Mapping[str, tuple[_Field, ...]] = MappingProxyType(
    {
        "q8_0": (_SCALE, _code(0, 8, 1)),
        "q4_0": (_SCALE, _code(0, 4, 16)),
        "q4_1": (_SCALE, _MINIMUM, _code(0, 4, 16)),
        "q5_0": (_SCALE, _code(4, 1, 1), _code(0, 4, 16)),
        "q5_1": (_SCALE, _MINIMUM, _code(4, 1, 1), _code(0, 4, 16)),
        "q2_k": (_Nibbles(), _code(0, 2, 32), _SCALE, _MINIMUM),
        "q3_k": (_code(2, 1, 32), _code(0, 2, 32), _sub(0, 4, 8), _sub(4, 2, 4), _SCALE),
        "q4_k": (_SCALE, _MINIMUM, _Sixes(), _code(0, 4, 32)),
        "q5_k": (_SCALE, _MINIMUM, _Sixes(), _code(4, 1, 32), _code(0, 4, 32)),
        "q6_k": (_code(0, 4, 64), _code(4, 2, 32), _sub(0, 8, 1), _SCALE),
        "iq4_nl": (_SCALE, _code(0, 4, 16)),
        "iq4_xs": (_SCALE, _sub(4, 2, 1), _sub(0, 4, 1), _code(0, 4, 16)),
        "mxfp4": (_Float("scale", ml_dtypes.float8_e8m0fnu), _Signs("qvalue", 0, 4, 16)),
        "tq2_0": (_code(0, 2, 32), _SCALE),
    }
)
"""Fields of a block, in the order of the file, by the name of the type."""


def row_bytes(scheme: Scheme, k: int) -> int:
    """Bytes of one output channel of `k` weights under a scheme that fits it."""
    return scheme.size_bits(k, 1) // 8


def pack(parts: Parts, scheme: Scheme) -> np.ndarray:
    """The bytes of a weight.

    Args:
      parts: arrays of a `QTensor` without its batch axis: `qvalue: int8[k, n]`, `scale: float16[blocks, n]` and what
        else the scheme has; of a plain float format `qvalue` in its dtype.
      scheme: of ggml, or plain float.

    Returns:
      `uint8[n, row_bytes]`.

    Raises:
      MpqError: the scheme is neither, or its blocks do not fit `k` rows.
    """
    k, n = parts["qvalue"].shape
    require_ggml(scheme, k)
    if scheme.blocks is None:
        return np.ascontiguousarray(parts["qvalue"].T).view(np.uint8)
    stored: dict[str, np.ndarray] = {}
    for name, array in parts.items():
        blocks = np.ascontiguousarray(array.T).reshape(n * k // scheme.blocks.rows, -1)
        if name in FLOATS:
            stored[name] = blocks[:, 0]
        else:  # int8 wraps as two's complement does
            stored[name] = (blocks.astype(np.int16) - _zero(scheme, name)).astype(np.uint8)
    return np.concatenate([field.write(stored) for field in LAYOUTS[scheme.blocks.name]], axis=1).reshape(n, -1)


def unpack(data: np.ndarray, scheme: Scheme, k: int) -> dict[str, np.ndarray]:
    """Inverse of `pack`.

    Args:
      data: `uint8[n, row_bytes]`.
      scheme: of ggml, or plain float.
      k: rows of the weight.

    Raises:
      MpqError: the scheme is neither, or its blocks do not fit `k` rows.
    """
    require_ggml(scheme, k)
    n = len(data)
    if scheme.blocks is None:
        return {"qvalue": np.ascontiguousarray(data).view(scheme.format.dtype).T}  # pyright: ignore
    rows = scheme.blocks.rows
    counts = {"qvalue": rows, "sub_scale": rows // (scheme.group_size or rows)}
    blocks, stored, start = data.reshape(n * k // rows, -1), dict[str, np.ndarray](), 0
    for field in LAYOUTS[scheme.blocks.name]:
        stop = start + field.size(counts)
        field.read(blocks[:, start:stop], stored)
        start = stop
    parts: dict[str, np.ndarray] = {}
    for name, array in stored.items():
        signed = array if name in FLOATS else (array.astype(np.int16) + _zero(scheme, name)).astype(np.int8)
        parts[name] = np.ascontiguousarray(signed.reshape(n, -1).T)
    return parts


def require_ggml(scheme: Scheme, k: int) -> None:
    """Refuse what ggml has no type for.

    Raises:
      MpqError: the scheme is neither one of ggml nor plain float, or its blocks do not fit `k` rows.
    """
    if scheme.has_scale and scheme.blocks is None:
        raise MpqError(f"scheme {scheme} is no type of ggml: allowed are {', '.join(LAYOUTS)}, bf16, f16 and f32")
    require_fit(scheme, k)


def _zero(scheme: Scheme, part: str) -> int:
    """The integer that is stored as 0: Q8_0, MXFP4 and the scales of Q6_K are signed in the file, all else from 0."""
    assert scheme.blocks is not None
    if part == "qvalue":
        return 0 if scheme.format.bits == 8 or isinstance(scheme.format, Minifloat) else scheme.format.min_qvalue
    return 0 if scheme.blocks.minimum or scheme.blocks.sub_bits == 8 else -(1 << ((scheme.blocks.sub_bits or 1) - 1))
