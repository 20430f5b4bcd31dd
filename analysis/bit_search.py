"""`python -m analysis.bit_search`: the table of `experiments/bit_search.py`, from its committed results."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.pages import write_page
from analysis.text import with_error

FOLDER = Path("experiments/results/bit_search")
Result = Mapping[str, Any]

METHODS = {"fisher": "exact, on Fisher losses", "kl": "exact, on measured KL", "gradient": "by gradient"}


def table(result: Result) -> str:
    """A row a budget and method."""
    lines = [
        "| budget | method | bits per weight | KL to the original | above that by gradient | s | weights, schemes |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        schemes = ", ".join(f"{count} {scheme}" for scheme, count in row["schemes"].items())
        by_gradient = row["method"] == "gradient"
        cells = [
            f"{row['budget']:g}",
            METHODS.get(row["method"], row["method"]),
            f"{row['bits_per_weight']:.3f}",
            with_error(row["kl"], row["kl_stderr"]),
            "" if by_gradient else with_error(row["above_gradient"], row["above_gradient_stderr"]),
            f"{row['seconds']:.0f}",
            schemes,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(results: Sequence[Result]) -> str:
    """Every model."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# Bit widths by gradient, against the exact solver"
    yield (
        "Written by `python -m analysis.bit_search` from the files beside it; `experiments/bit_search.py` says how "
        "they are made. The same candidates, groups and budgets for every method; KL on text that no stage saw, nats "
        "per token, standard errors over windows. Seconds are those of the table, or of the search for one budget; a "
        "table serves all budgets."
    )
    for result in results:
        config, search = result["record"]["config"], result["search"]
        yield f"## {config['model']}"
        yield (
            f"{config['windows']} windows of {config['window']} tokens to search on, {config['table_windows']} of them "
            f"for tables, and as many others to judge by; {search['steps']} steps of {search['batch_size']} windows, "
            f"then the best of up to {search['plans']} plans that are drawn."
        )
        yield table(result)


def main() -> int:
    """Write the page."""
    return write_page(FOLDER, page)


if __name__ == "__main__":
    sys.exit(main())
