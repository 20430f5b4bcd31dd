"""Sizes as people write them: `4MB` (10^6 bytes), `1.5MiB` (2^20 bytes), bits per weight. Inside, they are bits.

Arithmetic is on decimal fractions, never on floats, so `1.1MB` is 1 100 000 bytes and not one less.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from mpq.types import MpqError

BYTE_UNITS: Mapping[str, int] = MappingProxyType(
    {
        "B": 1,
        "kB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
        "TiB": 2**40,
    }
)
"""Bytes in one unit. Decimal prefixes are powers of ten, as on a disk; binary ones carry an `i`."""

_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]*)\s*")
_BY_LOWER_CASE = {name.lower(): factor for name, factor in BYTE_UNITS.items()}


def parse_size(size: int | str) -> int:
    """Bits in a size: an int is bytes, a text a number with a unit; without one it is bytes. Case does not matter.

    Args:
      size: `4_000_000`, `"4MB"`, `"1.5 MiB"`, `"4000000"`.

    Returns:
      Whole bytes (rounded down: a budget is never exceeded) times 8.

    Raises:
      MpqError: not a number with a known unit, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise MpqError(
            f"size {size!r} is neither whole bytes nor text: write an int, or text such as '4MB' or '1.5MiB'"
        )
    if isinstance(size, int):
        size_bytes = size
    else:
        match = _SIZE.fullmatch(size)
        factor = _BY_LOWER_CASE.get((match["unit"] or "B").lower()) if match else None
        if match is None or factor is None:
            raise MpqError(
                f"size {size!r} is not a number with a unit of {', '.join(BYTE_UNITS)}: write for instance '4MB'"
            )
        size_bytes = math.floor(Fraction(match["number"]) * factor)
    if size_bytes <= 0:
        raise MpqError(f"size {size!r} is not positive: give at least one byte")
    return 8 * size_bytes


def bpw_to_bits(bpw: float, num_weights: int) -> int:
    """Largest whole number of bits that is at most `bpw` bits for each of `num_weights` weights.

    Raises:
      MpqError: `bpw` is not a positive finite number.
    """
    if isinstance(bpw, bool) or not isinstance(bpw, int | float) or not math.isfinite(bpw) or bpw <= 0:
        raise MpqError(f"bits per weight {bpw!r} is not a positive number: give for instance 3.5")
    # repr is the decimal that was typed: 3.3 bits for 10 weights are 33 bits, though the double below 3.3 would
    # give 32.
    return math.floor(Fraction(repr(bpw)) * num_weights)


def format_bits(bits: int) -> str:
    """Bits for a person: `1234567 bytes (1.23 MB)`; bytes rounded up."""
    size_bytes = -(-bits // 8)
    for unit in ("TB", "GB", "MB", "kB"):
        if size_bytes >= BYTE_UNITS[unit]:
            return f"{size_bytes} bytes ({size_bytes / BYTE_UNITS[unit]:.2f} {unit})"
    return f"{size_bytes} bytes"


def format_bpw(bits: int, num_weights: int) -> str:
    """Bits per weight for a person: `3.4375 bpw`."""
    return f"{bits / num_weights:.4f} bpw"
