"""A model from a Python file: any Flax module, or any function."""

import runpy
from pathlib import Path

from mpq.models.model import Model
from mpq.types import MpqError


def is_python(source: str) -> bool:
    """Whether `source` is a Python file."""
    return source.endswith(".py") and Path(source).is_file()


def load_python(path: Path) -> Model:
    """The `MODEL` that the file defines.

    Raises:
      MpqError: the file fails, or defines no `MODEL` of type `mpq.Model`.
    """
    try:
        model = runpy.run_path(str(path)).get("MODEL")
    except MpqError:
        raise
    except Exception as error:  # it is the user's code and may fail in any way
        raise MpqError(f"model file {str(path)!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, Model):
        raise MpqError(f"model file {str(path)!r} defines no MODEL of type mpq.Model: write MODEL = mpq.Model(...)")
    return model
