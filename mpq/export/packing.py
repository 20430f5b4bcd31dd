"""Bit streams of codes of 2 to 8 bits: what lies on the disk.

Code number i, less the format's smallest, occupies bits `i * bits .. (i + 1) * bits - 1` of the stream, its lowest bit
first; bit j of the stream is bit `j % 8`, counted from the lowest, of byte `j // 8`. The last byte is filled with
zeros. So four-bit codes lie low nibble first, and eight codes of any width are whole bytes.
"""

import numpy as np

from mpq.types import MpqError

_CHUNK = 2**20  # codes at once, a multiple of 8; they pass through one byte per bit


def packed_size(count: int, bits: int) -> int:
    """Bytes of a stream of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int, min_qvalue: int) -> np.ndarray:
    """Write codes as a bit stream.

    Args:
      codes: `int8`, any shape, read in C order; each in `min_qvalue .. min_qvalue + 2**bits - 1`.
      bits: width of a code, 2 to 8.
      min_qvalue: the code that is stored as 0.

    Returns:
      `uint8[packed_size(codes.size, bits)]`.

    Raises:
      MpqError: a code does not fit into `bits`.
    """
    flat = np.asarray(codes).reshape(-1)
    stream = np.empty(packed_size(flat.size, bits), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        shifted = flat[start : start + _CHUNK].astype(np.int16) - min_qvalue
        if shifted.min() < 0 or shifted.max() >= 2**bits:
            wrong = shifted[(shifted < 0) | (shifted >= 2**bits)][0] + min_qvalue
            highest = min_qvalue + 2**bits - 1
            raise MpqError(f"code {wrong} does not fit into {bits} bits: allowed is {min_qvalue} to {highest}")
        unpacked = np.unpackbits(shifted.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
        part = np.packbits(unpacked.reshape(-1), bitorder="little")
        first = start * bits // 8
        stream[first : first + part.size] = part
    return stream


def unpack(stream: np.ndarray, count: int, bits: int, min_qvalue: int) -> np.ndarray:
    """Read `count` codes from a bit stream; inverse of `pack`.

    Args:
      stream: `uint8[packed_size(count, bits)]`.
      count: number of codes.
      bits: width of a code, 2 to 8.
      min_qvalue: the code that is stored as 0.

    Returns:
      `int8[count]`.

    Raises:
      MpqError: the stream is of another length.
    """
    stream = np.asarray(stream).reshape(-1)
    expected = packed_size(count, bits)
    if stream.size != expected:
        raise MpqError(f"a stream of {count} codes of {bits} bits is {expected} bytes, not {stream.size}: truncated?")
    codes = np.empty(count, np.int8)
    for start in range(0, count, _CHUNK):
        part = codes[start : start + _CHUNK]
        first = start * bits // 8
        unpacked = np.unpackbits(stream[first : first + packed_size(part.size, bits)], bitorder="little")
        values = np.packbits(unpacked[: part.size * bits].reshape(-1, bits), axis=1, bitorder="little")[:, 0]
        part[:] = values.astype(np.int16) + min_qvalue
    return codes
