"""Size on one axis and plans as points: what the figures of measured plans share."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.figure import CORRECTED, DISTILLED, HEURISTIC, MIXED, PAPER, PROPAGATED, UNIFORM, Label
from analysis.load import MADE_BETTER, PlanResult, Result
from analysis.text import significant

_MAX_TICKS = 8
_MANTISSAS = ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 4, 6, 8), (1, 2, 4), (1, 3), (1,))
DASHES = (0, (4, 3))
KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "mixed": (MIXED, "o"),
        "uniform": (UNIFORM, "s"),
        "heuristic": (HEURISTIC, "^"),
        "propagated": (PROPAGATED, "v"),
        "corrected": (CORRECTED, "P"),
        "distilled": (DISTILLED, "D"),
    }
)
"""Kind of a plan -> colour and marker."""


def bpw_range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that shows all of `values`, with a margin."""
    return 0.93 * min(values), 1.09 * max(values)


def size_axes(ax: Axes, limits: tuple[float, float], num_weights: int, beside_bytes: float) -> None:
    """Bits per weight below on a log scale, megabytes of the whole model above.

    Args:
      ax: where.
      limits: ends of the axis, bits per weight.
      num_weights: quantized values of the model.
      beside_bytes: size of everything that is not quantized.
    """
    ax.set_xscale("log")
    ax.set_xlim(*limits)

    def to_megabytes(bpw: Any) -> Any:
        return (num_weights / 8 * bpw + beside_bytes) / 1e6

    def to_bits(size: Any) -> Any:
        return (1e6 * size - beside_bytes) * 8 / num_weights

    top = ax.secondary_xaxis("top", functions=(to_megabytes, to_bits))
    for axis, ends in ((ax.xaxis, limits), (top.xaxis, tuple(map(to_megabytes, limits)))):
        axis.set_major_locator(FixedLocator(round_ticks(*ends)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("bits per weight, scales and padding counted")
    top.set_xlabel("size of the whole model (MB)")


def beside_bytes(result: Result) -> float:
    """Size of everything that is not quantized."""
    frontier = result.frontier
    return frontier.size_bytes[0] - result.model.weights / 8 * frontier.bits_per_weight[0]


def kl_ticks(ax: Axes) -> None:
    """Plain numbers on a log axis; also between the decades where there are few of them."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: significant(y, 1)))
    if high < 1000 * low:
        mantissas = (1, 2, 3, 5) if high < 50 * low else (1, 3)
        ticks = [m * 10.0**e for e in range(-12, 3) for m in mantissas]
        ax.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda _y, _: ""))


def draw_plans(
    ax: Axes,
    result: Result,
    plans: Sequence[PlanResult],
    value: Callable[[PlanResult], float],
    error: Callable[[PlanResult], float] | None,
    *,
    rising: bool = False,
) -> None:
    """One series for each kind and method; the method that is handed out, and better made, are filled, others hollow.

    Args:
      ax: where.
      result: tells which method is handed out.
      plans: to draw.
      value: height of a plan.
      error: length of a plan's bar to either side, on a log axis; None: no bars.
      rising: higher is better.
    """
    methods = sorted({plan.method for plan in plans}, key=lambda method: (method != result.main_method, method))
    for kind, (color, marker) in KINDS.items():
        for method in methods:
            chosen = [plan for plan in plans if (plan.kind, plan.method) == (kind, method)]
            if not chosen:
                continue
            chosen.sort(key=lambda plan: plan.bits_per_weight)
            x, y = [plan.bits_per_weight for plan in chosen], [value(plan) for plan in chosen]
            better = kind in MADE_BETTER
            _connect(ax, x, y, kind, main=method == result.main_method, rising=rising)
            ax.errorbar(
                x,
                y,
                yerr=None if error is None else bars(y, [error(plan) for plan in chosen]),
                label=kind if better else f"{kind}, {method.upper()}",
                **marks(color, marker, color if method == result.main_method or better else PAPER),
            )


def _connect(ax: Axes, x: Sequence[float], y: Sequence[float], kind: str, *, main: bool, rising: bool) -> None:
    """A thin line through mixed plans; the steps of the best scheme that fits for uniform ones: none lies between."""
    if kind == "mixed":
        ax.plot(x, y, color=MIXED, linewidth=0.9, alpha=0.6, zorder=2)
    elif kind == "uniform" and main:
        best = (np.maximum if rising else np.minimum).accumulate(y)
        ax.plot(x, best, color=UNIFORM, linewidth=0.9, alpha=0.7, linestyle=DASHES, drawstyle="steps-post", zorder=2)


def legend_entries(ax: Axes) -> tuple[list[Any], list[str]]:
    """Handles and names for a legend, each name once; of error bars only the marker."""
    entries: dict[str, Any] = {}
    for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
        entries.setdefault(name, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
    return list(entries.values()), list(entries)


def marks(color: str, marker: str, face: str) -> dict[str, Any]:
    """How `errorbar` draws a series; a face in the colour of the paper is hollow."""
    return {
        "linestyle": "none",
        "color": color,
        "marker": marker,
        "markerfacecolor": face,
        "markeredgewidth": 1.4,
        "elinewidth": 1.2,
        "zorder": 3 if face == PAPER else 4,
    }


def bars(values: Sequence[float], errors: Sequence[float]) -> np.ndarray:
    """Lower and upper lengths; the lower one stays above zero, which a log axis does not have."""
    lower = [min(error, 0.999 * value) for value, error in zip(values, errors, strict=True)]
    return np.array([lower, list(errors)])


def plan_labels(
    result: Result, plans: Sequence[PlanResult], value: Callable[[PlanResult], float], *, mixed: bool
) -> list[Label]:
    """Names beside the points of the main method: schemes, and budgets unless they are the size of a scheme drawn."""
    schemes = {plan.scheme for plan in plans}
    named = [plan for plan in plans if plan.method == result.main_method]
    return [
        Label(plan.bits_per_weight, value(plan), plan.scheme or budget_of(plan), color_of(plan))
        for plan in named
        if plan.kind == "uniform" or (mixed and plan.kind == "mixed" and budget_of(plan) not in schemes)
    ]


def budget_of(plan: PlanResult) -> str:
    """The budget in the name of a mixed plan."""
    return plan.name.removeprefix("mixed@")


def color_of(plan: PlanResult) -> str:
    """Colour of a plan's kind."""
    return KINDS[plan.kind][0]


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a log axis, as close together as `_MAX_TICKS` allows."""
    exponents = range(math.floor(math.log10(low)) - 2, math.ceil(math.log10(high)) + 1)
    # Within a factor of four equal steps look even on a log axis, too; beyond it steps must grow.
    if high < 4 * low:
        for step in sorted(m * 10.0**e for e in exponents for m in (1, 2, 2.5, 5)):
            first, last = math.ceil(low / step), math.floor(high / step)
            if last - first < _MAX_TICKS:
                return [i * step for i in range(first, last + 1)]
    inside: list[float] = []
    for mantissas in _MANTISSAS:
        inside = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(inside) <= _MAX_TICKS:
            break
    return inside[:: 1 + (len(inside) - 1) // _MAX_TICKS]
