"""The GGUF file: a header, key-value pairs, what tensors there are, and their data, each at a multiple of 32 bytes.

The `gguf` package writes it (an extra: `pip install 'mpq[gguf]'`). Its size is worked out here on its own, from the
format's description (ggml's `docs/gguf.md`), so that a budget can count every byte before anything is quantized.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpq.files import writing
from mpq.progress import track
from mpq.types import MpqError

Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
"""Of metadata. Integers are stored as uint32, or in arrays as int32; floats as float32."""

ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
      name: in GGUF.
      kind: ggml's name of its type, in lower case: `q4_k`, `f32`.
      shape: rows last; in the file the order is the opposite.
      nbytes: of its data.
      data: makes the bytes, `uint8[..., row_bytes]`; called when they are written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], np.ndarray]


def predicted_bytes(architecture: str, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> int:
    """Bytes of the file that `write` writes."""
    pairs = {"general.architecture": architecture, **metadata}
    size = 4 + 4 + 8 + 8 + sum(_text(key) + 4 + _value(value) for key, value in pairs.items())
    size += sum(_text(t.name) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensors)
    return aligned(size) + sum(aligned(t.nbytes) for t in tensors)


def write(
    path: str | os.PathLike[str], architecture: str, metadata: Mapping[str, Value], tensors: Sequence[Tensor]
) -> int:
    """Write the file; it appears whole or not at all, and holds one tensor in memory at a time.

    Returns:
      Its size in bytes.

    Raises:
      MpqError: the `gguf` package is not installed, or the disk is full or refuses.
    """
    gguf = require_gguf()
    with writing(path) as sibling:
        writer = gguf.GGUFWriter(sibling, architecture)
        for key, value in metadata.items():
            _add(writer, key, value)
        for t in tensors:
            kind = gguf.GGMLQuantizationType[t.kind.upper()]
            # The writer works out the number of weights from bytes and the type.
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for t in track(tensors, "export gguf", len(tensors)):
                writer.write_tensor_data(t.data())
        finally:
            writer.close()
    return os.stat(path).st_size


def require_gguf() -> Any:
    """The `gguf` package.

    Raises:
      MpqError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MpqError("GGUF files are read and written by the package gguf: pip install 'mpq[gguf]'") from error
    return gguf


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _text(text: str) -> int:
    return 8 + len(text.encode())


def _value(value: Value) -> int:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Sequence):
        return 4 + 8 + sum(map(_value, value))
    return 1 if isinstance(value, bool) else 4


def aligned(size: int) -> int:
    """Bytes that so many take in the file, with what fills them up."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
