"""What calibration saw of activations, as a file: written, read, merged."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mpq.activations.ranges import ActivationRange
from mpq.activations.rows import ActivationSpec
from mpq.array_file import read_arrays, write_arrays
from mpq.types import MpqError

KIND = "activation ranges"
_ARRAYS = ("counts", "low", "high", "largest")


class RangeFile(NamedTuple):
    """Content of a file.

    Attributes:
      ranges: by path of the row.
      model_digest: of the model they are of.
      data_digests: of the data, in the order of their windows.
    """

    ranges: dict[str, ActivationRange]
    model_digest: str
    data_digests: tuple[str, ...]


def save_ranges(
    path: Path, ranges: Mapping[str, ActivationRange], model_digest: str, data_digests: Sequence[str]
) -> None:
    """Write ranges; equal ones give equal bytes.

    Raises:
      MpqError: the disk is full, or the operating system refuses.
    """
    rows = [{"spec": dataclasses.asdict(found.spec), "exponent": found.exponent} for found in ranges.values()]
    arrays = {f"{name}/{p}": getattr(found, name) for p, found in ranges.items() for name in _ARRAYS}
    header = {"model_digest": model_digest, "data_digests": list(data_digests), "rows": rows}
    write_arrays(path, KIND, header, arrays)


def load_ranges(path: Path) -> RangeFile:
    """Read ranges.

    Raises:
      MpqError: missing, damaged, of another kind, or of a version that did not tell features apart.
    """
    header, arrays = read_arrays(path, KIND, "mpq calibrate --of activations")
    ranges = {}
    for row in header["rows"]:
        spec = ActivationSpec.from_json(row["spec"])
        if f"largest/{spec.path}" not in arrays:
            raise MpqError(f"{path} is of an earlier version: run `mpq calibrate --of activations` again")
        counts, *ends = (arrays[f"{name}/{spec.path}"] for name in _ARRAYS)
        ranges[spec.path] = ActivationRange(spec, counts, row["exponent"], *ends)
    return RangeFile(ranges, header["model_digest"], tuple(header["data_digests"]))


def merge_ranges(files: Mapping[Path, RangeFile]) -> RangeFile:
    """One file's content of several: rows that are in more than one are merged, in the order given.

    Raises:
      MpqError: they are of different models, or a row would count the same data twice.
    """
    paths = list(files)
    first = files[paths[0]]
    ranges: dict[str, ActivationRange] = {}
    seen: set[tuple[str, str]] = set()
    for path, file in files.items():
        if file.model_digest != first.model_digest:
            raise MpqError(
                f"{path} is of another model than {paths[0]} (digest {file.model_digest[:12]}, not "
                f"{first.model_digest[:12]}): merge ranges of one model"
            )
        for row, found in file.ranges.items():
            of = {(row, digest) for digest in file.data_digests}
            if of & seen:
                raise MpqError(f"{path} holds {row} of data that another file has counted: give each data set once")
            seen |= of
            ranges[row] = ranges[row].merged(found) if row in ranges else found
    digests = dict.fromkeys(digest for file in files.values() for digest in file.data_digests)
    return RangeFile(ranges, first.model_digest, tuple(digests))
