"""Arrays in `.npz` files: images or inputs of any kind, with labels or targets, and images as files in one array."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mpq.data.images import jpeg_part, parse_fit
from mpq.data.labels import check_labels
from mpq.data.part import Part, Parts, Rows
from mpq.inputs import Images, Tokens
from mpq.models.model import Model
from mpq.types import MpqError

IN_PARTS = (
    {"train": ("train_x", "train_y"), "test": ("test_x", "test_y")},
    {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},
)
"""Names of inputs and labels in files that state a training and a test part; the second are those of Keras."""

WHOLE = (("images", "labels"), ("inputs", "targets"), ("inputs", "labels"))
"""Names in files that state no parts; the labels may be absent."""

LAYOUTS = "train_x, train_y, test_x, test_y; x_train, y_train, x_test, y_test; images, labels; inputs, targets; jpeg, \
offsets, labels"


def read_arrays(path: Path, model: Model, window: int | None) -> Parts:
    """The examples of a `.npz` file.

    Inputs are as the model reads them: images `uint8[N, height, width, channels]`, token ids `int32[N, window]`, padded
    with the model's padding. Labels are classes `[N]` or targets `[N, d]`. The file has one of `LAYOUTS`.

    Raises:
      MpqError: the file cannot be read or has none of the layouts, or an array has another shape or dtype.
    """
    arrays = _load(path)
    if "jpeg" in arrays and "offsets" in arrays and isinstance(model.inputs, Images):
        jpeg, offsets = arrays["jpeg"], arrays["offsets"]
        labels = _labels(arrays, "labels", max(offsets.size - 1, 0), model, path)
        return {
            "all": jpeg_part(
                jpeg, offsets, labels, model.inputs, parse_fit(model.config.get("preprocessor")), str(path)
            )
        }
    for names in IN_PARTS:
        if all(inputs in arrays for inputs, _ in names.values()):
            return {key: _part(arrays, *pair, model, window, path) for key, pair in names.items()}
    for inputs, labels in WHOLE:
        if inputs in arrays and (labels in arrays or arrays.keys() == {inputs}):
            return {"all": _part(arrays, inputs, labels, model, window, path)}
    raise MpqError(f"{path} has the arrays {', '.join(arrays) or '(none)'}: the names that are read are {LAYOUTS}")


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file.items())
    except (OSError, ValueError, EOFError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        # An array of Python objects is a pickle, which could run anything; a lone .npy is no context manager.
        raise MpqError(
            f"{path} cannot be read as .npz ({error}): write it with numpy.savez, plain arrays only"
        ) from error


def _part(
    arrays: dict[str, np.ndarray], inputs: str, labels: str, model: Model, window: int | None, path: Path
) -> Part:
    """Examples from one array of inputs and one of labels."""
    values = _inputs(arrays[inputs], model, window, f"{path}: {inputs}")
    of_all = _labels(arrays, labels, len(values), model, path)

    def read(chosen: np.ndarray) -> Rows:
        rows = values[chosen]
        mask = rows != model.inputs.pad if isinstance(model.inputs, Tokens) else np.ones(len(rows), bool)
        return Rows(rows, mask, None if of_all is None else of_all[chosen])

    return Part(len(values), read)


def _inputs(values: np.ndarray, model: Model, window: int | None, name: str) -> np.ndarray:
    """Inputs, held against what the model reads.

    Raises:
      MpqError: another shape or dtype, or a token id below 0.
    """
    wanted: Any = model.inputs.struct(1, window)
    if values.ndim == len(wanted.shape) - 1 and isinstance(model.inputs, Images):
        raise MpqError(
            f"{name} has shape {values.shape}: images have a last axis for channels, write images[..., None]"
        )
    if values.shape[1:] != wanted.shape[1:] or values.ndim != len(wanted.shape):
        raise MpqError(f"{name} has shape {values.shape}: the model reads [N, {', '.join(map(str, wanted.shape[1:]))}]")
    ids = isinstance(model.inputs, Tokens) and np.issubdtype(values.dtype, np.integer)
    if values.dtype != wanted.dtype and not ids:
        raise MpqError(
            f"{name} has dtype {values.dtype}: the model reads {wanted.dtype}"
            + (
                ", pixels of 0 to 255 that it rescales and normalizes by itself"
                if isinstance(model.inputs, Images)
                else ""
            )
        )
    if ids and values.size and (values.min() < 0 or values.max() > np.iinfo(np.int32).max):
        raise MpqError(f"{name} has token ids from {values.min()} to {values.max()}: they count from 0")
    return values.astype(wanted.dtype, copy=False)


def _labels(arrays: dict[str, np.ndarray], name: str, count: int, model: Model, path: Path) -> np.ndarray | None:
    if name not in arrays:
        return None
    return check_labels(arrays[name], count, model.task.name, f"{path}: {name}")
