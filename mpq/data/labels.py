"""Labels as tasks want them: classes `int32[N]`, targets `float32[N, d]`, scores of pairs `float64[N]`.

A task of one's own is taken for a regression: its labels are compared with outputs.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpq.types import MpqError

MAX_CLASS = 2**31 - 1  # labels are int32
MAX_TARGET = float(np.finfo(np.float32).max)


def parse_labels(values: Sequence[Any], task: str, where: Callable[[int], str]) -> np.ndarray | None:
    """Labels that were read one by one.

    Args:
      values: of every example; None where it has none. All have one, or none has.
      task: name of the task.
      where: `i` to what a person calls the place of `values[i]`, for messages.

    Returns:
      One label an example in the dtype of the task, or None.

    Raises:
      MpqError: names the place of a label that is missing, of the wrong kind, or not finite.
    """
    given = [value is not None for value in values]
    if not any(given):
        return None
    if not all(given):
        raise MpqError(f"{where(given.index(False))} has no label, and others have: give every example one, or none")
    if task == "classification":
        return np.asarray([_class(value, where(i)) for i, value in enumerate(values)], np.int32)
    if task == "embedding":
        return np.asarray([_numbers(value, where(i), 0)[0] for i, value in enumerate(values)], np.float64)
    targets = [_numbers(value, where(i), 1) for i, value in enumerate(values)]
    for i, target in enumerate(targets):
        if len(target) != len(targets[0]):
            raise MpqError(f"{where(i)} has {len(target)} targets, and {where(0)} {len(targets[0])}: give equally many")
    return np.asarray(targets, np.float32)


def check_labels(values: np.ndarray, count: int, task: str, source: str) -> np.ndarray | None:
    """Labels that came as one array.

    Args:
      values: `[count]`, `[count, 1]`, or targets `[count, d]`.
      count: examples.
      task: name of the task; an embedding has labels for pairs only, so that those of an array are left out.
      source: what a person calls the array.

    Returns:
      Classes `int32[count]` or targets `float32[count, d]`.

    Raises:
      MpqError: another count, shape or dtype, a negative class, or a target that is not finite.
    """
    if task == "embedding":
        return None
    if len(values.shape) not in (1, 2) or len(values) != count:
        raise MpqError(f"{source} has labels of shape {values.shape} for {count} examples: give one label an example")
    if task == "classification":
        if not np.issubdtype(values.dtype, np.integer) or values.size != count:
            raise MpqError(
                f"{source} has labels {values.dtype}{list(values.shape)}: classes are integers, one an example"
            )
        if count and (values.min() < 0 or values.max() > MAX_CLASS):
            raise MpqError(f"{source} has labels from {values.min()} to {values.max()}: classes count from 0")
        return values.reshape(count).astype(np.int32)
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise MpqError(f"{source} has targets of dtype {values.dtype}: they are real numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        targets = values.reshape(count, -1 if count else 1).astype(np.float32)
    if not np.isfinite(targets).all():
        row = int(np.argmin(np.isfinite(targets).all(axis=1)))
        raise MpqError(f"{source} has a target that is NaN or infinite in float32, first in row {row}: leave it out")
    return targets


def _class(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) <= MAX_CLASS:
        raise MpqError(f"{where} has the label {value!r}: a class is an integer, and classes count from 0")
    return int(value)


def _numbers(value: Any, where: str, ndim: int) -> list[float]:
    """One number, or with `ndim` 1 a list of them, all finite."""
    listed = list(value) if ndim == 1 and isinstance(value, list | tuple | np.ndarray) else [value]
    if not listed or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in listed):
        raise MpqError(f"{where} has the label {value!r}: needed is a number{' or a list of them' if ndim else ''}")
    if not all(abs(v) <= MAX_TARGET for v in listed):  # False for NaN
        raise MpqError(f"{where} has the label {value!r}: it has to be finite in float32")
    return [float(v) for v in listed]
