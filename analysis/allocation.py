"""Which scheme every weight gets, and how sensitive every weight is."""

import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from analysis.figure import MUTED, PAPER, save
from analysis.load import MADE_BETTER, PlanResult, Result, TableInfo
from analysis.text import code_width, layers_and_roles, significant

_MAX_PLANS, _MAX_TABLES = 6, 4
_COLUMNS = 2  # of panels
_MAX_NAMED_COLUMNS = 10  # beyond, a cell is too narrow for a name; its colour says the code width
# Positions on viridis, which is even for every colour vision and in grey: few bits dark, many light; the common widths
# far apart.
_SHADES = {1: 0.0, 2: 0.08, 3: 0.36, 4: 0.6, 5: 0.72, 6: 0.81, 7: 0.88, 8: 0.94, 16: 1.0}
_UNKNOWN = "#c9ccd1"


def draw_allocation(result: Result, *outs: str | os.PathLike[str]) -> None:
    """Write the chosen scheme of every weight, a panel for each plan handed out, to each of `outs`, as .png or .svg.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: allocation_figure(result), *outs)


def draw_sensitivity(result: Result, *outs: str | os.PathLike[str]) -> None:
    """Write the sensitivity tables as heat maps to each of `outs`, as .png or .svg.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: sensitivity_figure(result), *outs)


def handed_out_plans(result: Result) -> list[PlanResult]:
    """The plans that budgets end with, plainly rounded, smallest first; if none, the mixed ones of the main method."""
    plans = [plan for plan in result.plans if plan.handed_out and plan.kind not in MADE_BETTER]
    plans = plans or [p for p in result.plans if p.kind == "mixed" and p.method == result.main_method]
    return sorted(plans, key=lambda plan: plan.bits_per_weight)


def allocation_figure(result: Result) -> Figure:
    """Layers by roles, coloured by code width; weights outside the layers lie across all columns."""
    plans = handed_out_plans(result)[:_MAX_PLANS] or list(result.plans[:1])
    grid = _Grid([weight.path for weight in result.weights])
    columns = min(_COLUMNS, len(plans))
    rows = -(-len(plans) // columns)
    figure = Figure(figsize=(5.2 * columns, rows * (1.6 + max(1.2, 0.27 * grid.num_rows))))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, plan in zip(panels, plans, strict=False):
        for weight in result.weights:
            _cell(ax, grid.place(weight.path), plan.choices[weight.path], named=len(grid.roles) <= _MAX_NAMED_COLUMNS)
        grid.dress(ax)
        ax.set_title(f"{plan.name}: {significant(plan.bits_per_weight)} bits per weight")
    for ax in panels[len(plans) :]:
        ax.set_visible(False)
    return figure


def sensitivity_figure(result: Result) -> Figure:
    """Predicted loss increase of every weight alone under every scheme, one panel a metric on one colour scale."""
    allocating_first = sorted(result.tables.items(), key=lambda item: (item[1] is not result.allocation_table, item[0]))
    tables = dict(allocating_first[:_MAX_TABLES])
    values = [np.array(table.loss_increase, float) for table in tables.values()]
    positive = np.concatenate([value[value > 0] for value in values]) if values else np.array([])
    if len(positive) == 0:
        figure = Figure(figsize=(6.0, 1.0))
        figure.text(0.5, 0.5, "no table has a loss increase above zero", ha="center", color=MUTED)
        return figure
    # The scale ends at the 2nd percentile: below, only noise would take half of the colours.
    norm = LogNorm(max(float(np.percentile(positive, 2)), 1e-6 * positive.max()), float(positive.max()))
    num_weights = max(len(table.weights) for table in tables.values())
    height = min(24.0, 1.9 + 0.165 * num_weights)
    figure = Figure(figsize=(2.9 + 2.3 * len(tables), height))
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    images = []
    for i, (ax, (name, table)) in enumerate(zip(panels, tables.items(), strict=True)):
        images.append(_heat_map(ax, table, norm, height))
        ax.set_title(name)
        if i > 0 and table.weights == next(iter(tables.values())).weights:
            ax.set_yticklabels([])
    bar = figure.colorbar(images[0], ax=list(panels), shrink=min(1.0, 4.0 / height), pad=0.02)
    bar.set_label(f"predicted loss increase ({result.task.nats})")
    bar.ax.yaxis.set_major_formatter(lambda y, _: significant(y, 1))
    note = "grey: not above zero;  dot: within 2 standard errors of zero"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=MUTED)
    return figure


