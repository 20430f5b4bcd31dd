"""`python -m analysis.surrogate`: what measured plans buy, joined from results of `experiments/surrogate.py`.

Goals are those of predicting random plans: tau and R2 by band, and predicted over true within a tenth. No predictor can
do better than the test set tells plans apart; `reachable` is the tau of one that knows their losses on endless rows.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.bakeoff import title
from analysis.pages import write_page
from analysis.text import significant

FOLDER = Path("experiments/results/surrogate")
GOALS = {(2, 4): (0.93, None), (3, 5): (0.95, 0.99), (4, 8): (None, None)}
"""By band of bits, the tau and the R2 that the best predictor shall reach."""
RATIO = 0.1
Result = Mapping[str, Any]
Found = Mapping[str, float]


def page(results: Sequence[Result]) -> str:
    """The overview, and every band of every model."""
    return "\n\n".join(_parts(results)) + "\n"


def overview(results: Sequence[Result]) -> str:
    """The surrogate of the most plans in every band, of the metric with the best tau, beside the goals."""
    lines = [
        "| model | bits | halves | reachable | metric | plans | cost | sum: tau "
        "| surrogate: tau | R² | ratio | goals |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for result in results:
        for band in result["bands"]:
            name, fitted = _best(band)
            found, entry = fitted["surrogate"], band["metrics"][name]
            cells = [
                _title(result),
                _bits(band),
                f"{band['halves']:.3f}",
                f"{reachable(band['halves']):.3f}",
                f"`{name}`",
                str(fitted["plans"]),
                significant(_cost(band, entry, fitted)),
                f"{entry['sum']['tau']:.3f}",
                *_agreement(found),
                _verdict(band, found),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reachable(halves: float) -> float:
    """Tau between measured losses of plans and those on endless rows, from tau between halves of the measured rows.

    Of normal logarithms r = sin(pi tau / 2) (Kendall and Gibbons 1990, *Rank Correlation Methods*, chapter 10). Halves
    that correlate by r make a whole whose measured losses hold 2 r / (1 + r) of true variance (Spearman 1910, Brown
    1910), and correlate with the true ones by the root of that. 0 where the halves do not agree.
    """
    r = max(math.sin(math.pi * halves / 2), 0.0)
    return 2 / math.pi * math.asin(math.sqrt(2 * r / (1 + r)))


def by_rows(result: Result) -> str:
    """The surrogate of most plans in every band, by the rows that their losses are of, all of them last."""
    lines = ["| bits | metric | rows | tau | R² | ratio | spread |", "|---|---|---:|---:|---:|---:|---:|"]
    seen = result["rows"][0 if result["fit_set"] == "calibration" else 1]
    for band in result["bands"]:
        name, fitted = _best(band)
        every = [one for one in _rows(band).get(name, []) if one["rows"] < seen]
        for one in (*every, {"rows": seen, "surrogate": fitted["surrogate"]}):
            found = one["surrogate"]
            cells = [_bits(band), f"`{name}`", str(one["rows"]), *_agreement(found), f"{found['spread']:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(band: Mapping[str, Any]) -> str:
    """One band of one model: every metric and number of plans."""
    lines = [
        "| metric | plans | cost | sum: tau | R² | ratio | refitted: tau | R² | ratio | surrogate: tau | R² | ratio "
        "| promised spread | found | within two |",
        "|---|---:|---:|" + "---:|" * 12,
    ]
    for name, fitted in _all(band):
        entry, found = band["metrics"][name], fitted["surrogate"]
        cells = [f"`{name}`", str(fitted["plans"]), significant(_cost(band, entry, fitted))]
        cells += [cell for one in (entry["sum"], fitted["refit"], found) for cell in _agreement(one)]
        cells += [f"{found['promised']:.3f}", f"{found['spread']:.3f}", f"{100 * found['within']:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# How many measured plans buy how good a prediction?"
    yield (
        "Written by `python -m analysis.surrogate` from the files beside it; `experiments/surrogate.py` says how they "
        "are made, `mpq/allocate/surrogate.py` what is fitted. Plans are random within a band of bits; those that are "
        "predicted were measured on a test set that neither the metric nor the fitted plans see."
    )
    yield (
        "All bands with the most plans, and the metric that was best by tau on the test set. `halves` is tau between "
        "the losses of the same plans on two halves of that set, and `reachable` the tau that this leaves to a "
        "predictor without any error (normal logarithms, Spearman and Brown's formula)."
    )
    yield overview(results)
    for result in results:
        yield f"## {_title(result)}, {result['fit_plans']} further plans"
        rows = result["rows"]
        yield (
            f"{result['plans']} plans a band of {result['groups']} groups, judged by {rows[1]} rows of "
            f"{result['data'][1]}; metrics see {rows[0]} rows of {result['data'][0]}, and further plans were measured "
            f"on the {result['fit_set']} set. {_fewer(result)}{_cut(result)}{_corrected(result)}"
            f"Cost: forward passes over the {rows[0]} rows."
        )
        if any(_rows(band) for band in result["bands"]):
            yield (
                f"What rows of the {result['fit_set']} set buy, of the metric above: the surrogate of most plans, "
                "fitted to their losses on the first of these rows."
            )
            yield by_rows(result)
        for band in result["bands"]:
            yield f"### {_bits(band)} bits: median KL {significant(band['median'])} nats"
            yield table(band)


def _title(result: Result) -> str:
    return title(result) + (", corrected" if result.get("corrected") else "")


def _fewer(result: Result) -> str:
    """Metrics that see some of the calibration rows only."""
    return "".join(f"`{name}` sees {rows} of the {result['rows'][0]}. " for name, rows in result["metric_rows"].items())


def _cut(result: Result) -> str:
    """What rows of text were cut to; results from before the record say nothing of it."""
    window = result.get("record", {}).get("config", {}).get("window")
    return "" if window is None else f"Rows are cut to {window} tokens. "


def _corrected(result: Result) -> str:
    """Results from before the option have none."""
    if not result.get("corrected"):
        return ""
    return (
        f"Of every plan biases and norms are corrected on {result['statistics_rows']} further rows "
        "(`mpq/quantize/one_pass.py`); `kl` and `fisher` do not see that, `alone` does. "
    )


def _all(band: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in sorted(band["metrics"], key=lambda name: -band["metrics"][name]["sum"]["tau"]):
        for fitted in band["metrics"][name]["fitted"]:
            yield name, fitted


def _best(band: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Of what is fitted to the most plans, the best by tau, and its metric."""
    most = max(fitted["plans"] for _, fitted in _all(band))
    whole = [pair for pair in _all(band) if pair[1]["plans"] == most]
    return max(whole, key=lambda pair: pair[1]["surrogate"]["tau"])


