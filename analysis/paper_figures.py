"""The figures of the paper, at the width that they are printed in: each from result files, as one PDF."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis import weight_peers
from analysis.axes import DASHES, legend_entries
from analysis.bakeoff import mean_tau, overview
from analysis.figure import CORRECTED, DISTILLED, HEURISTIC, INK, MIXED, MUTED, PREDICTED, PROPAGATED, UNIFORM
from analysis.kernels import fastest, latest_parts
from analysis.load import Result as Run
from analysis.paper_sources import Json, Sources
from analysis.paper_tex import parse
from analysis.pareto import frontier_panel

WIDTH = 6.6
"""Inches: the text's width in `main.tex`, so that nothing is scaled there."""
SMALL = MappingProxyType(
    {
        "font.size": 8,
        "axes.labelsize": 8,
        "axes.titlesize": 8.5,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.fontsize": 7.5,
        "lines.linewidth": 1.3,
        "lines.markersize": 4.5,
    }
)
"""Settings over the style of the other pages, whose figures are printed wider."""


def frontier(sources: Sources) -> Figure:
    """The reference model's frontier and plans, and how far measured losses are from the sums over weights."""
    result = sources.run("quickstart")
    figure = Figure(figsize=(WIDTH, 2.9))
    left, right = figure.subplots(1, 2, width_ratios=(1.75, 1))
    drawn = [plan for plan in result.plans if 0 < plan.kl < 3 and plan.bits_per_weight < 6]
    frontier_panel(left, result, drawn, (2.15, 5.7), named=False)
    left.set_ylim(top=2.5)  # room for the first name
    left.set_ylabel("KL to the original, nats per token")
    looks = (("quickstart", PREDICTED, "o"), ("minilm_stsb", HEURISTIC, "s"), ("resnet20_cifar10", MIXED, "^"))
    for name, color, marker in looks:
        run = sources.run(name)
        right.plot(*_ratios(run), marker, color=color, mec="white", mew=0.4, label=run.model.name)
    right.axhline(1, color=INK, linewidth=0.8, linestyle=DASHES)
    right.set(xscale="log", yscale="log", xlabel="measured KL, nats per output", ylabel="measured over summed KL")
    right.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4, 6]))
    right.xaxis.set_major_locator(FixedLocator([1e-4, 1e-2, 1]))
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.set_minor_locator(NullLocator())
    right.legend(loc="center", bbox_to_anchor=(0.48, 0.52))
    figure.legend(*legend_entries(left), loc="outside lower center", ncols=4)
    return figure


def _ratios(run: Run) -> tuple[list[float], list[float]]:
    """Measured KL of the plans that the sums are of, and over these sums."""
    plans = [plan for plan in run.plans if plan.method == run.main_method and plan.kl > 0 and plan.predicted_kl]
    return [plan.kl for plan in plans], [plan.kl / (plan.predicted_kl or plan.kl) for plan in plans]


def metrics(sources: Sources) -> Figure:
    """Kendall's tau of every metric, a row each, before and after the correction; a panel a model, under GPTQ."""
    results = {name: result for name, result in sources.folder("bakeoff").items() if name.endswith("-gptq")}
    names = [row[0].strip("`") for row in parse(overview(list(results.values()))).rows if row[0].startswith("`")]
    figure = Figure(figsize=(WIDTH, 3.5))
    panels = figure.subplots(1, len(results), sharey=True)
    for ax, result in zip(panels, results.values(), strict=True):
        _taus(ax, result, names)
    panels[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _taus(ax: Axes, result: Json, names: Sequence[str]) -> None:
    pairs = [(mean_tau(result, name), mean_tau(result, name, "refitted")) for name in names]
    plain = [(tau, row) for row, (tau, _) in enumerate(pairs) if tau is not None]
    refitted = [(tau, row) for row, (_, tau) in enumerate(pairs) if tau is not None]
    ends = [(row, *pair) for row, pair in enumerate(pairs) if None not in pair]
    ax.hlines(*zip(*ends, strict=True), color=MUTED, linewidth=0.8, zorder=1)
    ax.plot(*zip(*plain, strict=True), "o", mfc="white", mec=MIXED, label="sum of the metric", zorder=2)
    ax.plot(*zip(*refitted, strict=True), "o", color=PREDICTED, label="corrected by measured plans", zorder=3)
    halves = sum(band["halves"] for band in result["bands"]) / len(result["bands"])
    ax.axvline(halves, color=INK, linewidth=0.8, linestyle=DASHES, label="halves of the test set", zorder=1)
    ax.set(xlim=(-0.2, 1.04), title=result["model"], xlabel="Kendall's tau")
    ax.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


_OURS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "uniform": (UNIFORM, "s", "one scheme, GPTQ"),
        "propagated": (PREDICTED, "o", "allocated, QEP"),
        "learned": (PROPAGATED, "v", "learned levels, QEP"),
        "learned_varied": (DISTILLED, "D", "and distilled"),
        "learned_written": (MIXED, "^", "and distilled on its own text"),
        "trellis": (CORRECTED, "P", "trellis, QEP"),
    }
)
"""Ingredients of ours in the figure: colour, marker, words."""


