"""Numbers, schemes and paths as people read them."""

import math
import re
from collections.abc import Sequence

import numpy as np

from mpq.types import SCALE_SUFFIXES

MINUS = "\N{MINUS SIGN}"
_CODE_WIDTH = re.compile(r"[a-z]+(?P<bits>\d+)|q(?P<kbits>\d)_")
_GROUP = re.compile(r"_g(?P<size>\d+)")
_SCALE_WIDTHS = {suffix: 8 * np.dtype(dtype).itemsize for dtype, suffix in SCALE_SUFFIXES.items() if suffix}
_PART, _NUMBER = re.compile(r"[^./]+"), re.compile(r"\d+")


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with so many significant digits: `0.0312`, `12.3`, below 1e-4 `4.1e-6`; a dash for None."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent >= -4:
        return _signed(value, f"{abs(rounded):.{max(0, digits - 1 - exponent)}f}")
    return _signed(value, _scientific(abs(rounded), digits))


def with_error(value: float | None, stderr: float | None) -> str:
    """`0.0312 ± 0.0021`: the error with two significant digits, the value to the same decimal place."""
    if value is None or not math.isfinite(value):
        return significant(None)
    if stderr is None or not math.isfinite(stderr) or stderr <= 0:
        return significant(value)
    exponent = math.floor(math.log10(float(f"{stderr:.1e}")))
    if exponent < -6:
        return _signed(value, f"{_scientific(abs(value), 2)} ± {_scientific(stderr, 2)}")
    decimals = max(0, 1 - exponent)
    return _signed(round(value, decimals), f"{abs(value):.{decimals}f} ± {stderr:.{decimals}f}")


def megabytes(size_bytes: float) -> str:
    """`4.06 MB`, 10^6 bytes; `812 kB` below one."""
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def code_width(scheme: str) -> int:
    """Bits of one code of a scheme, by its name: 3 of `int3_g64`, 4 of `q4_k`, 16 of `bf16`; 0 if unknown."""
    match = _CODE_WIDTH.match(scheme)
    return int(match["bits"] or match["kbits"]) if match else 0


def effective_bits(scheme: str) -> float:
    """Bits per weight of a scheme, by its name, to order them: code width, scales and zero points of groups."""
    bits, group = code_width(scheme), _GROUP.search(scheme)
    if group is None:
        return float(bits)
    zero_point = bits if "_zp" in scheme else 0
    scale = next((width for suffix, width in _SCALE_WIDTHS.items() if scheme.endswith(suffix)), 16)
    return bits + (scale + zero_point) / int(group["size"])


def layers_and_roles(paths: Sequence[str]) -> dict[str, tuple[str | None, str]]:
    """Layer and role of every weight: `layers.3.mlp.up_proj.kernel` -> (`3`, `mlp.up_proj`); None without a number.

    No two paths have both in common. A layer is counted by the first number that is a part of the path, else by the
    first in brackets (a slice of a scanned weight), and named by what stands before it where that differs between
    weights: `layer1.0`, `layer2.0`. The role is what remains, without a closing `kernel`, `weight` or `embedding`.
    """
    parsed = {path: _parse(path) for path in paths}
    one_list = len({container for container, number, _ in parsed.values() if number is not None}) == 1
    named = lambda container, number: number if one_list or not container else f"{container}.{number}"
    return {
        path: (None if number is None else named(container, number), role)
        for path, (container, number, role) in parsed.items()
    }


def _parse(path: str) -> tuple[str, str | None, str]:
    """What stands before the number of the layer, the number, and the role."""
    stem, _, brackets = path.partition("[")
    parts, index = _PART.findall(stem), _NUMBER.findall(brackets)
    if len(parts) > 1 and parts[-1] in ("kernel", "weight", "embedding"):
        parts.pop()
    place = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if place is not None:
        container, number, rest = ".".join(parts[:place]), parts[place], parts[place + 1 :]
    elif index:
        container, number, rest = "", index.pop(0), parts
        if len(rest) > 1 and rest[0] in ("layers", "blocks", "h", "model"):
            rest = rest[1:]
    else:
        container, number, rest = "", None, parts
    return container, number, ".".join(rest) + (f"[{','.join(index)}]" if index else "")


def thin(values: Sequence[float], limit: int) -> list[int]:
    """Indices of at most `limit` of the ascending `values`, spread evenly over their range; both ends are kept."""
    if len(values) <= limit:
        return list(range(len(values)))
    low, high = values[0], values[-1]
    kept: dict[int, int] = {}
    for i, value in enumerate(values):
        bucket = int((value - low) / (high - low) * (limit - 2)) if high > low else i * (limit - 2) // len(values)
        kept.setdefault(bucket, i)
    return sorted({*kept.values(), len(values) - 1})


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _signed(value: float, magnitude: str) -> str:
    return f"{MINUS}{magnitude}" if value < 0 else magnitude