def _rows(band: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """By metric; results from before the option have none."""
    return {name: entry["by_rows"] for name, entry in band["metrics"].items() if entry.get("by_rows")}


def _cost(band: Mapping[str, Any], entry: Mapping[str, Any], fitted: Mapping[str, Any]) -> float:
    return entry["cost"] + fitted["plans"] * band["plan_cost"]


def _verdict(band: Mapping[str, Any], found: Found) -> str:
    tau, r2 = GOALS[tuple(band["bits"])]
    missed = [_missed(tau, band["halves"])] if tau is not None and found["tau"] < tau else []
    missed += [f"R² {r2}"] if r2 is not None and found["r2"] < r2 else []
    missed += [f"ratio within {RATIO}"] if abs(found["ratio"] - 1) > RATIO else []
    return "met" if not missed else "missed: " + ", ".join(missed)


def _missed(tau: float, halves: float) -> str:
    return f"tau {tau}" + (", which this test set cannot show" if reachable(halves) < tau else "")


def _agreement(found: Found) -> list[str]:
    return [
        f"{found[key]:.{digits}f}" if key in found else significant(None)
        for key, digits in (("tau", 3), ("r2", 3), ("ratio", 2))
    ]


def _bits(band: Mapping[str, Any]) -> str:
    return "{}–{}".format(*band["bits"])


def main() -> int:
    """Write the page."""
    return write_page(FOLDER, page, "result of surrogates")


if __name__ == "__main__":
    sys.exit(main())
