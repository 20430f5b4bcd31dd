"""`python -m analysis.readme`: write the README's table of the reference model from the committed results.

The lines between the two markers are generated, so no number there can be older than the result file beside the figure.
"""

import sys
from pathlib import Path

from analysis.load import Result, load_result
from mpq.files import write_text

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def results_table(result: Result) -> str:
    """A Markdown table of the plans of the main method, smallest first, and one line on what mixing bought."""
    rows = ["| plan | bits per weight | MB | KL to the original, nats per token | perplexity | same top-1 |"]
    rows += ["|---|---:|---:|---:|---:|---:|"]
    plans = [plan for plan in result.plans if plan.method == result.main_method and plan.kl > 0]
    for plan in sorted(plans, key=lambda plan: (plan.bits_per_weight, plan.kind == "mixed")):
        name = f"**{plan.name}**" if plan.kind == "mixed" else plan.name
        error = "" if plan.kl_stderr is None else f" ± {plan.kl_stderr:.5f}"
        perplexity = "" if plan.perplexity is None else f"{plan.perplexity:.2f}"
        rows.append(
            f"| {name} | {plan.bits_per_weight:.3f} | {plan.size_bytes / 1e6:.2f} | {plan.kl:.5f}{error} "
            f"| {perplexity} | {100 * plan.top1_agreement:.1f} % |"
        )
    return "\n".join(rows)


def updated(readme: str, result: Result) -> str:
    """The README's text with the generated part replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{results_table(result)}\n{END}{tail}"


def main(root: Path) -> int:
    """Rewrite `README.md` under `root`; returns the exit code."""
    result = load_result(root / "experiments" / "results" / "quickstart" / "results.json")
    readme = root / "README.md"
    write_text(readme, updated(readme.read_text(encoding="utf-8"), result))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd()))
