"""What the paper is drawn from: the committed results, by folder and name, each read once."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.load import Result as Run
from analysis.load import load_result
from mpq.files import read_json

Json = Mapping[str, Any]


class Sources:
    """The results under `experiments/results` of a checkout.

    Args:
      root: of the checkout.
    """

    def __init__(self, root: Path):
        self._folder = root / "experiments" / "results"

    @functools.cached_property
    def _read(self) -> dict[str, Json]:
        return {}

    def file(self, name: str) -> Json:
        """One file, such as `kernels/cpu`.

        Raises:
          MpqError: it is missing or no JSON.
        """
        if name not in self._read:
            self._read[name] = read_json(self._folder / f"{name}.json", "results of an experiment")
        return self._read[name]

    def folder(self, name: str) -> dict[str, Json]:
        """All files of a folder by name, in the order of the names.

        Raises:
          MpqError: a file is no JSON.
        """
        return {path.stem: self.file(f"{name}/{path.stem}") for path in sorted((self._folder / name).glob("*.json"))}

    def recorded(self) -> tuple[int, int]:
        """How many files name the commit that made them, or lie beside a record that does, and how many there are."""
        paths = sorted(self._folder.rglob("*.json"))
        return sum(map(self._names_commit, paths)), len(paths)

    def _names_commit(self, path: Path) -> bool:
        if path.with_name("record.json").exists():
            return True
        content = self.file(path.relative_to(self._folder).with_suffix("").as_posix())
        places = (content, content.get("record"), content.get("options"))
        return any(isinstance(place, Mapping) and place.get("commit") for place in places)

    def run(self, name: str) -> Run:
        """A run of `mpq run`.

        Raises:
          MpqError: its file is missing or wrong.
        """
        return load_result(self._folder / name / "results.json")


def only(rows: Sequence[Json], **wanted: Any) -> Json:
    """The one row that has all of these values."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    assert len(found) == 1, f"{len(found)} rows have {wanted}"
    return found[0]
