"""What `results.json` says of one static range: a part of the schema in `analysis.load`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RangeInfo:
    """A static range of an activation, and the values of the calibration set that it was chosen from.

    Attributes:
      path: of the row.
      low, high: its ends; what lies beyond is clipped.
      least, largest: value seen, of `values` in `windows`.
      clipped: share of those beyond the ends.
      change: of the range in the later half of the windows, relative to the earlier half's; None: too few windows.
      counts: values in equal bins from `-2**exponent` to `2**exponent`.
    """

    path: str
    scheme: str
    low: float
    high: float
    least: float
    largest: float
    values: int
    windows: int
    clipped: float
    change: float | None
    exponent: int
    counts: tuple[int, ...]
