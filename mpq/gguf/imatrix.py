"""Importance matrices of llama.cpp: mean squares of what each weight multiplies, in both of its formats.

The format of today is a GGUF file with two tensors a weight, `NAME.in_sum2`, sums of squares by input, and
`NAME.counts`, how many rows they are sums over. The one before it, `.dat`, is a list of names and values: means times a
number of calls. Layouts as in `tools/imatrix/imatrix.cpp` of llama.cpp v0.5.0.

They are the diagonals of the grams that `mpq calibrate` collects, and no more: GPTQ with a diagonal gram is rounding to
nearest under scales that are fitted with these weights.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq.files import writing
from mpq.gguf.container import Tensor, Value, write
from mpq.gguf.names import gguf_name
from mpq.gguf.reader import GgufFile, is_gguf, read
from mpq.types import LayerStats, MpqError, WeightSpec

_SUMS, _COUNTS = ".in_sum2", ".counts"
_WHAT = "an importance matrix of llama.cpp, as llama-imatrix writes it"


def stats_of(path: str | os.PathLike[str], weights: Sequence[WeightSpec]) -> dict[str, LayerStats]:
    """Statistics of weights, with diagonal grams; those that the file has no entry for are left out.

    `absmax` is not known to such a file: it is the root of the mean squares, which no rounding algorithm here reads.

    Raises:
      MpqError: the file is damaged, or its entries are of another model.
    """
    found, entries = {}, read_imatrix(path)
    for spec in weights:
        values = entries.get(gguf_name(spec.path))
        if values is None:
            continue
        if values.size != spec.batch * spec.k:
            raise MpqError(
                f"{path} has {values.size} importances for weight {spec.path}, which has {spec.batch * spec.k} inputs: "
                "it is of another model"
            )
        mean = values.reshape(spec.batch, spec.k)
        gram = np.zeros((spec.batch, spec.k, spec.k), np.float32)
        gram[:, np.arange(spec.k), np.arange(spec.k)] = mean
        found[spec.path] = LayerStats(gram, np.sqrt(mean), 1)
    if not found:
        raise MpqError(f"{path} has no entry for any weight of this model: it is of another one")
    return found


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Name of a tensor in GGUF -> `float32[k]`, or `[experts * k]`: E[x^2] of its inputs.

    An expert that saw nothing has 1 throughout, as in llama.cpp.

    Raises:
      MpqError: the file is neither format, damaged or truncated, or holds what is no mean square.
    """
    path = Path(path)
    found = _of_gguf(read(path)) if is_gguf(str(path)) else _of_dat(path)
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise MpqError(f"{path} has importances of {name} that are negative or not finite: collect them again")
    return found


def write_imatrix(
    path: str | os.PathLike[str], weights: Sequence[WeightSpec], stats: Mapping[str, LayerStats], source: str
) -> int:
    """Write the diagonals of grams, for `llama-quantize --imatrix`; the file appears whole or not at all.

    An embedding is left out, where it is the output too, as `llama-imatrix` leaves it out.

    Args:
      path: of the file.
      weights: of the model.
      stats: statistics of weights by path.
      source: the text that they were collected on, for a person.

    Returns:
      Its size in bytes.

    Raises:
      MpqError: a weight has no name in GGUF, or the disk is full or refuses.
    """
    kept = [w for w in weights if w.path in stats and "embedding" not in w.kind]
    tensors: list[Tensor] = []
    for spec in kept:
        of, name = stats[spec.path], gguf_name(spec.path)
        counts = np.full((spec.batch, 1), of.num_tokens, np.float32)
        sums = np.diagonal(of.gram, axis1=1, axis2=2).astype(np.float32) * np.float32(of.num_tokens)
        tensors += [_float32(name + _SUMS, sums), _float32(name + _COUNTS, counts)]
    chunk = max((stats[w.path].num_tokens for w in kept), default=1)
    keys: dict[str, Value] = {"general.type": "imatrix", "imatrix.datasets": [source]}
    return write(path, "imatrix", keys | {"imatrix.chunk_count": 1, "imatrix.chunk_size": chunk}, tensors)


def write_dat(path: str | os.PathLike[str], importances: Mapping[str, np.ndarray], source: str) -> None:
    """Write the format before GGUF, which older programs read.

    Args:
      path: of the file.
      importances: name of a tensor -> `float32[k]`.
      source: the text that they were collected on, for a person.
    """
    parts = [struct.pack("<i", len(importances))]
    for name, values in importances.items():
        text = name.encode()
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", 1, values.size)]
        parts.append(np.ascontiguousarray(values, "<f4").tobytes())
    text = source.encode()
    parts += [struct.pack("<ii", 1, len(text)), text]
    with writing(path) as sibling:
        sibling.write_bytes(b"".join(parts))


def _float32(name: str, value: np.ndarray) -> Tensor:
    return Tensor(name, "f32", value.shape, value.nbytes, lambda: value)


def _of_gguf(file: GgufFile) -> dict[str, np.ndarray]:
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if not names or any(name + _COUNTS not in file.tensors for name in names):
        raise MpqError(f"{file.path} is not {_WHAT}: it lacks sums or counts")
    found = {}
    for name in names:
        sums = file.tensors[name + _SUMS].values()
        sums = sums.reshape(-1, sums.shape[-1])
        counts = file.tensors[name + _COUNTS].values().reshape(-1, 1)
        if len(counts) not in (1, len(sums)):
            raise MpqError(f"{file.path} has {len(counts)} counts for {len(sums)} sums of {name}: it is damaged")
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
        found[name] = mean.reshape(-1).astype(np.float32)
    return found


def _of_dat(path: Path) -> dict[str, np.ndarray]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MpqError(f"cannot read {path}: {error.strerror}; it should be {_WHAT}") from error
    place, found = 0, {}

    def integers(count: int) -> tuple[Any, ...]:
        nonlocal place
        place += 4 * count
        return struct.unpack_from(f"<{count}i", data, place - 4 * count)

    try:
        (entries,) = integers(1)
        if entries < 1:
            raise ValueError("it has no entries")
        for _ in range(entries):
            (length,) = integers(1)
            name, place = data[place : place + length].decode(), place + length
            calls, count = integers(2)
            if length < 1 or count < 1 or place + 4 * count > len(data):
                raise ValueError(f"an entry of {count} values does not fit")
            values = np.frombuffer(data, "<f4", count, place).astype(np.float32)
            found[name], place = values / max(calls, 1), place + 4 * count
    except (ValueError, struct.error) as error:
        raise MpqError(f"{path} is truncated, or not {_WHAT} ({error}): collect it again") from error
    return found
