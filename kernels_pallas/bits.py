"""Codes of 1 to 8 bits in bytes, without loss, as planes along one axis.

A width is a sum of powers of two, the planes: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1, and 8, 4, 2, 1 are one
plane each. The first plane holds the lowest bits of every code. In a plane of width p a byte holds 8 / p consecutive
rows, the first one in the lowest bits, so 4 bits are nibbles, low nibble first, and 2 bits are crumbs. Planes follow
each other along the packed axis. Every plane is filled up to whole bytes: at most 7 bits of padding a plane and column.
"""

import functools
import operator

import jax
import numpy as np

from kernels_pallas.errors import KernelError


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code of `bits` bits, widest first.

    Raises:
      KernelError: `bits` is not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise KernelError(f"codes of {bits} bits cannot be packed: 1 to 8 are allowed")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_rows(rows: int, bits: int) -> int:
    """Bytes that `rows` codes take along the packed axis."""
    return sum(-(-rows * width // 8) for width in planes(bits))


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes along the second-to-last axis, on the host.

    Args:
      codes: `uint8[..., rows, n]`, each below `2**bits`.
      bits: width of a code.

    Returns:
      `uint8[..., packed_rows(rows, bits), n]`.
    """
    *batch, rows, n = codes.shape
    parts, shift = [], 0
    for width in planes(bits):
        per_byte = 8 // width
        fill = [(0, 0)] * len(batch) + [(0, -rows % per_byte), (0, 0)]
        plane = np.pad((codes >> np.uint8(shift)) & np.uint8(2**width - 1), fill)
        fields = plane.reshape(*batch, -1, per_byte, n)
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        parts.append(np.bitwise_or.reduce(fields << shifts, axis=-2))
        shift += width
    return np.concatenate(parts, axis=-2)


def unpack_bits(packed: jax.Array, bits: int, rows: int) -> jax.Array:
    """Inverse of `pack_bits`: `uint8[..., rows, n]`. NumPy arrays give NumPy arrays, without compiling anything."""
    *batch, _, n = packed.shape
    parts, start, shift = [], 0, 0
    for width in planes(bits):
        per_byte = 8 // width
        size = -(-rows // per_byte)
        plane = packed[..., start : start + size, :]
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        fields = (plane[..., None, :] >> shifts) & np.uint8(2**width - 1)
        parts.append(fields.reshape(*batch, size * per_byte, n)[..., :rows, :] << np.uint8(shift))
        start, shift = start + size, shift + width
    return functools.reduce(operator.or_, parts)
