"""`python -m analysis.distillation`: the tables of `experiments/distillation.py`, from its committed results."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.pages import merged, write_page
from analysis.text import with_error

FOLDER = Path("experiments/results/distillation")
Result = Mapping[str, Any]

INGREDIENTS = {
    "uniform": "largest uniform scheme that fits, GPTQ",
    "allocated": "schemes allocated instead, by Fisher",
    "fine": "more schemes to choose from",
    "propagated": "the same plan, each weight making up for those before it (QEP)",
    "nearest": "the same plan, rounded to nearest",
    "nearest_scales_written": "rounded to nearest, scales distilled on text that the model writes itself",
    "scales": "scales distilled, without QEP",
    "scales_written": "scales distilled on text that the model writes itself, without QEP",
    "codes": "codes and scales distilled, without QEP",
    "varied": "codes and scales distilled, on varied text, without QEP",
    "propagated_varied": "codes and scales distilled, on varied text, after QEP",
    "propagated_written": "codes and scales distilled, on text that the model writes itself, after QEP",
    "learned": "learned levels to choose from, too, QEP",
    "learned_varied": "the same, codes and scales distilled, on varied text",
    "learned_written": "the same, codes and scales distilled, on text that the model writes itself",
    "guided": "learned levels, and grams of tokens weighted by the end loss, QEP",
    "guided_varied": "the same, codes and scales distilled, on varied text",
    "guided_written": "the same, codes and scales distilled, on text that the model writes itself",
    "trellis": "codes along a trellis to choose from instead of learned levels, QEP",
    "trellis_written": "the same, scales distilled, on text that the model writes itself",
    "guided_trellis": "the same, not distilled, with grams of tokens weighted by the end loss",
}


def table(result: Result, quantity: str) -> str:
    """`kl` or `excess` on the held-out text, nats per token: a row an ingredient, a column a budget."""
    budgets = sorted({row["budget"] for row in result["rows"]})
    lines = ["| | " + " | ".join(f"{budget:g} bpw" for budget in budgets) + " |", "|---|" + "---:|" * len(budgets)]
    for name, what in INGREDIENTS.items():
        rows = [row_of(result, name, budget) for budget in budgets]
        if any(rows):
            cells = [with_error(row.get(quantity), row.get(f"{quantity}_stderr")) for row in rows]
            lines.append("| " + " | ".join([what, *cells]) + " |")
    return "\n".join(lines)


def plans(result: Result) -> str:
    """Size and schemes of the last ingredient's plan, a row a budget, and the seconds that it took to make."""
    lines = ["| budget | bits per weight | weights and their schemes | s |", "|---:|---:|---|---:|"]
    order = list(INGREDIENTS)
    last = {row["budget"]: row for row in sorted(result["rows"], key=lambda row: order.index(row["ingredient"]))}
    for budget, row in sorted(last.items()):
        schemes = ", ".join(f"{count} {scheme}" for scheme, count in row["schemes"].items())
        lines.append(f"| {budget:g} | {row['bits_per_weight']:.3f} | {schemes} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def page(results: Sequence[Result]) -> str:
    """Every model."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# What each ingredient buys"
    yield (
        "Written by `python -m analysis.distillation` from the files beside it; `experiments/distillation.py` says how "
        "they are made. Each of the first three rows adds to the one above it; all others have the plan of the third "
        "and say how its weights are made. Text that no stage saw; standard errors over windows."
    )
    for result in merged(results, "model", "only", "windows", "window", "steps"):
        options = result["options"]
        yield f"## {options['model']}"
        yield (
            f"Perplexity of the original {result['perplexity']:.4f}; {options['windows']} windows of "
            f"{options['window']} tokens to calibrate on and as many to judge by; {options['steps']} steps. Weights "
            f"whose path holds `{options['only']}`; the others stay in floating point and are not counted."
        )
        yield "KL to the original, nats per token:"
        yield table(result, "kl")
        yield "Rise of the loss, nats per token:"
        yield table(result, "excess")
        yield "The plans of the last row:"
        yield plans(result)


def row_of(result: Result, ingredient: str, budget: float) -> Mapping[str, Any]:
    """What the file holds of an ingredient at a budget; empty if nothing."""
    wanted = (row for row in result["rows"] if (row["ingredient"], row["budget"]) == (ingredient, budget))
    return next(wanted, {})


def main() -> int:
    """Write the page."""
    return write_page(FOLDER, page, "results of a distillation")


if __name__ == "__main__":
    sys.exit(main())
