"""Numbers, schemes and paths as people read them."""

import math
import re
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
_CODE_WIDTH = re.compile(r"[a-z]+(?P<bits>\d+)|q(?P<kbits>\d)_")
_GROUP = re.compile(r"_g(?P<size>\d+)")
_INDEX = re.compile(r"\[(?P<bracket>[\d,\s]+)\]$|(?:^|[./])(?P<dotted>\d+)(?=[./])")


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
    """Bits per weight of a scheme, by its name, to order them: code width, 16-bit scales, zero points of groups."""
    bits, group = code_width(scheme), _GROUP.search(scheme)
    if group is None:
        return float(bits)
    zero_point = bits if "_zp" in scheme else 0
    return bits + (16 + zero_point) / int(group["size"])


def layer_and_role(path: str) -> tuple[int | None, str]:
    """Layer number and role of a weight: `layers.3.mlp.up_proj.kernel` -> (3, `mlp.up_proj`); no number -> None.

    The number is the last one in brackets (a slice of a scanned weight), else the first one that is a part of the path;
    the role is what remains without the outer container and the closing `kernel`, `weight` or `embedding`.
    """
    match = _INDEX.search(path)
    stem = path
    layer = None
    if match:
        layer = int((match["bracket"] or match["dotted"]).split(",")[-1])
        stem = path[: match.start()] if match["bracket"] else path[match.end() :].lstrip("./")
    parts = [part for part in re.split(r"[./]", stem) if part]
    if len(parts) > 1 and parts[-1] in ("kernel", "weight", "embedding"):
        parts.pop()
    if match and match["bracket"] and len(parts) > 1 and parts[0] in ("layers", "blocks", "h", "model"):
        parts.pop(0)
    return layer, ".".join(parts)


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
