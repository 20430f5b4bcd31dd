"""What all figures share: one style, colours, the same bytes every time, and labels that keep clear of each other."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from mpq.files import write_bytes
from mpq.types import MpqError

STYLE = Path(__file__).with_name("paper.mplstyle")
INK, PAPER, MUTED = "#1b1f24", "#ffffff", "#6e7781"
# Okabe and Ito's palette: told apart with every common colour vision; kinds also differ in marker and line.
PREDICTED, MIXED, UNIFORM, HEURISTIC = "#0072b2", "#d55e00", "#6e7781", "#009e73"
PROPAGATED, CORRECTED, DISTILLED = "#8a5a00", "#56b4e9", "#b0468c"


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults and the project's style, whatever the user's own settings are."""
    with matplotlib.style.context(["default", STYLE]), matplotlib.rc_context({"svg.hashsalt": "mpq"}):
        yield


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure as the bytes of a PNG and of an SVG file."""

    png: bytes
    svg: bytes

    def write(self, out: str | os.PathLike[str]) -> None:
        """Write the file that the suffix of `out` asks for.

        Raises:
          MpqError: the suffix is neither .png nor .svg, or the file cannot be written.
        """
        write_bytes(out, self.png if _suffix(out) == ".png" else self.svg)


def render(build: Callable[[], Figure]) -> Drawing:
    """A figure as files; no date, version or random id in them, hence equal figures give equal bytes.

    Args:
      build: makes the figure; called inside the style.

    Returns:
      The content of both files.
    """
    with style():
        figure = build()
        figure.draw_without_rendering()
        figure.set_layout_engine(
            "none"
        )  # once laid out it stays so: both files are alike, and the work is not repeated
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Drawing(png.getvalue(), svg.getvalue())


def pdf(build: Callable[[], Figure], settings: Mapping[Any, Any] | None = None) -> bytes:
    """A figure as a PDF file, for print: text in DejaVu's outlines, no date and no version.

    Args:
      build: makes the figure; called inside the style.
      settings: rcParams over the style's.

    Returns:
      The file, not compressed, so that equal figures give equal bytes under every zlib.
    """
    with style(), matplotlib.rc_context({"pdf.compression": 0}), matplotlib.rc_context(dict(settings or {})):
        out = io.BytesIO()
        build().savefig(out, format="pdf", metadata=dict.fromkeys(("Creator", "Producer", "CreationDate")))
    return out.getvalue()


def save(build: Callable[[], Figure], *outs: str | os.PathLike[str]) -> None:
    """Draw a figure and write it to every one of `outs`, as .png or .svg.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    for out in outs:
        _suffix(out)  # before the work, and before any file
    drawing = render(build)
    for out in outs:
        drawing.write(out)


def _suffix(out: str | os.PathLike[str]) -> str:
    suffix = Path(out).suffix.lower()
    if suffix not in (".png", ".svg"):
        raise MpqError(f"cannot draw {out}: figures are written as .png or .svg, so give a name that ends so")
    return suffix


@dataclasses.dataclass(frozen=True)
class Label:
    """A text that belongs to a point in data coordinates."""

    x: float
    y: float
    text: str
    color: str


def place_labels(
    ax: Axes,
    labels: Sequence[Label],
    markers: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]] = (),
    *,
    rising: bool = False,
) -> None:
    """Write each label beside its point, where it covers least of the markers, the line, other labels and the frame.

    Args:
      ax: limits and scales are final.
      labels: in order of importance.
      markers: points in data coordinates that should stay visible.
      line: vertices in data coordinates of a curve that should.
      rising: the curve rises to the right, so that the side below it is the emptier one.
    """
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)  # an axes that is drawn has a figure
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    frame, taken = ax.get_window_extent(), []
    point = figure.dpi / 72  # pixels
    dots, curve = _boxes(ax, markers, 8 * point), _boxes(ax, line, 1.5 * point)
    offsets = [(dx, -dy, h, _MIRRORED[v]) for dx, dy, h, v in _OFFSETS] if rising else _OFFSETS
    for label in labels:
        choices = []
        for rank, (dx, dy, horizontal, vertical) in enumerate(offsets):
            note = ax.annotate(
                label.text,
                (label.x, label.y),
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8.5,
                color=label.color,
                bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
                zorder=2.5,  # above lines, below markers
            )
            box = note.get_window_extent(canvas.get_renderer())
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            # Weights: never over another label or outside; rather over the thin line than over a marker.
            cost = 100 * (box.count_overlaps(taken) + outside) + 10 * box.count_overlaps(dots)
            choices.append((cost + 4 * (box.count_overlaps(curve) > 0) + 0.1 * rank, rank, note, box))
        _, _, best, box = min(choices, key=lambda choice: choice[:2])
        taken.append(box)
        for _, _, note, _ in choices:
            if note is not best:
                note.remove()


def _boxes(ax: Axes, points: Sequence[tuple[float, float]], side: float) -> list[Bbox]:
    """Squares of `side` pixels around points in data coordinates."""
    if not points:
        return []
    return [Bbox.from_bounds(x - side / 2, y - side / 2, side, side) for x, y in ax.transData.transform(list(points))]


# Right and above first: accuracy-size curves fall to the right, so that side is the emptier one.
_OFFSETS = (
    (7, 2, "left", "bottom"),
    (8, 0, "left", "center"),
    (-7, -2, "right", "top"),
    (-8, 0, "right", "center"),
    (7, -3, "left", "top"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (-7, 3, "right", "bottom"),
    (0, -20, "center", "top"),
    (0, 20, "center", "bottom"),
    (20, 8, "left", "bottom"),
    (-20, -8, "right", "top"),
    (20, -10, "left", "top"),
)
_MIRRORED = {"bottom": "top", "center": "center", "top": "bottom"}
