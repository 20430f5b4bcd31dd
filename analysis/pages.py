"""Pages of committed results: a folder of JSON files, and a README beside them that is written from them alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq.files import read_json, write_text


def results_in(folder: Path, what: str = "results of a comparison") -> list[Mapping[str, Any]]:
    """The content of every JSON file, in the order of the names.

    Raises:
      MpqError: a file holds no JSON; the sentence says that `what` was wanted.
    """
    return [read_json(path, what) for path in sorted(folder.glob("*.json"))]


def merged(results: Iterable[Mapping[str, Any]], *keys: str) -> list[Mapping[str, Any]]:
    """Results whose configs or options have the same values of all `keys`, as one: the first, with the rows of all."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        config = result["record"]["config"] if "record" in result else result["options"]
        same = found.setdefault(tuple(config[key] for key in keys), {**result, "rows": []})
        same["rows"] = [*same["rows"], *result["rows"]]
    return list(found.values())


def write_page(
    folder: Path, page: Callable[[Sequence[Mapping[str, Any]]], str], what: str = "results of a comparison"
) -> int:
    """Write the README of a folder; returns the exit code."""
    write_text(folder / "README.md", page(results_in(folder, what)))
    return 0
