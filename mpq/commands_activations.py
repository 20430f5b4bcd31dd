"""What `mpq calibrate --of activations` and `mpq ranges` do: files of ranges, written, merged, shown and drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq.activations import ActivationRange, calibrate_activations, parse_activation_scheme
from mpq.activations.clip import choose_range
from mpq.activations.plans import rows_of
from mpq.activations.range_file import RangeFile, load_ranges, merge_ranges, save_ranges
from mpq.activations.ranges import drifting
from mpq.inputs import Dataset
from mpq.models import Model
from mpq.trace import Trace
from mpq.types import MpqError

OF = ("activations", "kv", "both")
"""Rows that ranges may be of."""


def calibrate(
    model: Model, traced: Trace, data: Dataset, batch_size: int, out: Path, of: str, keys_values: str
) -> dict[str, Any]:
    """The file of ranges."""
    rows = rows_of(of, traced, keys_values)
    found = calibrate_activations(model, traced, rows, data, batch_size=batch_size)
    save_ranges(out, found, model.digest, [data.digest])
    body = {"out": str(out), "rows": len(found), "num_rows": len(data.inputs), "size_bytes": out.stat().st_size}
    return {**body, "warnings": drifting(found)}


def ranges(files: Sequence[Path], out: Path | None, schemes: Sequence[str], picture: Path | None) -> dict[str, Any]:
    """What files of ranges hold, merged: written, drawn and told, with the ends that static schemes would take."""
    merged = merge_ranges({path: load_ranges(path) for path in files})
    parsed = [parse_activation_scheme(text) for text in schemes]
    if dynamic := [str(scheme) for scheme in parsed if scheme.static is None]:
        raise MpqError(f"{dynamic[0]} is dynamic and has no range to show: give static schemes, int8_tensor_static")
    body = {
        "rows": [_told(path, found, parsed) for path, found in merged.ranges.items()],
        "schemes": [str(scheme) for scheme in parsed],
        "warnings": drifting(merged.ranges),
        "out": None if out is None else str(out),
    }
    if picture is not None:
        from analysis.ranges import draw_ranges

        draw_ranges(_drawn(merged, body), picture)
    if out is not None:
        save_ranges(out, *merged)
    return body


def _told(path: str, found: ActivationRange, schemes: Sequence[Any]) -> dict[str, Any]:
    low, high = found.extremes
    suiting = lambda scheme: found.spec.heads or scheme.granularity != "head"
    ends = {str(s): [end.tolist() for end in choose_range(found, s, path)] for s in schemes if suiting(s)}
    windows = len(found.magnitudes)
    told = {"windows": windows, "values": found.values, "low": low, "high": high, "change": found.change}
    return {"path": path, **told, "ends": ends}


def _drawn(file: RangeFile, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the picture shows: `body["rows"]` with histograms."""
    rows = zip(body["rows"], file.ranges.values(), strict=True)
    return [{**row, "counts": found.counts.sum(axis=0), "exponent": found.exponent} for row, found in rows]
