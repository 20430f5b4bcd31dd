"""The report's section on static ranges of activations: a picture of each, a table, and what is doubtful about them."""

from matplotlib.figure import Figure

from analysis.html import escape, figure, paragraph, table
from analysis.load import Result
from analysis.ranges import ranges_figure
from analysis.sections import Drawings

MOST = 48
"""Panels of the figure; of more rows, so many spread over all."""


def ranges_of_run(result: Result) -> Figure:
    """Histogram and chosen ends of every static row."""
    return ranges_figure([{**vars(row), "ends": {row.scheme: [[row.low], [row.high]]}} for row in result.ranges], MOST)


def ranges_section(result: Result, drawings: Drawings) -> list[str]:
    """Figure, table, and the sentences of the calibration about rows that drift or rest on little data."""
    rows = result.ranges
    windows = sorted({row.windows for row in rows})
    told = f"{windows[0]}" if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"
    shown = "every row" if len(rows) <= MOST else f"{MOST} rows of {len(rows)}"
    caption = (
        f"Values of {shown} on {told} windows of the calibration set, counts on a logarithmic scale; lines are the "
        "ends of the static range, beyond which values are clipped."
    )
    doubts = [paragraph(f"Warning: {sentence}.") for sentence in result.warnings] or [
        paragraph("No range differs between the halves of the calibration set by more than chance and a tenth.")
    ]
    cells = [
        [
            escape(row.path),
            escape(row.scheme),
            f"{row.least:.4g} .. {row.largest:.4g}",
            f"{row.low:.4g} .. {row.high:.4g}",
            f"{100 * row.clipped:.3g} %",
            "" if row.change is None else f"{round(100 * row.change):+d} %",
        ]
        for row in rows
    ]
    head = ["row", "scheme", "values seen", "range", "clipped", "later half of the windows"]
    label = "Histograms of activations with their static ranges"
    return [
        *doubts,
        figure(drawings["ranges"], "ranges", label, caption),
        table("Static ranges, and by how much each changes in the later half of the windows", head, cells, 2),
    ]
