"""Pages of committed results: a folder of JSON files, and a README beside them that is written from them alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq.files import read_json, write_text


def results_in(folder: Path, what: str = "results of a comparison") -> list[Mapping[str, Any]]:
    """The content of every JSON file, in the order of the names.

    Raises:
      MpqError: a file holds no JSON; the sentence says that `what` was wanted.
    """
    return [read_json(path, what) for path in sorted(folder.glob("*.json"))]


def write_page(
    folder: Path, page: Callable[[Sequence[Mapping[str, Any]]], str], what: str = "results of a comparison"
) -> int:
    """Write the README of a folder; returns the exit code."""
    write_text(folder / "README.md", page(results_in(folder, what)))
    return 0
