"""`python -m analysis.bakeoff`: the table of `experiments/bakeoff.py`, joined from its committed results.

Rows are metrics, best first by Kendall's tau over all bands. Cost is in forward passes over the calibration set.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.text import significant
from mpq.files import read_json, write_text

FOLDER = Path("experiments/results/bakeoff")


def table(result: Mapping[str, Any]) -> str:
    """One model under one rounding algorithm, as Markdown."""
    bands = result["bands"]
    heads = [f"{low}-{high} bits" for low, high in (band["bits"] for band in bands)]
    lines = [
        "| metric | cost | " + " | ".join(f"{head}: tau | ratio | calibrated R² | ratio" for head in heads) + " |",
        "|---|---:|" + "---:|" * (4 * len(bands)),
    ]
    for name in sorted(result["cost"], key=lambda name: -_tau(result, name)):
        rows = result["metric_rows"].get(name)
        cells = [f"`{name}`" + (f" ({rows} rows)" if rows else ""), significant(result["cost"][name])]
        for band in bands:
            entry = band["metrics"][name]
            calibrated = entry.get("calibrated", {})
            cells += [
                f"{entry['tau']:.3f}",
                *(
                    _number(part.get(key))
                    for part, key in ((entry, "ratio"), (calibrated, "r2"), (calibrated, "ratio"))
                ),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    ceiling = ["*measured on the calibration set*", ""]
    for band in bands:
        entry = band["ceiling"]
        ceiling += [f"{entry['tau']:.3f}", _number(entry["ratio"]), _number(entry["r2"]), ""]
    lines.append("| " + " | ".join(ceiling) + " |")
    halves = [cell for band in bands for cell in (f"{band['halves']:.3f}", "", "", "")]
    lines.append("| " + " | ".join(["*half of the test set by the other*", "", *halves]) + " |")
    return "\n".join(lines)


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """All of them, with a heading and the median loss of the plans each."""
    parts = [
        "# Which metric predicts the loss of whole plans?",
        "Written by `python -m analysis.bakeoff` from the files beside it; `experiments/bakeoff.py` says how they are "
        "made and what the columns mean. Calibrated: by a power law from plans measured on the calibration set, R² of "
        "the logarithm and predicted / measured.",
    ]
    for result in results:
        medians = ", ".join(significant(band["median"]) for band in result["bands"])
        parts += [
            f"## {result['model']}, {result['method'].upper()}",
            f"{result['plans']} plans a band of {result['groups']} groups; median KL {medians} nats; "
            f"{result['rows'][0]} rows to calibrate on, {result['rows'][1]} to judge by.",
            table(result),
        ]
    return "\n\n".join(parts) + "\n"


def _tau(result: Mapping[str, Any], name: str) -> float:
    return sum(band["metrics"][name]["tau"] for band in result["bands"])


def _number(value: float | None) -> str:
    return significant(None) if value is None else f"{value:.2f}"


def main() -> int:
    """Write the page."""
    results = [read_json(path, "bake-off result") for path in sorted(FOLDER.glob("*.json"))]
    write_text(FOLDER / "README.md", page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
