"""An append-only file of finished items, so that an interrupted stage loses at most one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mpq.types import MpqError


class ItemStore:
    """Values by key in a file of JSON lines; every `put` is on disk before it returns.

    A line cut short by a crash is dropped. A file made from other inputs is refused.
    """

    def __init__(self, path: Path, inputs: str):
        """Open or create.

        Args:
          path: the file.
          inputs: digest of all that the values depend on.

        Raises:
          MpqError: the file was made from other inputs, or a line other than the last is damaged.
        """
        self._path, self._inputs = path, inputs
        self._values: dict[str, Any] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            path.write_bytes(b"".join(lines))
        for number, line in enumerate(lines, start=1):
            self._read(number, line)

    def get(self, key: str) -> Any | None:
        """The stored value, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Store plain data under `key`."""
        self._values[key] = value
        body = json.dumps([self._inputs, key, value])
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([body, hashlib.sha256(body.encode()).hexdigest()[:16]]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, number: int, line: bytes) -> None:
        damaged = MpqError(f"{self._path} is damaged in line {number}: delete it to compute its items again")
        try:
            body, checksum = json.loads(line)
            inputs, key, value = json.loads(body)
        except (ValueError, TypeError) as error:
            raise damaged from error
        if hashlib.sha256(body.encode()).hexdigest()[:16] != checksum:
            raise damaged
        if inputs != self._inputs:
            raise MpqError(f"{self._path} was made from other inputs: delete it to compute its items again")
        self._values[key] = value
