"""Rows of an experiment in one JSON file that is written after each of them: what was stopped goes on where it was."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpq.files import canonical_json, read_json, write_json

Row = dict[str, Any]


def rows_in(out: Path, what: str = "results of a comparison") -> list[Row]:
    """Those that a file has by now; none if there is no file.

    Raises:
      MpqError: it holds no JSON; the sentence says that `what` was wanted.
    """
    return read_json(out, what)["rows"] if out.exists() else []


def named_options(options: Any, files: Iterable[str]) -> dict[str, Any]:
    """The options of an experiment for its record, files without the folders that they lie in."""
    return dataclasses.asdict(options) | {key: getattr(options, key).name for key in files}


def keep(rows: Iterable[Row], out: Path, head: Mapping[str, Any], done: list[Row]) -> None:
    """Print every row as it comes, and write it behind those that are done.

    Args:
      rows: may look at `done`, to which they are added.
      out: JSON file.
      head: what stands beside the rows.
      done: rows of an earlier run.
    """
    for row in rows:
        print(canonical_json(row), end="", flush=True)
        done.append(row)
        write_json(out, {**head, "rows": done})
