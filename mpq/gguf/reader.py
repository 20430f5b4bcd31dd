"""What a GGUF file holds: metadata as plain values, and tensors that are decoded when they are asked for.

The `gguf` package parses the container and decodes blocks, those of `mpq.formats.ggml` to the same bits as its schemes;
a damaged file is refused here, in one sentence, before anything is decoded.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpq.formats.ggml import GGML_SCHEMES
from mpq.gguf.container import require_gguf
from mpq.types import MpqError

SUFFIX = ".gguf"
_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_MAGIC = b"GGUF"
_DAMAGED = (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError, RecursionError)
"""What the `gguf` package and NumPy raise of a file that ends early, or whose counts and lengths are nonsense."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """One tensor as it lies in the file.

    Attributes:
      name: in GGUF.
      kind: ggml's name of its type, in lower case.
      shape: rows last.
      data: its bytes, `uint8[..., row_bytes]`, mapped from the disk.
      nbytes: of its data.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray
    nbytes: int

    @property
    def dtype(self) -> str:
        """Name of the dtype that its values are kept in once decoded."""
        return _FLOATS.get(self.kind, "float32")

    def values(self) -> np.ndarray:
        """What it stands for, `float32[shape]`, to the bit.

        Raises:
          MpqError: its type cannot be decoded, or a value is NaN or infinite.
        """
        gguf = require_gguf()
        try:
            found = gguf.quants.dequantize(self.data, gguf.GGMLQuantizationType[self.kind.upper()])
        except NotImplementedError as error:
            known = ", ".join((*GGML_SCHEMES, *_FLOATS))
            raise MpqError(
                f"tensor {self.name!r} is {self.kind}, which has no decoder here: known are {known}"
            ) from error
        if not np.isfinite(found).all():
            raise MpqError(f"tensor {self.name!r} holds NaN or infinity: the file is damaged, copy it again")
        return found.astype(np.float32).reshape(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """A file, opened.

    Attributes:
      path: of it.
      metadata: key -> text, number, bool or list.
      tensors: by name, in the order of the file.
      size_bytes: of all of it.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    size_bytes: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it, or nothing."""
        return str(self.metadata.get("general.architecture", ""))


def is_gguf(source: str) -> bool:
    """Whether `source` names a GGUF file: by its suffix, or by its first bytes."""
    path = Path(source)
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read(path: str | os.PathLike[str]) -> GgufFile:
    """Open a file; data stay on the disk until a tensor is asked for its values.

    Raises:
      MpqError: no such file, it is none of GGUF, damaged, truncated or one of several parts, or the `gguf` package is
        not installed.
    """
    gguf, path = require_gguf(), Path(path)
    size = _checked_size(path)
    try:
        reader = _strict(gguf)(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {tensor.name: _stored(tensor) for tensor in reader.tensors}
    except _DAMAGED as error:
        raise MpqError(f"{path} is truncated or damaged ({_short(error)}): copy it again") from error
    if int(metadata.get("split.count") or 1) > 1:
        raise MpqError(f"{path} is one of {metadata['split.count']} parts: merge them with llama-gguf-split --merge")
    return GgufFile(path, metadata, tensors, size)


def _checked_size(path: Path) -> int:
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise MpqError(f"cannot read {path}: {error.strerror}; it should be a GGUF file") from error
    if head[:4] != _MAGIC:
        raise MpqError(f"{path} is no GGUF file: its first bytes are {head[:4]!r}, not {_MAGIC!r}")
    return size


def _strict(gguf: Any) -> type[Any]:
    """The package's reader, which takes what lies behind the end of a file for arrays of nothing, and goes on."""

    class Strict(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != int(count):
                raise ValueError(f"it ends at {len(self.data):,} bytes and should go on")
            return found

    return Strict


def _stored(tensor: Any) -> Stored:
    shape = tuple(int(axis) for axis in reversed(tensor.shape))
    return Stored(tensor.name, tensor.tensor_type.name.lower(), shape, tensor.data.view(np.uint8), int(tensor.n_bytes))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]
