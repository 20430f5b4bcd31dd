"""`python -m analysis.corrections`: the table of `experiments/conv_correction.py`, from its committed results."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.pages import write_page
from analysis.text import with_error

FOLDER = Path("experiments/results/corrections")
Result = Mapping[str, Any]


def table(result: Result) -> str:
    """A row a plan, rounding algorithm and equalization; top-1 and KL by correction."""
    said = {False: "", True: ", equalized"}
    named = lambda row: (row["plan"], row["method"] + said[row.get("equalized", False)])
    rows = {(*named(row), row["correction"]): row for row in result["rows"]}
    corrections = list(dict.fromkeys(row["correction"] for row in result["rows"]))
    lines = [
        "| plan | rounding | " + " | ".join(f"{name}: top-1 | KL, nats per image" for name in corrections) + " |",
        "|---|---|" + "---:|" * (2 * len(corrections)),
    ]
    for plan, method in dict.fromkeys((plan, method) for plan, method, _ in rows):
        cells = []
        for name in corrections:
            row = rows.get((plan, method, name))
            told = row and (f"{100 * row['top1']:.2f} %", with_error(row["kl"], row["kl_stderr"]))
            cells += told or ("", "")
        schemes = next(row["schemes"] for row in result["rows"] if row["plan"] == plan)
        lines.append(f"| {plan} (`{schemes}`) | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(results: Sequence[Result]) -> str:
    """Every model."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# What bias correction, norms estimated again and equalization buy"
    yield (
        "Written by `python -m analysis.corrections` from the files beside it; `experiments/conv_correction.py` says "
        "how they are made. Statistics, static ranges and corrections come from calibration images; top-1 and KL to "
        "the original are on others, with standard errors over images."
    )
    for result in results:
        config = result["record"]["config"]
        yield f"## {config['model']}"
        yield (
            f"Top-1 of the original {100 * result['top1']:.2f} %; {config['calibration']} images to calibrate on, "
            f"{config['test']} to judge by; {result['corrected']} layers corrected."
        )
        yield table(result)


def main() -> int:
    """Write the page."""
    return write_page(FOLDER, page)


if __name__ == "__main__":
    sys.exit(main())
