"""`python -m analysis.kernels`: the table and the roofline of the kernels on an H200, from their committed results."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.figure import HEURISTIC, INK, MIXED, MUTED, PREDICTED, PROPAGATED, save
from mpq.files import read_json, write_text

FOLDER = Path("experiments/results/kernels")
Result = Mapping[str, Any]

LOOKS = {
    "w4a16": ("o", PREDICTED, "4-bit weights"),
    "w8a16": ("s", MIXED, "8-bit weights"),
    "w2a16": ("v", HEURISTIC, "2-bit weights"),
    "nf4a16": ("D", PROPAGATED, "NF4"),
    "w4a8": ("P", MUTED, "4-bit weights, int8 activations"),
    "w8a8": ("X", INK, "8-bit weights, int8 activations"),
}
"""Format without its groups -> marker, colour, and words."""

DENSE, CUBLAS = "dense_bfloat16", "torch_mm_bfloat16"


def fastest(result: Result) -> dict[str, Result]:
    """Case -> the row of the fastest backend that has a packed weight."""
    found: dict[str, Result] = {}
    for row in result["rows"]:
        if row["backend"] != DENSE and (row["case"] not in found or row["p50"] < found[row["case"]]["p50"]):
            found[row["case"]] = row
    return found


def table(result: Result, peers: Result) -> str:
    """A row a format and number of tokens, a column a shape: time, ratios to two dense dots, % of the roofline."""
    rows = fastest(result)
    cublas = {(row["shape"], row["m"]): row.get("us") for row in peers["rows"] if row["peer"] == CUBLAS}
    shapes = list(dict.fromkeys(row["shape"] for row in rows.values()))
    lines = ["| format | tokens | " + " | ".join(shapes) + " |", "|---|---:|" + "---:|" * len(shapes)]
    kinds = sorted({(row["format"], row["m"]) for row in rows.values()}, key=lambda kind: (kind[0][::-1], kind[1]))
    for name, m in kinds:
        cells = []
        for shape in shapes:
            row = next((r for r in rows.values() if (r["format"], r["m"], r["shape"]) == (name, m, shape)), None)
            cells.append("" if row is None else _cell(row, cublas.get((shape, m))))
        lines.append(f"| {name} | {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Result, cublas: float | None) -> str:
    ratio = "–" if cublas is None else f"{cublas / row['p50']:.2f}"
    mark = "*" if row["backend"] == "dense" else ""
    return f"{row['p50']:g}{mark}; {row['speedup']:.2f}, {ratio}; {row['roofline_percent']:.0f} %"


def latest_parts(parts: Result) -> dict[str, tuple[str, list[Result]]]:
    """Case -> commit and rows of the latest run that has it; `holds` says of which cases an earlier one still holds."""
    found: dict[str, tuple[str, list[Result]]] = {}
    for run in (parts, *parts["earlier"]):
        cases = dict.fromkeys(row["case"] for row in run["rows"] if re.search(run.get("holds", ""), row["case"]))
        for case in (case for case in cases if case not in found):
            found[case] = run["commit"], [row for row in run["rows"] if row["case"] == case]
    return found


def parts_table(parts: Result) -> str:
    """A row a case: its fastest config, times, how many times as fast that is as the dense dot, and every kernel."""
    lines = ["| case | config | us | x dense | kernels of a call, us | commit |", "|---|---|---:|---:|---|---|"]
    for case, (commit, rows) in sorted(latest_parts(parts).items(), key=lambda item: _by_format(item[0])):
        dense = next(row["sum"] for row in rows if row["config"] == "dense")
        best = min((row for row in rows if row["config"] != "dense"), key=lambda row: row["sum"])
        kernels = ", ".join(f"{name.split(':')[1]} {micro:g}" for name, micro in best["kernels"].items())
        found = f"{best['config']} | {best['sum']:g} | {dense / best['sum']:.2f} | {kernels} | {commit}"
        lines.append(f"| {case.removesuffix('-bfloat16')} | {found} |")
    return "\n".join(lines)


def _by_format(case: str) -> tuple[str, list[int]]:
    """As the other table: formats, then tokens and shapes."""
    name, sizes, _ = case.split("-")
    return name[::-1], [int(size) for size in sizes.split("x")]


def page(result: Result, peers: Result, parts: Result) -> str:
    """The page beside the results."""
    here, limits = result["environment"], result["ceilings"]
    rates = ", ".join(f"{2e-12 * limits['macs_per_s'][kind]:.0f} of {kind}" for kind in ("bfloat16", "int8"))
    texts = [
        "# Packed matmuls on an H200",
        f"Written by `python -m analysis.kernels` from `h200.json` and `h200_peers.json`: {here['device']}, JAX "
        f"{here['jax']}, commit {result['options']['commit']}; PyTorch {peers['environment']['torch']}.",
        "A cell is: microseconds of all kernels of a call, those that pad or round activations and add sums included; "
        "how many times as fast that is as XLA's bfloat16 dot in the same run, and as cuBLAS's in PyTorch in another; "
        "percent of the roofline of the ceilings measured in the same run. Shapes are rows x columns. Weights are in "
        "no cache. `*`: unpacked, then a library's dot. "
        f"Ceilings: {limits['bytes_per_s'] / 1e12:.2f} TB/s read, {rates} TFLOP/s.",
        table(result, peers),
        "![Roofline](h200.png)",
        "## Since then",
        f"From `h200_parts.json`: {parts['environment']['device']}, JAX {parts['environment']['jax']}, the latest run "
        "that has a case. The dense dot is of the same run. "
        f"{parts['conformance']['forms']} forms of the kernel equalled the contract there, bit for bit on integers. A "
        "case is format, then experts if there are any, tokens, rows and columns.",
        parts_table(parts),
    ]
    return "\n\n".join(texts) + "\n"


def roofline_figure(result: Result) -> Figure:
    """Multiply-accumulates a second over those a byte, and what the ceilings allow."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    limits = result["ceilings"]
    bandwidth = limits["bytes_per_s"]
    across = np.geomspace(0.7, 4000, 200)
    for kind, line in (("bfloat16", "-"), ("int8", "--")):
        axes.plot(across, 2e-12 * np.minimum(bandwidth * across, limits["macs_per_s"][kind]), line, color=INK, lw=1)
        axes.text(3900, 2.15e-12 * limits["macs_per_s"][kind], kind, ha="right", va="bottom", color=INK, fontsize=8)
    for name, (marker, colour, words) in LOOKS.items():
        points = [_point(row) for row in fastest(result).values() if row["format"].split("_")[0] == name]
        axes.plot(*np.array(points).T, marker, color=colour, ms=5, mec="white", mew=0.4, label=words)
    axes.set(xscale="log", yscale="log", xlim=(0.7, 4000), ylim=(1.5, 2600))
    axes.set(xlabel="multiply-accumulates per byte that must move", ylabel="TFLOP/s")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _point(row: Result) -> tuple[float, float]:
    k, n = map(int, row["shape"].split("x")[-2:])
    macs = row["m"] * k * n
    seconds = 1e-6 * row["p50"]
    return macs / (1e9 * row["gb_per_s"] * seconds), 2e-12 * macs / seconds


def load(root: Path) -> tuple[Result, Result, Result]:
    """The committed results: of the kernels, of PyTorch, and of single kernels of calls."""
    names: Sequence[str] = ("h200.json", "h200_peers.json", "h200_parts.json")
    kernels, peers, parts = (read_json(root / FOLDER / name, "results of a benchmark") for name in names)
    return kernels, peers, parts


def main(root: Path) -> int:
    """Write `h200.md` and `h200.png` beside the results under `root`; returns the exit code."""
    result, peers, parts = load(root)
    write_text(root / FOLDER / "h200.md", page(result, peers, parts))
    save(lambda: roofline_figure(result), root / FOLDER / "h200.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
