"""`python -m analysis.readme`: write the README's tables from the committed results.

The lines between a pair of markers are generated, so no number there can be older than the result files.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from analysis.load import MADE_BETTER, PlanResult, Result, load_result
from analysis.measures import QUALITIES
from analysis.text import significant
from mpq.files import write_text

LANGUAGE_MODEL = "quickstart"
TASKS = ("resnet20_cifar10", "minilm_stsb", "terrain")
"""Runs of the other tasks, in the order of their rows."""


def results_table(result: Result) -> str:
    """A Markdown table of the plans of a causal language model by the main method or better made, smallest first."""
    rows = ["| plan | bits per weight | MB | KL to the original, nats per token | perplexity | same top-1 |"]
    rows += ["|---|---:|---:|---:|---:|---:|"]
    order = ["uniform", "heuristic", "mixed", *MADE_BETTER]
    ours = lambda plan: plan.method == result.main_method or plan.kind in MADE_BETTER
    plans = [plan for plan in result.plans if ours(plan) and plan.kl > 0]
    for plan in sorted(plans, key=lambda plan: (plan.bits_per_weight, order.index(plan.kind))):
        name = f"**{plan.name}**" if order.index(plan.kind) > 1 else plan.name
        name += f", {plan.kind}" if plan.kind in MADE_BETTER else ""
        error = "" if plan.kl_stderr is None else f" ± {plan.kl_stderr:.5f}"
        perplexity = "" if plan.quality is None else f"{plan.quality:.2f}"
        rows.append(
            f"| {name} | {plan.bits_per_weight:.3f} | {plan.size_bytes / 1e6:.2f} | {plan.kl:.5f}{error} "
            f"| {perplexity} | {100 * plan.agreement:.1f} % |"
        )
    return "\n".join(rows)


def tasks_table(results: Mapping[str, Result]) -> str:
    """A Markdown table of runs of any task: at each budget in bits per weight the mixed plan and what it beats."""
    rows = ["| run | task | original | best uniform scheme that fits | mixed |", "|---|---|---|---|---|"]
    for run, result in results.items():
        plans = {plan.name: plan for plan in result.plans if plan.method == result.main_method}
        measure = QUALITIES[result.task.quality]
        original = None if result.reference is None else result.reference.quality
        for c in result.comparisons:
            if c.method != result.main_method or c.baseline is None or not (c.budget or "").endswith("bpw"):
                continue
            cells = " | ".join(_plan_cell(plans[name], result) for name in (c.baseline, c.plan))
            link = f"[{run}](experiments/results/{run})"
            shown = f"{measure.column} {significant(None if original is None else measure.scale * original)}"
            rows.append(f"| {link} | {result.task.name} | {shown} | {cells} |")
    return "\n".join(rows)


def _plan_cell(plan: PlanResult, result: Result) -> str:
    measure = QUALITIES[result.task.quality]
    quality = significant(None if plan.quality is None else measure.scale * plan.quality)
    return f"{plan.name}, {plan.bits_per_weight:.2f} bpw: KL {significant(plan.kl)}, {quality}"


def updated(readme: str, results: Mapping[str, Result]) -> str:
    """The README's text with the generated parts replaced.

    Args:
      readme: its text.
      results: by run, `LANGUAGE_MODEL` and `TASKS` among them.
    """
    parts = {
        "results": results_table(results[LANGUAGE_MODEL]),
        "tasks": tasks_table({run: results[run] for run in TASKS}),
    }
    for name, table in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, rest = readme.split(begin)
        _, tail = rest.split(end)
        readme = f"{head}{begin}\n{table}\n{end}{tail}"
    return readme


def load_results(root: Path) -> dict[str, Result]:
    """The committed runs that the README shows."""
    folder = root / "experiments" / "results"
    return {run: load_result(folder / run / "results.json") for run in (LANGUAGE_MODEL, *TASKS)}


def main(root: Path) -> int:
    """Rewrite `README.md` under `root`; returns the exit code."""
    readme = root / "README.md"
    write_text(readme, updated(readme.read_text(encoding="utf-8"), load_results(root)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd()))