def _heat_map(ax: Axes, table: TableInfo, norm: LogNorm, height: float) -> AxesImage:
    values = np.array(table.loss_increase, float)
    errors = np.array([[np.nan if e is None else e for e in row] for row in table.stderr], float)
    colors = matplotlib.colormaps["viridis"].with_extremes(bad=_UNKNOWN)
    shown = np.ma.masked_less_equal(values, 0)
    image = ax.imshow(shown, cmap=colors, norm=norm, aspect="auto", interpolation="none")
    unsure = np.argwhere((values > 0) & (values < 2 * errors))
    ax.plot(unsure[:, 1], unsure[:, 0], linestyle="none", marker=".", markersize=3, color=PAPER)
    ax.set_xticks(range(len(table.schemes)), table.schemes, rotation=45, ha="right", fontsize=8)
    step = -(-len(table.weights) * 9 // int(72 * (height - 1.9)))  # a label needs nine points of height
    rows, placed = range(0, len(table.weights), max(1, step)), layers_and_roles(table.weights)
    ax.set_yticks(rows, [" ".join(filter(None, placed[table.weights[row]])) for row in rows], fontsize=7)
    ax.grid(visible=False)
    return image


class _Grid:
    """Where each weight is drawn: a row for each layer, a column for each role, a whole row for all else."""

    def __init__(self, paths: Sequence[str]):
        placed = layers_and_roles(paths)
        layers = list(dict.fromkeys(layer for layer, _ in placed.values() if layer is not None))
        roles = list(dict.fromkeys(role for layer, role in placed.values() if layer is not None))
        seen_layer, before, after = False, [], []
        for path, (layer, _) in placed.items():
            seen_layer |= layer is not None
            if layer is None:
                (after if seen_layer else before).append(path)
        self.roles = roles or ["weight"]
        self._row = {path: i for i, path in enumerate(before)}
        self._row |= {path: len(before) + len(layers) + i for i, path in enumerate(after)}
        self._cell = {
            p: (len(before) + layers.index(n), roles.index(r)) for p, (n, r) in placed.items() if n is not None
        }
        self.row_names = [placed[p][1] for p in before] + layers + [placed[p][1] for p in after]

    @property
    def num_rows(self) -> int:
        return len(self.row_names)

    def place(self, path: str) -> tuple[int, int, int]:
        """(row, first column, width)."""
        if path in self._row:
            return self._row[path], 0, len(self.roles)
        return (*self._cell[path], 1)

    def dress(self, ax: Axes) -> None:
        """Limits, ticks and names."""
        ax.set_xlim(-0.5, len(self.roles) - 0.5)
        ax.set_ylim(self.num_rows - 0.5, -0.5)
        names = [role.replace(".", "\n", 1) for role in self.roles]
        if len(names) > _MAX_NAMED_COLUMNS:
            ax.set_xticks(range(len(names)), self.roles, fontsize=6.5, rotation=60, ha="right")
        else:
            ax.set_xticks(range(len(names)), names, fontsize=6.5 if len(names) > 5 else 8)
        ax.set_yticks(range(self.num_rows), self.row_names, fontsize=7.5)
        ax.set_ylabel("layer")
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)


def _cell(ax: Axes, place: tuple[int, int, int], scheme: str, *, named: bool) -> None:
    row, column, width = place
    bits = code_width(scheme)
    color = scheme_color(scheme)
    corner = (column - 0.5, row - 0.5)
    ax.add_patch(Rectangle(corner, width, 1, facecolor=color, edgecolor=PAPER, linewidth=1.2))
    if not named and width == 1:
        return
    # Weight of each channel in perceived lightness (Rec. 709), to write dark on light and light on dark.
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    text_color = "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 125 else "#fefefe"
    text = scheme if width > 1 else scheme.replace("_", "\n", 1) if bits == 0 else f"{bits}·{scheme.partition('_')[2]}"
    ax.text(column + (width - 1) / 2, row, text.rstrip("·"), ha="center", va="center", fontsize=6.5, color=text_color)


def scheme_color(scheme: str) -> str:
    """Colour of a scheme by its code width, `#rrggbb`; grey if the name does not tell."""
    bits = code_width(scheme)
    if bits == 0:
        return _UNKNOWN
    nearest = min(_SHADES, key=lambda width: abs(width - bits))
    return to_hex(matplotlib.colormaps["viridis"](_SHADES[nearest]))
