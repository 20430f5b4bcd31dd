"""Stage files of arrays: safetensors with a header that says what they are, and a checksum over both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mpq.files import digest_arrays, digest_json, write_bytes
from mpq.types import MpqError

SCHEMA = 2


def write_arrays(path: Path, kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a stage file.

    Args:
      path: where.
      kind: what it is: `statistics`.
      header: plain data beside the arrays.
      arrays: by name.
    """
    named = {"kind": kind, "schema": SCHEMA, **header}
    named["checksum"] = _checksum(named, arrays)
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_bytes(path, save(whole, metadata={"mpq": json.dumps(named, sort_keys=True)}))


def read_arrays(path: Path, kind: str, again: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a stage file.

    Args:
      path: which.
      kind: what it must be.
      again: the command that makes such a file.

    Raises:
      MpqError: truncated, damaged, or of another kind.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("mpq", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not iterable
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise MpqError(f"{path} is truncated or no file of {kind} ({error}): run `{again}` again") from error
    checksum = header.pop("checksum", None)
    if header.get("kind") != kind or header.get("schema") != SCHEMA or checksum != _checksum(header, arrays):
        raise MpqError(f"{path} is damaged or no file of {kind}: run `{again}` again")
    return header, arrays


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    return digest_json([header, digest_arrays(arrays)])
