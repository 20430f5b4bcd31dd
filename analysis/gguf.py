"""`python -m analysis.gguf`: the tables of `experiments/gguf_peers.py`, from its committed results."""

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.text import with_error
from mpq.files import read_json, write_text

FOLDER = Path("experiments/results/gguf")
Result = Mapping[str, Any]

FILES = {
    "llama_cpp": "llama.cpp's quantizer, importance matrix",
    "mix_rounded_here": "its mix of types, rounded by GPTQ here",
    "mpq_same_ends": "`mpq gguf`, embedding and output as in the mix",
    "mpq": "`mpq gguf`",
}
"""File of a row -> what it is."""


def table(result: Result) -> str:
    """A row a file, a column a mix: KL to the file of plain floats, nats per token, and how much lower it is."""
    rows = {row["mix"]: row for row in result["rows"]}
    lines = ["| within the bytes of | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    lines.append("| bytes | " + " | ".join(f"{row['llama_cpp']['bytes']:,}" for row in rows.values()) + " |")
    for name, what in FILES.items():
        cells = []
        for row in rows.values():
            kl = with_error(row[name]["kl"], row[name]["kl_stderr"])
            lower = with_error(row[name]["lower_by_percent"], row[name]["lower_by_percent_stderr"])
            cells.append(kl if name == "llama_cpp" else f"{kl}; {lower} % lower")
        lines.append("| " + " | ".join([what, *cells]) + " |")
    return "\n".join(lines)


def types(result: Result) -> str:
    """Types of the weights of each best file, a row a mix."""
    lines = ["| within the bytes of | weights of each type |", "|---|---|"]
    for row in result["rows"]:
        counted = Counter(row["searched"]["choices"].values())
        lines.append(f"| {row['mix']} | {', '.join(f'{count} {kind}' for kind, count in sorted(counted.items()))} |")
    return "\n".join(lines)


def page(results: Mapping[str, Result]) -> str:
    """The README of the results, by name of the model."""
    parts = [
        "# Files for llama.cpp at equal bytes",
        "KL of every file to the file of plain floats, both run in llama.cpp, on the same held-out windows: nats per "
        "token, standard errors over documents. Written by `python -m analysis.gguf` from what "
        "`python -m experiments.gguf_peers` measured. The student is a GPT-2 that "
        "`python -m experiments.train_student` trains on the reference's text: its rows fill blocks of 256, too. "
        "Those of tiny1m do not: its mixes consist of the types that llama.cpp falls back to.",
    ]
    for name, result in results.items():
        measured = f"{result['documents']} documents, {result['tokens']:,} tokens"
        parts += [f"## {name}", measured, table(result), types(result)]
    return "\n\n".join(parts) + "\n"


def load(root: Path) -> dict[str, Result]:
    """The committed results by name of the model."""
    return {path.stem: read_json(path, "results of a comparison") for path in sorted((root / FOLDER).glob("*.json"))}


def main(root: Path) -> int:
    """Write `README.md` beside the results under `root`; returns the exit code."""
    write_text(root / FOLDER / "README.md", page(load(root)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
