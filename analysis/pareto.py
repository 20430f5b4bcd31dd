"""The accuracy-size Pareto curve: what a bit per weight buys, predicted and measured, against uniform schemes."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.axes import (
    DASHES,
    beside_bytes,
    bpw_range,
    draw_plans,
    kl_ticks,
    legend_entries,
    marks,
    plan_labels,
    size_axes,
)
from analysis.figure import MIXED, MUTED, PREDICTED, Label, place_labels, save
from analysis.load import PlanResult, Result
from analysis.text import megabytes, significant, thin

_MAX_POINTS = 400  # of the frontier: more cannot be told apart at the printed size


def draw_frontier(result: Result, *outs: str | os.PathLike[str]) -> None:
    """Write the accuracy-size Pareto curve to each of `outs`, as .png or .svg.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: frontier_figure(result), *outs)


def draw_prediction(
    bits_per_weight: Sequence[float],
    predicted_kl: Sequence[float],
    plan: Mapping[str, Any],
    *outs: str | os.PathLike[str],
    unit: str = "token",
) -> None:
    """Write a predicted frontier, with the plan that was chosen on it, to each of `outs`, as .png or .svg.

    Args:
      bits_per_weight: of every point of the frontier, ascending.
      predicted_kl: nats per `unit`.
      plan: content of a plan file: `name`, `bits_per_weight`, `predicted_kl`, `size_bytes`, `num_weights`.
      *outs: where to.
      unit: what one output of the model is about.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: prediction_figure(bits_per_weight, predicted_kl, plan, unit), *outs)


def frontier_figure(result: Result) -> Figure:
    """KL to the original over bits per weight: predicted frontier, measured plans, uniform baselines.

    The left panel has the whole range, the right one the sizes around the mixed plans, where the question is decided.
    """
    drawn = [plan for plan in result.plans if plan.kl > 0]
    whole = bpw_range([plan.bits_per_weight for plan in drawn] or result.frontier.bits_per_weight)
    near = bpw_range([plan.bits_per_weight for plan in drawn if plan.kind == "mixed"] or whole)
    zoom = math.log(near[1] / near[0]) < 0.75 * math.log(whole[1] / whole[0])
    figure = Figure(figsize=(10.5, 5.4) if zoom else (8.0, 5.4))
    panels = figure.subplots(1, 1 + zoom, squeeze=False)[0]
    for ax, limits in zip(panels, (whole, near), strict=False):
        frontier_panel(ax, result, drawn, limits, named=ax is panels[-1])
    panels[0].set_ylabel(f"KL to the original ({result.task.nats})")
    panels[0].set_title("whole range" if zoom else "", pad=8)
    if zoom:
        panels[1].set_title("around the mixed plans", pad=8)
    undrawn = sorted({plan.name for plan in result.plans if plan.kl <= 0})
    lines = [f"original: {megabytes(result.model.reference_size_bytes)} at KL 0, below any log axis"]
    lines += [f"not above 0 either: {', '.join(undrawn)}"] if undrawn else []
    band = "" if result.frontier.best_stderr is None else " and band"
    corrected = ", corrected by plans of the selection set" if result.frontier.corrected_kl else ""
    lines += [f"predicted by {result.frontier.metric}{corrected}", f"bars{band}: ± 2 standard errors"]
    lines += ["dashes: best uniform scheme that fits"]
    panels[0].text(
        0.02, 0.02, "\n".join(lines), transform=panels[0].transAxes, fontsize=8, color=MUTED, linespacing=1.5
    )
    figure.legend(*legend_entries(panels[0]), loc="outside lower center", ncols=5)
    figure.suptitle(f"{result.model.name}: what a bit per weight buys", x=0.01, ha="left", fontweight="bold")
    return figure


def frontier_panel(
    ax: Axes, result: Result, drawn: Sequence[PlanResult], limits: tuple[float, float], *, named: bool
) -> None:
    """One panel over the bits per weight in `limits`; with the names of mixed plans, too, if `named`."""
    size_axes(ax, limits, result.model.weights, beside_bytes(result))
    ax.set_yscale("log")
    frontier = result.frontier
    line = _draw_line(ax, frontier.bits_per_weight, frontier.best_kl, frontier.best_stderr)
    if frontier.corrected_kl:
        kept = _drawn_points(frontier.bits_per_weight, frontier.predicted_kl)
        x, y = ([column[i] for i in kept] for column in (frontier.bits_per_weight, frontier.predicted_kl))
        ax.plot(x, y, color=PREDICTED, linewidth=0.8, linestyle=DASHES, label="sum over weights", zorder=1)
    draw_plans(ax, result, drawn, lambda plan: plan.kl, lambda plan: 2 * (plan.kl_stderr or 0.0))
    inside = [(plan.bits_per_weight, plan.kl) for plan in drawn if limits[0] <= plan.bits_per_weight <= limits[1]]
    floor = 0.5 * min((y for _, y in inside), default=0.0)  # the frontier goes on to zero: no reason to follow it
    if heights := [y for _, y in (*inside, *line) if y >= floor]:
        margin = (max(heights) / min(heights)) ** 0.08
        ax.set_ylim(min(heights) / margin / 1.15, max(heights) * margin * 1.15)
    kl_ticks(ax)
    shown = [plan for plan in drawn if limits[0] <= plan.bits_per_weight <= limits[1]]
    place_labels(ax, plan_labels(result, shown, lambda plan: plan.kl, mixed=named), inside, line)


def prediction_figure(
    bits_per_weight: Sequence[float], predicted_kl: Sequence[float], plan: Mapping[str, Any], unit: str
) -> Figure:
    """A predicted frontier and one plan on it; see `draw_prediction`."""
    figure = Figure(figsize=(8.0, 4.8))
    ax = figure.add_subplot()
    positive = [x for x, y in zip(bits_per_weight, predicted_kl, strict=True) if y > 0]
    x, y = plan["bits_per_weight"], plan["predicted_kl"]
    beside = plan["size_bytes"] - plan["num_weights"] / 8 * x
    size_axes(ax, bpw_range([*positive, x]), plan["num_weights"], beside)
    ax.set_yscale("log")
    line = _draw_line(ax, bits_per_weight, predicted_kl, None)
    if y > 0:
        ax.errorbar([x], [y], label=f"{plan['name']}: {megabytes(plan['size_bytes'])}", **marks(MIXED, "o", MIXED))
    kl_ticks(ax)
    ax.set_ylabel(f"predicted KL (nats per {unit})")
    ax.set_title("The predicted frontier", pad=12)
    ax.legend(*legend_entries(ax), loc="upper right")
    if y > 0:
        text = f"{significant(x)} bits per weight, {significant(y)} nats"
        place_labels(ax, [Label(x, y, text, MIXED)], [(x, y)], line)
    return figure


def _draw_line(
    ax: Axes,
    bits_per_weight: Sequence[float],
    predicted_kl: Sequence[float],
    stderr: Sequence[float | None] | None,
) -> list[tuple[float, float]]:
    """The predicted frontier and its band; returns the vertices inside the axes."""
    kept = _drawn_points(bits_per_weight, predicted_kl)
    x = np.array([bits_per_weight[i] for i in kept])
    y = np.array([predicted_kl[i] for i in kept])
    ax.plot(x, y, color=PREDICTED, label="predicted frontier", zorder=2)
    if stderr is not None:
        error = np.array([2 * (stderr[i] or 0.0) for i in kept])
        low = np.maximum(y - error, 1e-3 * y)  # a log axis has no zero
        ax.fill_between(x, low, y + error, color=PREDICTED, alpha=0.18, linewidth=0, zorder=1)
    left, right = ax.get_xlim()
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True) if left <= a <= right]


def _drawn_points(bits_per_weight: Sequence[float], kl: Sequence[float]) -> list[int]:
    """Numbers of the points that a line goes through: not more than can be told apart, and above 0."""
    return [i for i in thin(bits_per_weight, _MAX_POINTS) if kl[i] > 0]
