"""`python -m analysis.bakeoff`: the tables of `experiments/bakeoff.py`, joined from its committed results.

Rows are metrics, best first. Cost is in forward passes over the calibration set.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.pages import write_page
from analysis.text import significant

FOLDER = Path("experiments/results/bakeoff")
Result = Mapping[str, Any]

COLUMNS = (
    ("tau", None, "tau", 3),
    ("R²", None, "r2", 3),
    ("ratio", None, "ratio", 2),
    ("calibrated R²", "calibrated", "r2", 3),
    ("ratio", "calibrated", "ratio", 2),
    ("refitted tau", "refitted", "tau", 3),
    ("R²", "refitted", "r2", 3),
    ("ratio", "refitted", "ratio", 2),
)
"""Of a band's table: head, which part of the entry, its number, decimals."""


def overview(results: Sequence[Result]) -> str:
    """Kendall's tau of every metric, its mean over the bands, before and after the correction, on every model."""
    heads = [title(result) for result in results]
    names = {name for result in results for name in result["cost"]}
    score = {name: _mean([mean_tau(result, name, "refitted") for result in results]) for name in names}
    lines = ["| metric | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in sorted(names, key=lambda name: (-(score[name] or -1.0), name)):
        pairs = ((mean_tau(result, name), mean_tau(result, name, "refitted")) for result in results)
        lines.append(f"| `{name}` | " + " | ".join(f"{_decimal(a, 2)} → {_decimal(b, 2)}" for a, b in pairs) + " |")
    for what, tau in (
        ("*measured on the calibration set*", lambda band: band["ceiling"]["tau"]),
        ("*half of the test set by the other*", lambda band: band["halves"]),
    ):
        cells = [_decimal(_mean([tau(band) for band in result["bands"]]), 2) for result in results]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(result: Result, band: Mapping[str, Any]) -> str:
    """One band of one model under one rounding algorithm."""
    heads = [head for head, *_ in COLUMNS]
    lines = ["| metric | cost | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + len(heads))]
    for name in sorted(result["cost"], key=lambda name: -band["metrics"][name]["tau"]):
        rows = result["metric_rows"].get(name)
        named = f"`{name}`" + (f" ({rows} rows)" if rows else "")
        cost = significant(result["cost"][name])
        lines.append("| " + " | ".join([named, cost, *_cells(band["metrics"][name])]) + " |")
    lines.append("| " + " | ".join(["*measured on the calibration set*", "", *_cells(band["ceiling"])]) + " |")
    return "\n".join(lines)


def page(results: Sequence[Result]) -> str:
    """The overview, and every band of every model."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# Which metric predicts the loss of whole plans?"
    yield (
        "Written by `python -m analysis.bakeoff` from the files beside it; `experiments/bakeoff.py` says how they are "
        "made and what the columns mean. Every plan draws the scheme of each fused group at random within a band of "
        "bits; no metric sees the test set."
    )
    yield (
        "Kendall's tau, mean over the bands: sum of the metric → of the table corrected by "
        f"{_numbers(result['fit_plans'] for result in results)} further plans."
    )
    yield overview(results)
    for result in results:
        yield f"## {title(result)}"
        yield (
            f"{result['plans']} plans a band of {result['groups']} groups; {result['rows'][0]} rows to calibrate on, "
            f"{result['rows'][1]} to judge by. {_statistics(result)} Calibrated: by a power law. Refitted: the table "
            f"corrected. Both by {result['fit_plans']} plans, measured on the {result.get('fit_set', 'calibration')} "
            "set."
        )
        for band in result["bands"]:
            low, high = band["bits"]
            yield (
                f"### {low} to {high} bits: median KL {significant(band['median'])} nats, "
                f"halves of the test set agree to tau {band['halves']:.3f}"
            )
            yield table(result, band)


def _statistics(result: Result) -> str:
    """Where the moments of rounding came from: an error that was minimized on a text looks smaller there."""
    if result["method"] == "rtn":
        return "Rounding saw no text."
    rows = result.get("statistics_rows")
    return f"Moments for rounding: of {rows} others." if rows else "Moments for rounding: of the same rows."


def title(result: Result) -> str:
    """Model and rounding algorithm."""
    return f"{result['model']}, {result['method'].upper()}"


def mean_tau(result: Result, name: str, part: str | None = None) -> float | None:
    """Kendall's tau of a metric, its mean over the bands: of the sum, or of `part`; None where a band has none."""
    return _mean([_part(band["metrics"].get(name, {}), part).get("tau") for band in result["bands"]])


def _part(entry: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    return entry if part is None else entry.get(part, {})


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing: means over other bands or models do not compare."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _cells(entry: Mapping[str, Any]) -> list[str]:
    return [_decimal(_part(entry, part).get(key), decimals) for _, part, key, decimals in COLUMNS]


def _decimal(value: float | None, decimals: int) -> str:
    return significant(None) if value is None else f"{value:.{decimals}f}"


def _numbers(values: Iterator[int]) -> str:
    return " or ".join(map(str, sorted(set(values))))


def main() -> int:
    """Write the page."""
    return write_page(FOLDER, page, "bake-off result")


if __name__ == "__main__":
    sys.exit(main())
