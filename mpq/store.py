"""Finished items kept by content: whatever asks again with equal inputs, in whatever run, does not compute again.

An item is the least that is computed at a time: the loss of one candidate, one probe, the scores of one batch. Its key
says in clear all that its value depends on: digests of the model, the data and the candidates, options, random key. So
a store needs no rules about when it is stale: what changed has another key, and everything else is found.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from mpq.files import write_bytes
from mpq.record import SETTINGS
from mpq.types import MpqError


class Store(Protocol):
    """Where finished items are, so that an interrupted stage continues. Values are plain (JSON) data.

    A key names all inputs of its value (`kept` makes it of them), so one store serves any metrics, models and data.
    """

    def get(self, key: str) -> Any | None:
        """The value, or None."""
        ...

    def put(self, key: str, value: Any) -> None:
        """Keep `value`."""
        ...


def kept(store: Store | None, make: Callable[[], Any], **inputs: Any) -> Any:
    """The value of an item: the stored one, else what `make` returns, which is then stored.

    Args:
      store: where to look; None: it is made.
      make: computes the value, plain data, from nothing but `inputs`, the code and the device.
      **inputs: all that the value depends on, plain data; `item` names what it is.
    """
    if store is None:
        return make()
    key = json.dumps(inputs, sort_keys=True)
    value = store.get(key)
    if value is None:
        value = make()
        store.put(key, value)
    return value


class MemoryStore:
    """A `Store` that forgets when the process ends."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get(self, key: str) -> Any | None:
        """The value, or None."""
        return self.values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep `value`."""
        self.values[key] = value


class FolderStore:
    """A `Store` on disk: a file an item, which is whole and on the disk before `put` returns, so a kill loses one item.

    A file has three lines: the key with the code and device that made the value, the value, and the sha256 of these
    two. Its name is the sha256 of the first. Processes that run at the same time may share the folder.
    """

    def __init__(self, folder: Path, maker: Mapping[str, Any]) -> None:
        """Open; nothing is written yet.

        Args:
          folder: may hold the items of other makers too.
          maker: what else values depend on: code, versions, device.
        """
        self._folder, self._maker = folder, maker

    def get(self, key: str) -> Any | None:
        """The value, or None.

        Raises:
          MpqError: the file under the item's name is damaged, or holds another item.
        """
        head = self._head(key)
        path = self._path(head)
        try:
            lines = path.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(lines) != 4 or lines[2].decode(errors="replace") != _checksum(*lines[:2]):
            raise MpqError(f"{path} is damaged: delete it to compute its item again")
        if lines[0] != head:
            raise MpqError(f"{path} holds an item of other inputs than its name says: delete it to compute its own")
        return json.loads(lines[1])

    def put(self, key: str, value: Any) -> None:
        """Keep `value`.

        Raises:
          MpqError: the disk is full, or the operating system refuses.
        """
        head, body = self._head(key), json.dumps(value).encode()
        write_bytes(self._path(head), b"\n".join((head, body, _checksum(head, body).encode(), b"")))

    def _head(self, key: str) -> bytes:
        return json.dumps({"inputs": json.loads(key), "maker": self._maker}, sort_keys=True).encode()

    def _path(self, head: bytes) -> Path:
        name = hashlib.sha256(head).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.json"


def _checksum(head: bytes, body: bytes) -> str:
    return hashlib.sha256(head + b"\n" + body).hexdigest()


def score_store(folder: Path, activations: str = "") -> FolderStore:
    """What this code made on this device, kept in `folder`, of models whose activations are rounded so."""
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    versions = {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "numpy": np.__version__}
    device, beside = jax.devices()[0].device_kind, {"activations": activations} if activations else {}
    return FolderStore(folder, {"source": source_digest(), "device": device, **versions, **settings, **beside})


def source_digest() -> str:
    """sha256 over the source of this package: a stage made by other code is not reused."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
