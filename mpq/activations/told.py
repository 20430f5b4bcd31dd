"""What a run tells of its static ranges: of every row, where it is clipped, what was seen, and how steady that was."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.ranges import BINS, ActivationRange

BARS = 128
"""Of a histogram that is told: neighbouring bins are added up."""


def range_entries(chosen: Sequence[RoundedActivation], ranges: Mapping[str, ActivationRange]) -> list[dict[str, Any]]:
    """Of every static row, plain data.

    Args:
      chosen: rows of a plan, with their ranges.
      ranges: what those were chosen from, by path of the row.

    Returns:
      Of each: `path`, `scheme`, `low` and `high`, the widest ends of its parts; `least` and `largest` value seen, of
      `values` in `windows`; `clipped`, the share of them beyond the ends, of its part, up to half a bin; `change` of
      the range in the later half of the windows, relative to the earlier half's, None of fewer than four windows;
      `counts`, values in `BARS` equal bins from `-2**exponent` to `2**exponent`.
    """
    entries = []
    for one in chosen:
        if one.low is None or one.high is None:
            continue
        found = ranges[one.spec.path]
        least, largest = found.extremes
        entries.append(
            {
                "path": one.spec.path,
                "scheme": str(one.scheme),
                "low": min(one.low),
                "high": max(one.high),
                "least": least,
                "largest": largest,
                "values": found.values,
                "windows": len(found.magnitudes),
                "clipped": _clipped(found, np.asarray(one.low), np.asarray(one.high)),
                "change": found.change,
                "exponent": found.exponent,
                "counts": found.counts.sum(axis=0).reshape(BARS, -1).sum(axis=1).tolist(),
            }
        )
    return entries


def _clipped(found: ActivationRange, low: np.ndarray, high: np.ndarray) -> float:
    """The share of values in bins whose middle lies beyond the ends, `float[parts]`, of their part."""
    middles = (np.arange(BINS) - BINS // 2 + 0.5) * 2.0 ** (found.exponent + 1) / BINS
    width = 2.0 ** (found.exponent + 1) / BINS
    beyond = (middles < low[:, None] - width / 2) | (middles > high[:, None] + width / 2)
    return float((found.counts * np.broadcast_to(beyond, found.counts.shape)).sum() / max(found.values, 1))
