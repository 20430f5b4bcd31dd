"""Quantized weights out of the way: some in memory, the rest in a temporary file."""

import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.types import QTensor

_Places = tuple[Any, list[tuple[np.dtype, tuple[int, ...], int]]]
"""Structure of a pytree, and where its arrays begin in the file."""


class Shelf:
    """A mapping of quantized weights whose oldest values wait on disk.

    Each is written at most once, when it first has to make room, to one file without a name in the folder of temporary
    files (the environment variable TMPDIR names another one), which is gone with the process however that ends. It
    comes back with the same bits.
    """

    def __init__(self, keep_bytes: int) -> None:
        """Start empty.

        Args:
          keep_bytes: most that is held in memory, beside the value that was used last.
        """
        self._keep_bytes = keep_bytes
        self._here: OrderedDict[Hashable, QTensor] = OrderedDict()
        self._away: dict[Hashable, _Places] = {}
        self._held = 0
        self._file: IO[bytes] | None = None

    def __contains__(self, key: Hashable) -> bool:
        """Whether it was put here."""
        return key in self._here or key in self._away

    def __getitem__(self, key: Hashable) -> QTensor:
        """The value, which now counts as the one used last.

        Raises:
          KeyError: it was never put here.
        """
        if key not in self._here:
            self._hold(key, self._read(key))
        self._here.move_to_end(key)
        return self._here[key]

    def __setitem__(self, key: Hashable, value: QTensor) -> None:
        """Keep a value under a key that has none."""
        self._hold(key, value)

    def _hold(self, key: Hashable, value: QTensor) -> None:
        self._here[key] = value
        self._held += _num_bytes(value)
        while self._held > self._keep_bytes and len(self._here) > 1:
            oldest, gone = self._here.popitem(last=False)
            self._held -= _num_bytes(gone)
            if oldest not in self._away:
                self._away[oldest] = self._write(gone)

    def _write(self, value: QTensor) -> _Places:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="mpq-")  # noqa: SIM115  # open as long as the shelf lives
            weakref.finalize(self, self._file.close)
        leaves, structure = jax.tree.flatten(value)
        places = []
        for leaf in leaves:
            array = np.asarray(leaf)
            places.append((array.dtype, array.shape, self._file.seek(0, 2)))
            self._file.write(array.tobytes())
        return structure, places

    def _read(self, key: Hashable) -> QTensor:
        structure, places = self._away[key]
        assert self._file is not None
        leaves = []
        for dtype, shape, offset in places:
            self._file.seek(offset)
            array = np.frombuffer(self._file.read(dtype.itemsize * int(np.prod(shape))), dtype)
            leaves.append(jnp.asarray(array.reshape(shape)))
        return jax.tree.unflatten(structure, leaves)


def _num_bytes(value: QTensor) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(value))
