"""Measured plans: perplexity over size, and how well the loss was predicted."""

import math
import os

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.axes import (
    DASHES,
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
from analysis.figure import INK, MIXED, MUTED, UNIFORM, Label, place_labels, save
from analysis.load import Result
from analysis.text import significant


def draw_perplexity(result: Result, *outs: str | os.PathLike[str]) -> None:
    """Write perplexity over size to each of `outs`, as .png or .svg.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: perplexity_figure(result), *outs)


def draw_agreement(result: Result, *outs: str | os.PathLike[str]) -> None:
    """Write predicted over measured KL to each of `outs`, as .png or .svg.

    Raises:
      MpqError: a suffix is another one, or a file cannot be written.
    """
    save(lambda: agreement_figure(result), *outs)


def perplexity_figure(result: Result) -> Figure:
    """Perplexity on the test set over bits per weight, and the original's.

    The axis ends above the main method's plans; what another method loses beyond is written, not drawn.
    """
    figure = Figure(figsize=(8.0, 4.4))
    ax = figure.add_subplot()
    height = lambda plan: math.inf if plan.perplexity is None else plan.perplexity
    finite = [plan for plan in result.plans if height(plan) < math.inf]
    top = 1.2 * max((height(plan) for plan in finite if plan.method == result.main_method), default=math.inf)
    drawn = [plan for plan in finite if height(plan) <= top]
    limits = bpw_range([plan.bits_per_weight for plan in result.plans])
    size_axes(ax, limits, result.model.weights, beside_bytes(result))
    ax.set_yscale("log")
    draw_plans(ax, result, drawn, height, None)
    original = result.reference.perplexity if result.reference else None
    if original is not None:
        ax.axhline(original, color=INK, linewidth=1, linestyle=DASHES, label="original", zorder=1)
    ax.yaxis.set_major_locator(FixedLocator(round_ticks(*ax.get_ylim())))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.set_ylabel("perplexity on the test set")
    ax.set_title(f"{result.model.name}: perplexity", pad=12)
    ax.legend(*legend_entries(ax), loc="upper right")
    if beyond := [plan for plan in result.plans if plan not in drawn]:
        names = (f"{plan.name} {plan.method.upper()} ({significant(plan.perplexity)})" for plan in beyond)
        note = f"above: {', '.join(names)}"
        ax.text(0.5, 0.97, note, transform=ax.transAxes, ha="center", va="top", fontsize=8, color=MUTED)
    points = [(plan.bits_per_weight, height(plan)) for plan in drawn]
    place_labels(ax, plan_labels(result, drawn, height, mixed=True), points)
    return figure


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
    for kind, color, marker in (("mixed", MIXED, "o"), ("uniform", UNIFORM, "s")):
        plans = [plan for plan in drawn if plan.kind == kind]
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
    ax.set_xlabel("measured KL (nats per token)")
    ax.set_ylabel(f"predicted KL, by {result.frontier.metric}")
    ax.set_title("Predicted and measured", pad=10)
    ax.legend(*legend_entries(ax), loc="upper left")
    points = [(plan.kl, plan.predicted_kl or 0.0) for plan in drawn]
    labels = [Label(p.kl, p.predicted_kl or 0.0, p.scheme or budget_of(p), color_of(p)) for p in drawn]
    place_labels(ax, labels, points)
    return figure
