"""Histograms of activations on a log scale, with the range that every static scheme takes of them."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.figure import MIXED, MUTED, PREDICTED, UNIFORM, save

MOST = 12
COLUMNS = 3
_BARS = 128
_STYLES = tuple((colour, dash) for dash in ("-", ":") for colour in (MIXED, PREDICTED, UNIFORM))


def draw_ranges(rows: Sequence[Mapping[str, Any]], *outs: str | os.PathLike[str]) -> None:
    """Write histograms of the first rows to each of `outs`, as .png or .svg.

    Args:
      rows: of each `path`; `counts`, `int64[bins]`, of equal bins between `-2**exponent` and `2**exponent`; `ends`,
        scheme -> `[low, high]`, lists of one end a part; and `change` of the range between the halves of the windows.
      *outs: where to.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: ranges_figure(rows), *outs)


def ranges_figure(rows: Sequence[Mapping[str, Any]], most: int = MOST) -> Figure:
    """One panel a row, at most so many, spread over all rows."""
    shown = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int))]
    lines = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(10.5, 0.6 + 2.1 * lines), layout="constrained")
    handles: dict[str, Any] = {}
    for panel, row in enumerate(shown):
        ax = figure.add_subplot(lines, min(COLUMNS, len(shown)), panel + 1)
        counts = np.asarray(row["counts"]).reshape(_BARS, -1).sum(axis=1)
        edges = np.linspace(-(2.0 ** row["exponent"]), 2.0 ** row["exponent"], _BARS + 1)
        ax.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=MUTED, alpha=0.5)
        ax.set_yscale("log")
        ax.set_title(_title(row), fontsize=7, loc="left")
        ax.tick_params(labelsize=7)
        for (colour, dash), (scheme, ends) in zip(_STYLES, row["ends"].items(), strict=False):
            for end in (min(ends[0]), max(ends[1])):
                handles[scheme] = ax.axvline(end, color=colour, linestyle=dash, linewidth=1.2)
        if panel % COLUMNS == 0:
            ax.set_ylabel("values", fontsize=7)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _title(row: Mapping[str, Any]) -> str:
    """The row, and how its range changes between the halves of the calibration windows."""
    change = row.get("change")
    return row["path"] if change is None else f"{row['path']}   later half {round(100 * change):+d} %"
