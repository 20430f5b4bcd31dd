"""The tensors of a checkpoint, a slab at a time: safetensors files, or an Orbax checkpoint of Flax parameters.

A safetensors file is mapped into memory for one slab at a time and unmapped again, so that what was read does not
stay resident: reading a model takes the memory of its float32 parameters and of a few slabs.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mpq.export import orbax
from mpq.files import read_json
from mpq.types import MpqError

SHARD_INDEX, SINGLE_FILE, PICKLES = "model.safetensors.index.json", "model.safetensors", "pytorch_model*.bin"
ORBAX = "params"
"""Folder of the Orbax checkpoint, beside `config.json`."""
FLOATS: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes that a checkpoint may have: name in a safetensors header -> name in NumPy."""
SLAB = 1 << 20
"""Elements read at a time: a few MB, which stay in the cache while they are checked, converted and transposed."""


class Header(NamedTuple):
    """What is known of a tensor without reading it; `dtype` is NumPy's name where it is a float that we read."""

    shape: tuple[int, ...]
    dtype: str


class Tensors(Protocol):
    """Named tensors that can be described without being read."""

    @property
    def folder(self) -> Path: ...
    @property
    def names(self) -> frozenset[str]: ...
    def header(self, name: str) -> Header: ...
    def slabs(self, name: str) -> Iterator[tuple[slice, np.ndarray]]: ...


def find_tensors(folder: Path) -> Tensors | None:
    """The weights in `folder`: safetensors, else an Orbax checkpoint; None where there are none.

    Raises:
      MpqError: a shard is missing, a file is damaged, or the weights are pickles only.
    """
    if (folder / SINGLE_FILE).exists() or any(folder.glob("*.safetensors")):
        return Safetensors(folder)
    if (folder / ORBAX).is_dir():
        return OrbaxArrays(folder)
    if pickles := sorted(folder.glob(PICKLES)):
        raise MpqError(
            f"{folder} holds its weights as {pickles[0].name}, a pickle and unsafe to read: "
            "convert it with model.save_pretrained(OUT) of transformers"
        )
    return None


