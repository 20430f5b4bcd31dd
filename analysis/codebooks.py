"""`python -m analysis.codebooks`: what learned levels and trellises buy, from committed results."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import pages
from analysis.text import with_error

FOLDER = Path("experiments/results/codebooks")
Result = Mapping[str, Any]

ALGORITHMS = {"rtn_mse": "to nearest, scales searched", "gptq": "GPTQ", "qep": "QEP"}
INGREDIENTS = {"fine": "GPTQ", "propagated": "QEP", "propagated_varied": "codes and scales distilled after QEP"}
_LEARNED, _TRELLIS = "lut", "tcq"


def rounding(result: Result, part: str) -> str:
    """KL by scheme and algorithm; of what is no fixed table also the share of the best one's of that width."""
    rows = [row for row in result["rows"] if row["part"] == part]
    found = [name for name in ALGORITHMS if any(row["algorithm"] == name for row in rows)]
    lines = [
        "| scheme | bits per weight | " + " | ".join(ALGORITHMS[name] for name in found) + " |",
        "|---|---:|" + "---:|" * len(found),
    ]
    schemes = dict.fromkeys((row["scheme"], row["bits_per_weight"]) for row in rows)
    for scheme, bits in sorted(schemes, key=lambda pair: _width(pair[0])):
        cells = [_cell(rows, scheme, name) for name in found]
        lines.append("| " + " | ".join([f"`{scheme}`", f"{bits:.4f}", *cells]) + " |")
    return "\n".join(lines)


def _cell(rows: Sequence[Result], scheme: str, algorithm: str) -> str:
    of = {row["scheme"]: row for row in rows if row["algorithm"] == algorithm}
    if scheme not in of:
        return "–"
    text = with_error(of[scheme]["kl"], of[scheme]["kl_stderr"])
    same = [name for name in of if _width(name) == _width(scheme)]
    fixed = [of[name]["kl"] for name in same if not name.startswith((_LEARNED, _TRELLIS))]
    share = scheme.startswith((_LEARNED, _TRELLIS)) and fixed
    return f"{text}, {100 * of[scheme]['kl'] / min(fixed):.0f} %" if share else text


def _width(scheme: str) -> str:
    return scheme.split("_")[0][-1]


def normal(result: Result) -> str:
    """What is left of normal values by width: the bound, a trellis, the best of all multipliers, the best levels."""
    lines = [
        "| width | least there can be | trellis | above it | multiplier, of the best | best levels | above the least |",
        "|---|" + "---:|" * 6,
    ]
    for row in result["widths"]:
        cells = [f"{row['bound']:.5f}", f"{row['own']:.5f}", f"{above_bound(row, 'own'):.2f} dB"]
        cells += [f"{row['own'] / row['best']:.3f}", f"{row['levels']:.5f}", f"{above_bound(row, 'levels'):.2f} dB"]
        lines.append("| " + " | ".join([f"`{_TRELLIS}{row['bits']}`", *cells]) + " |")
    return "\n".join(lines)


def above_bound(row: Result, name: str) -> float:
    """By how many decibels the error of that name is above the least that there can be."""
    return 10 * math.log10(row[name] / row["bound"])


def plans(results: Sequence[Result]) -> str:
    """KL of plans by what they may choose from, a column a budget, and how many weights take learned levels."""
    budgets = sorted({row["budget"] for result in results for row in result["rows"]})
    lines = [
        "| levels | rounded by | " + " | ".join(f"{budget:g} bpw" for budget in budgets) + " |",
        "|---|---|" + "---:|" * len(budgets),
    ]
    for name, what in INGREDIENTS.items():
        for result in results:
            of = {row["budget"]: row for row in result["rows"] if row["ingredient"] == name}
            if of:
                cells = [_plan(of[budget], _learns(result)) if budget in of else "–" for budget in budgets]
                levels = "fixed and learned" if _learns(result) else "fixed"
                lines.append("| " + " | ".join([levels, what, *cells]) + " |")
    return "\n".join(lines)


def _learns(result: Result) -> bool:
    return any(scheme.startswith(_LEARNED) for scheme in result["options"]["fine"])


def _plan(row: Result, learns: bool) -> str:
    count = sum(number for scheme, number in row["schemes"].items() if scheme.startswith(_LEARNED))
    of = f", {count} of {sum(row['schemes'].values())} learned" if learns else ""
    return f"{with_error(row['kl'], row['kl_stderr'])} ({row['bits_per_weight']:.3f}{of})"


def page(results: Sequence[Result]) -> str:
    """Every model."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# What learned levels and codes along a trellis buy"
    yield (
        "Written by `python -m analysis.codebooks` from the files beside it; `experiments/rounding.py`, "
        "`experiments/distillation.py` and `experiments/trellis.py` say how they are made. KL to the original on text "
        "that no stage saw, nats per token, standard errors over windows. Sizes count codes, scales and tables. Per "
        "cent are of the better of the fixed tables of that width. Plans with codes along a trellis are beside other "
        "tools [there](../weight_peers/README.md)."
    )
    for result in results:
        if "widths" in result:
            yield "## Normal values"
            yield "Mean squared errors of independent values of variance 1; no code leaves less than 4^-bits."
            yield normal(result)
    for result in merged(results):
        config = result["record"]["config"]
        yield f"## One scheme for all weights: {config['model']}"
        yield f"{config['windows']} windows of {config['window']} tokens to judge by. The weights of the blocks:"
        yield rounding(result, "blocks")
        yield "All weights:"
        yield rounding(result, "all")
    for model in dict.fromkeys(result["options"]["model"] for result in results if "options" in result):
        of = [result for result in results if "options" in result and result["options"]["model"] == model]
        options = of[0]["options"]
        yield f"## Plans of a budget: {model}"
        yield (
            f"Schemes of the weights of the blocks, by the exact solver on Fisher losses, from "
            f"{', '.join((*options['uniform'], *options['fine']))}; or also from "
            f"{', '.join(s for r in of for s in r['options']['fine'] if s.startswith(_LEARNED))}. In brackets bits per "
            f"weight."
        )
        yield plans(sorted(of, key=_learns))


def merged(results: Sequence[Result]) -> list[Result]:
    """Schemes that were rounded one by one: those of a model, judged on as much, in one result."""
    rounded = (result for result in results if "rows" in result and "options" not in result)
    return pages.merged(rounded, "model", "windows", "window")


def main() -> int:
    """Write the page."""
    return pages.write_page(FOLDER, page)


if __name__ == "__main__":
    sys.exit(main())
