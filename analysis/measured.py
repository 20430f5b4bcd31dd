"""Measured plans: quality over size, and how well the loss was predicted."""

import math
import os
import textwrap
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.axes import (
    DASHES,
    KINDS,
    bars,
    beside_bytes,
    bpw_range,
    budget_of,
    color_of,
    draw_plans,
    legend_entries,
    marks,
    plan_labels,
    round_ticks,
    size_axes,
)
from analysis.figure import INK, MUTED, Label, place_labels, save
from analysis.load import PlanResult, Result
from analysis.measures import QUALITIES
from analysis.text import MINUS, significant


def draw_quality(result: Result, *outs: str | os.PathLike[str]) -> None:
    """Write the task's quality over size to each of `outs`, as .png or .svg.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: quality_figure(result), *outs)


def draw_agreement(result: Result, *outs: str | os.PathLike[str]) -> None:
    """Write predicted over measured KL to each of `outs`, as .png or .svg.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: agreement_figure(result), *outs)


def quality_figure(result: Result) -> Figure:
    """The task's quality on the test set over bits per weight, and the original's; see `Measure` for the axis.

    The axis ends beyond the main method's plans; what another method loses further is written, not drawn. A linear axis
    also ends where the mixed plans would have less than a quarter of it.
    """
    measure = QUALITIES[result.task.quality]
    rising = measure.higher_is_better
    worst = -math.inf if rising else math.inf
    height = lambda plan: worst if plan.quality is None else measure.scale * plan.quality
    reference = result.reference
    original = None if reference is None or reference.quality is None else measure.scale * reference.quality
    error = 2 * measure.scale * (reference.quality_stderr or 0.0) if reference and rising else 0.0
    end = _lower_end(result, height, original, error) if rising else _upper_end(result, height)
    drawn = [p for p in result.plans if height(p) != worst and (height(p) >= end if rising else height(p) <= end)]
    figure = Figure(figsize=(8.0, 4.4))
    ax = figure.add_subplot()
    limits = bpw_range([plan.bits_per_weight for plan in result.plans])
    size_axes(ax, limits, result.model.weights, beside_bytes(result))
    log = not rising and all(y > 0 for y in (*map(height, drawn), original) if y is not None)
    if log:
        ax.set_yscale("log")
    draw_plans(ax, result, drawn, height, None, rising=rising)
    if original is not None:
        ax.axhline(original, color=INK, linewidth=1, linestyle=DASHES, label="original", zorder=1)
    _quality_axis(ax, log=log)
    if original is not None and error > 0:
        label = "± 2 standard errors"
        ax.axhspan(original - error, original + error, color=INK, alpha=0.07, linewidth=0, label=label, zorder=0)
    ax.set_ylabel(f"{measure.title} on the test set" + " (%)" * measure.percent)
    ax.set_title(f"{result.model.name}: {measure.title}", pad=12)
    ax.legend(*legend_entries(ax), loc="lower right" if rising else "upper right")
    if beyond := [plan for plan in result.plans if plan not in drawn]:
        _write_beyond(ax, beyond, height, rising=rising)
    points = [(plan.bits_per_weight, height(plan)) for plan in drawn]
    place_labels(ax, plan_labels(result, drawn, height, mixed=True), points, rising=rising)
    return figure


def _upper_end(result: Result, height: Callable[[PlanResult], float]) -> float:
    """Above all finite heights of the main method."""
    finite = [height(p) for p in result.plans if p.method == result.main_method and height(p) < math.inf]
    return 1.2 * max(finite, default=math.inf)


def _lower_end(result: Result, height: Callable[[PlanResult], float], original: float | None, error: float) -> float:
    """Below all finite heights of the main method, but not so far that the mixed plans lie in one corner."""
    main = [p for p in result.plans if p.method == result.main_method and height(p) > -math.inf]
    if not main:
        return -math.inf
    lowest, best = min(map(height, main)), max(*map(height, main), original if original is not None else -math.inf)
    mixed = min((height(p) for p in main if p.kind == "mixed"), default=lowest)
    return max(lowest - 0.1 * (best - lowest), mixed - 3 * max(best - mixed, error))


def _quality_axis(ax: Axes, *, log: bool) -> None:
    """Final limits of the plans and the original, and round numbers."""
    if log:
        ax.yaxis.set_major_locator(FixedLocator(round_ticks(*ax.get_ylim())))
    else:
        ax.margins(y=0.1)  # room for a name beside the highest and the lowest point
        ax.set_ylim(ax.get_ylim())
        ax.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("-", MINUS)))


def _write_beyond(
    ax: Axes, plans: Sequence[PlanResult], height: Callable[[PlanResult], float], *, rising: bool
) -> None:
    """Names and numbers of plans that the axis does not reach: above the plot, or below its axis."""
    names = (f"{plan.name} {plan.method.upper()} ({significant(height(plan))})" for plan in plans)
    note = textwrap.fill(f"{'below' if rising else 'above'}: {', '.join(names)}", 100)
    y = -0.19 if rising else 0.97
    ax.text(0.5, y, note, transform=ax.transAxes, ha="center", va="top", fontsize=8, color=MUTED)


def agreement_figure(result: Result) -> Figure:
    """Predicted over measured KL of the plans under the main method, whose errors the prediction is of.

    On the diagonal the prediction is right; above it the sum over weights overstates the loss, below it understates it.
    """
    figure = Figure(figsize=(5.6, 5.2))
    ax = figure.add_subplot()
    method = result.main_method
    drawn = [plan for plan in result.plans if plan.method == method and plan.kl > 0 and (plan.predicted_kl or 0) > 0]
    ax.set_xscale("log")
    ax.set_yscale("log")
    for kind, (color, marker) in KINDS.items():
        plans = [plan for plan in drawn if plan.kind == kind]
        if not plans:
            continue
        measured, predicted = [plan.kl for plan in plans], [plan.predicted_kl or 0.0 for plan in plans]
        ax.errorbar(
            measured,
            predicted,
            xerr=bars(measured, [2 * (plan.kl_stderr or 0.0) for plan in plans]),
            yerr=bars(predicted, [2 * (plan.predicted_stderr or 0.0) for plan in plans]),
            label=f"{kind}, {method.upper()}",
            **marks(color, marker, color),
        )
    if drawn:
        ends = [value for plan in drawn for value in (plan.kl, plan.predicted_kl or plan.kl)]
        low, high = 0.6 * min(ends), 1.7 * max(ends)
        ax.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=DASHES, zorder=1)
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda y, _: significant(y, 1)))
        axis.set_minor_formatter(FuncFormatter(lambda _x, _: ""))
    ax.set_xlabel(f"measured KL ({result.task.nats})")
    ax.set_ylabel(f"predicted KL, by {result.frontier.metric}")
    ax.set_title("Predicted and measured", pad=10)
    ax.legend(*legend_entries(ax), loc="upper left")
    points = [(plan.kl, plan.predicted_kl or 0.0) for plan in drawn]
    named = [plan for plan in drawn if plan.kind != "heuristic"]
    labels = [Label(p.kl, p.predicted_kl or 0.0, p.scheme or budget_of(p), color_of(p)) for p in named]
    place_labels(ax, labels, points)
    return figure