def peers(sources: Sources) -> Figure:
    """Excess loss over bits per weight: other tools' settings, and ours ingredient by ingredient, a panel a model."""
    figure = Figure(figsize=(WIDTH, 2.75))
    panels = figure.subplots(1, 2)
    files = sources.folder("weight_peers").values()
    results = weight_peers.merged(file for file in files if "peers" in file["record"]["config"])
    by_model = {result["record"]["config"]["model"]: result for result in results}
    for ax, model in zip(panels, ("reference", "tiny1m"), strict=True):
        rows = [row for row in by_model[model]["rows"] if "refused" not in row and row["bits_per_weight"]]
        theirs = [row for row in rows if row["by"] == "peer" and 2.2 < row["bits_per_weight"] < 5]
        for looks, chosen in _tools(theirs):
            ax.plot(*_points(chosen), linestyle="none", **looks)
        for name, (color, marker, words) in _OURS.items():
            points = _points([row for row in rows if row.get("ingredient") == name])
            if points[0]:
                ax.plot(*points, marker=marker, color=color, linewidth=1, mec="white", mew=0.4, label=words, zorder=4)
        ax.set_yscale("symlog", linthresh=0.01, linscale=0.6)
        ax.axhline(0, color=INK, linewidth=0.8)
        ticks = [0, 0.01, 0.03, 0.1, 0.3, 1, 3]
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.set(xlabel="bits per weight of the blocks", title=model, ylim=(-0.02, 7))
    panels[0].set_ylabel("rise of the loss, nats per token")
    entries = {text: handle for ax in panels for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    return figure


def _tools(rows: list[Json]) -> Iterator[tuple[dict[str, object], list[Json]]]:
    """Peers by tool: how they are drawn, and their rows."""
    auto = [row for row in rows if row["name"].startswith("AutoRound")]
    yield {"marker": "x", "color": INK, "mew": 1.4, "label": "AutoRound"}, auto
    others = [row for row in rows if not row["name"].startswith("AutoRound")]
    yield {"marker": ".", "color": MUTED, "label": "other tools"}, others


def _points(rows: list[Json]) -> tuple[list[float], list[float]]:
    ordered = sorted(rows, key=lambda row: row["bits_per_weight"])
    return [row["bits_per_weight"] for row in ordered], [row["test"]["excess"] for row in ordered]


_FORMATS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "w2a16_g128": (HEURISTIC, "v", "W2A16"),
        "w4a16_g128": (PREDICTED, "o", "W4A16"),
        "w8a16_channel": (MIXED, "s", "W8A16"),
        "w4a8_g128": (DISTILLED, "D", "W4A8"),
        "w8a8_channel": (INK, "^", "W8A8"),
    }
)
"""Formats of kernels in the figure: colour, marker, words."""


def kernels(sources: Sources) -> Figure:
    """How many times as fast as a dense dot, over tokens: kernels in C on a CPU, and those for Hopper on an H200."""
    figure = Figure(figsize=(WIDTH, 2.6))
    left, right = figure.subplots(1, 2, sharey=True)
    cpu = [row for row in sources.file("kernels/cpu")["rows"] if row["backend"] == "native"]
    cpu_points = {
        name: sorted((row["m"], row["speedup"]) for row in cpu if (row["format"], row["shape"]) == (name, "4096x4096"))
        for name in _FORMATS
    }
    _speedups(left, cpu_points, "CPU, two cores, 4096 × 4096")
    _speedups(right, h200_speedups(sources), "H200, 8192 × 57344")
    left.set_ylabel("times as fast as the dense dot")
    left.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def h200_speedups(sources: Sources, shape: str = "8192x57344") -> dict[str, list[tuple[int, float]]]:
    """Format -> tokens and how many times as fast as the dense dot of the run, by the latest run that has the case."""
    found: dict[tuple[str, int], float] = {}
    for row in fastest(sources.file("kernels/h200")).values():
        if row["shape"] == shape:
            found[row["format"], row["m"]] = row["speedup"]
    for case, (_, rows) in latest_parts(sources.file("kernels/h200_parts")).items():
        name, sizes, _ = case.split("-")
        tokens, _, of = sizes.partition("x")
        if of == shape:
            dense = next(row["sum"] for row in rows if row["config"] == "dense")
            found[name, int(tokens)] = dense / min(row["sum"] for row in rows if row["config"] != "dense")
    return {name: sorted((m, ratio) for (of, m), ratio in found.items() if of == name) for name in _FORMATS}


def _speedups(ax: Axes, points: Mapping[str, list[tuple[int, float]]], title: str) -> None:
    for name, (color, marker, words) in _FORMATS.items():
        if points[name]:
            ax.plot(*zip(*points[name], strict=True), marker=marker, color=color, mec="white", mew=0.4, label=words)
    ax.axhline(1, color=INK, linewidth=0.8, linestyle=DASHES)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted({m for values in points.values() for m, _ in values})))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set(xlabel="tokens", title=title)


FIGURES: Mapping[str, Callable[[Sources], Figure]] = MappingProxyType(
    {"frontier": frontier, "metrics": metrics, "peers": peers, "kernels": kernels}
)
"""File name without suffix -> what draws it."""
