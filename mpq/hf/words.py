"""Codes in 32-bit words, row by row: what the checkpoints of PyTorch store.

A row of `c` codes of `b` bits is a bit stream, the lowest bit of the first code first, in `ceil(c * b / 32)` little
words; what is left of the last word is zero. For widths that divide 32 no code lies in two words.
"""

import numpy as np

_ROWS = 2**22  # bits at once, one byte each


def words_of(count: int, bits: int) -> int:
    """Words of a row of `count` codes."""
    return -(-count * bits // 32)


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Write codes as rows of words.

    Args:
      codes: integers `[rows, count]`, each in `0 .. 2**bits - 1`.
      bits: width of a code, 2 to 8.

    Returns:
      `int32[rows, words_of(count, bits)]`.
    """
    rows, count = codes.shape
    words = np.zeros((rows, words_of(count, bits)), "<i4")
    step = max(1, _ROWS // max(1, count * bits))
    for start in range(0, rows, step):
        part = np.ascontiguousarray(codes[start : start + step]).astype(np.uint8)
        stream = np.unpackbits(part[..., None], axis=2, count=bits, bitorder="little").reshape(len(part), -1)
        packed = np.packbits(stream, axis=1, bitorder="little")
        words[start : start + step].view(np.uint8)[:, : packed.shape[1]] = packed
    return words


def unpack_rows(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Read `count` codes of every row; inverse of `pack_rows`.

    Args:
      words: `int32[rows, words_of(count, bits)]`.
      count: codes in a row.
      bits: width of a code, 2 to 8.

    Returns:
      `uint8[rows, count]`.
    """
    codes = np.empty((len(words), count), np.uint8)
    step = max(1, _ROWS // max(1, count * bits))
    for start in range(0, len(words), step):
        part = np.ascontiguousarray(words[start : start + step]).astype("<i4").view(np.uint8)
        stream = np.unpackbits(part, axis=1, count=count * bits, bitorder="little")
        codes[start : start + step] = np.packbits(stream.reshape(len(part), count, bits), axis=2, bitorder="little")[
            ..., 0
        ]
    return codes
