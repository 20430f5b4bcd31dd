"""What models read, and sets of it: tokens, images or plain arrays, and a `Dataset` of them in equal batches."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A model that reads text: `int32[batch, window]` token ids.

    Attributes:
      context: longest window.
      bos: id put first in every window, or None.
      pad: id that fills up short windows; a bidirectional encoder masks it.
    """

    context: int
    bos: int | None = None
    pad: int = 0

    def struct(self, batch: int, window: int | None = None) -> jax.ShapeDtypeStruct:
        """Shape of `batch` windows, of the whole context unless `window` says otherwise."""
        return jax.ShapeDtypeStruct((batch, window or self.context), np.dtype(np.int32))


@dataclasses.dataclass(frozen=True)
class Images:
    """A model that reads images: `uint8[batch, height, width, channels]`; it rescales and normalizes by itself."""

    height: int
    width: int
    channels: int = 3

    def struct(self, batch: int, window: int | None = None) -> jax.ShapeDtypeStruct:
        """Shape of `batch` images; they have no window."""
        del window
        return jax.ShapeDtypeStruct((batch, self.height, self.width, self.channels), np.dtype(np.uint8))


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A model that reads arrays of one shape: `dtype[batch, *shape]`."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def struct(self, batch: int, window: int | None = None) -> jax.ShapeDtypeStruct:
        """Shape of `batch` inputs; they have no window."""
        del window
        return jax.ShapeDtypeStruct((batch, *self.shape), np.dtype(self.dtype))


Inputs = Tokens | Images | Arrays
"""What a model reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs of a model, which of their positions are real, and what is known of them.

    Attributes:
      inputs: `[num_windows, ...]`, one window of text, one image or one sentence a row, as the model reads it.
      mask: `bool[num_windows, time]` for text, `bool[num_windows]` for other inputs: True where they are real; padding
        is False and never counts.
      document: `int32[num_windows]`: what a row was cut from (a text, a pair of sentences, the image itself); standard
        errors are over documents.
      source: where it came from, for a person.
      digest: sha256 over all arrays.
      labels: `[num_windows, ...]`: a class, a target, or the score of a pair on both of its rows; None without.
      whole: rows of one document say much the same, as the sentences of a pair do, so that they are never divided.
    """

    inputs: np.ndarray
    mask: np.ndarray
    document: np.ndarray
    source: str
    digest: str
    labels: np.ndarray | None = None
    whole: bool = False

    @property
    def num_documents(self) -> int:
        """Number of distinct documents."""
        return len(np.unique(self.document))

    def batches(self, size: int) -> Iterator["Batch"]:
        """Consecutive batches of exactly `size` rows; the last is filled with rows that count nothing."""
        for start in range(0, len(self.inputs), size):
            take = slice(start, start + size)
            fill = size - len(self.inputs[take])
            yield Batch(
                _fill_up(self.inputs[take], fill, 0),
                _fill_up(self.mask[take], fill, False),
                _fill_up(self.document[take], fill, -1),
                None if self.labels is None else _fill_up(self.labels[take], fill, 0),
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Equal-shaped part of a `Dataset`; `document` is -1 in rows that only fill it up."""

    inputs: Any
    mask: Any
    document: Any
    labels: Any = None


def _fill_up(array: np.ndarray, rows: int, value: int) -> np.ndarray:
    return np.concatenate([array, np.full((rows, *array.shape[1:]), value, array.dtype)])