class Safetensors:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
      MpqError: neither is there, a shard is missing, or a file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = _files_by_tensor(folder)
        self._headers = {file: _headers(file) for file in dict.fromkeys(self._files.values())}
        for name, file in self._files.items():
            if name not in self._headers[file]:
                raise MpqError(
                    f"{folder / SHARD_INDEX} says that {file.name} holds {name!r}, but it does not: download both again"
                )

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(self._files)

    def header(self, name: str) -> Header:
        """Shape and dtype of one tensor."""
        return self._headers[self._files[name]][name]

    def slabs(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """One tensor in slabs along its first axis, each with its place; a scalar is one slab of shape ()."""
        file, shape = self._files[name], self.header(name).shape
        for rows in _rows(shape) if shape else (slice(None),):
            with _opened(file) as handle:
                try:
                    slab = handle.get_slice(name)[rows] if shape else handle.get_tensor(name)
                except SafetensorError as error:  # the header was read before: the file changed meanwhile
                    raise MpqError(f"{file} cannot give the tensor {name!r} ({error})") from error
            yield rows, slab


class OrbaxArrays:
    """An Orbax checkpoint of Flax parameters, as `StandardCheckpointer` and `PyTreeCheckpointer` write it.

    The tree may be nested by path (`nnx.to_pure_dict`), an `nnx.State`, or flat with dotted paths. It is read whole
    when the first array is asked for, in the dtypes in which it is stored, and every array is let go once read.

    Raises:
      MpqError: Orbax cannot read it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._headers = {
            name: Header(tuple(m.shape), np.dtype(m.dtype).name) for name, m in self._read(metadata=True).items()
        }
        self._arrays: dict[str, np.ndarray] | None = None

    @property
    def names(self) -> frozenset[str]:
        """Dotted paths of all arrays."""
        return frozenset(self._headers)

    def header(self, name: str) -> Header:
        """Shape and dtype of one array."""
        return self._headers[name]

    def slabs(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """One array, once, in slabs along its first axis."""
        if self._arrays is None:
            self._arrays = self._read(metadata=False)
        array = np.asarray(self._arrays.pop(name))
        if not array.shape:
            yield slice(None), array
            return
        for rows in _rows(array.shape):
            yield rows, array[rows]

    def _read(self, *, metadata: bool) -> dict[str, Any]:
        """Path -> array, or its metadata."""
        from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs

        path = (self.folder / ORBAX).absolute()
        try:
            with orbax.quiet(), PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.metadata(path).item_metadata.tree
                if not metadata:  # as NumPy arrays: the devices they were saved from may not be here
                    tree = checkpointer.restore(
                        path, restore_args=jax.tree.map(lambda _: RestoreArgs(np.ndarray), tree)
                    )
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MpqError(f"{path} is no readable Orbax checkpoint ({reason}): save or copy it again") from error
        return flatten(tree)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path. An `nnx.State` adds `value` to every path and Linen puts `params` before: both go."""
    leaves = [([_key(k) for k in path], leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    if all(len(path) > 1 and path[-1] == "value" for path, _ in leaves):
        leaves = [(path[:-1], leaf) for path, leaf in leaves]
    if all(len(path) > 1 and path[0] == "params" for path, _ in leaves):
        leaves = [(path[1:], leaf) for path, leaf in leaves]
    return {".".join(path): leaf for path, leaf in leaves}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths to a nested dictionary; inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _key(key: Any) -> str:
    """One step of a path in a tree, as JAX gives it."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices along the first axis of about `SLAB` elements; at least 64 rows, the runs that a transposed slab makes."""
    step = max(64, SLAB // max(1, int(np.prod(shape[1:]))))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    if not (index := folder / SHARD_INDEX).exists():
        file = folder / SINGLE_FILE
        if not file.exists():
            other = next(iter(sorted(folder.glob("*.safetensors")))).name
            raise MpqError(f"{folder} holds {other}, but no {SINGLE_FILE} and no {SHARD_INDEX}: rename or complete it")
        return dict.fromkeys(_headers(file), file)
    weight_map = read_json(index, "the shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(v, str) and Path(v).name == v for v in weight_map.values()
    ):
        raise MpqError(f"{index} has no 'weight_map' from tensor to file name: download it again")
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise MpqError(f"{folder} lacks the shard {shard!r} that its index names: download it again")
    return {name: folder / shard for name, shard in weight_map.items()}


def _headers(file: Path) -> dict[str, Header]:
    with _opened(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  # a handle is not iterable
        dtype = lambda s: FLOATS.get(s.get_dtype(), s.get_dtype())
        return {name: Header(tuple(s.get_shape()), dtype(s)) for name, s in slices.items()}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise MpqError(f"{file} {_fault(file, str(error))}") from error


def _fault(file: Path, otherwise: str) -> str:
    """What is wrong with a file that the safetensors library refuses: its own words name parts of the parser."""
    try:
        with open(file, "rb") as handle:
            size, first = file.stat().st_size, handle.read(8)
            length = int.from_bytes(first, "little")
            if size < 8:
                return f"has {size} bytes and is no safetensors file: download it again"
            if length > size - 8:
                return f"is truncated or no safetensors file: its header of {length} bytes is longer than the file"
            entries = [e for name, e in json.loads(handle.read(length)).items() if name != "__metadata__"]
            needed = max((int(end) for e in entries for end in e["data_offsets"]), default=0)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "is damaged or no safetensors file: its header is not that of one"
    if needed > size - 8 - length:
        return f"is truncated: its tensors need {needed} bytes and it has {size - 8 - length}; download it again"
    return f"is damaged or no safetensors file ({otherwise}): download it again"
