"""An ONNX graph under construction: names, nodes, stored tensors, and dimensions that are known only when it runs.

The file is a protocol buffer, so its size follows from the nodes and from shape and type of what is stored:
`Graph.size_bytes` counts it without any content.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from mpq.export.jaxprs import arithmetic
from mpq.progress import track
from mpq.types import MpqError

OPSET, CONTRIB = 21, "com.microsoft"
IR_VERSION = 10
OLDEST, OLDEST_RUNTIME = (1, 19), (1, 27)
"""Of onnx, the first that gives int4 and bfloat16 back as arrays of such types (opset 21 came with 1.16). Of
onnxruntime, the first that computes what is written: 1.22 has no casts of bfloat16, 1.23 no `MatMulNBits` of 2 bits on
CPUs, and 1.26 makes one of a tied head in blocks that rounds the inputs to int8 (relative error 1e-2)."""
LIMIT = 2**31 - 1
"""Bytes of a protocol buffer; the large tensors of a larger model lie in a second file."""

MODEL, DATA = "model.onnx", "model.onnx.data"
"""Names of both files."""

OUTSIDE, ALIGNMENT = 1024, 64
"""Bytes of the smallest tensor in the second file, and of what its tensors begin at multiples of."""

# TensorProto.DataType
TYPES: Mapping[str, int] = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16, "uint4": 21,
    "int4": 22,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the graph. Dimensions are ints, or JAX's symbolic ones."""

    name: str
    shape: tuple[Any, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of the file: `make` gives its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], bytes]


class Graph:
    """Nodes and stored tensors, by name."""

    def __init__(self, onnx: Any) -> None:
        """Start empty.

        Args:
          onnx: the package.
        """
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.stored: dict[str, Stored] = {}
        self.symbols: dict[str, str] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._shapes: dict[str, str] = {}

    def node(self, kind: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **more: Any) -> list[str]:
        """Add a node; the names of its outputs."""
        names = [f"t{len(self.nodes)}" if i == 0 else f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        made = self._onnx.helper.make_node(kind, list(inputs), names, domain=domain, **more)
        self.nodes.append(made)
        return names

    def one(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        return self.node(kind, inputs, **attributes)[0]

    def result(self, value: str, name: str) -> None:
        """Give a value the name of an output of the model."""
        self.nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))

    def constant(self, value: Any, dtype: Any = None) -> str:
        """A small tensor that the computation needs; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            raw = array.tobytes()
            self.store(self._constants[key], Stored(array.dtype.name, array.shape, len(raw), lambda: raw))
        return self._constants[key]

    def store(self, name: str, stored: Stored) -> str:
        """A tensor of the file."""
        self.stored[name] = stored
        return name

    def dim(self, dim: Any) -> str:
        """`int64[1]`: one dimension."""
        if isinstance(dim, int | np.integer):
            return self.constant([int(dim)], np.int64)
        text = str(dim)
        if text not in self._shapes:
            constant = lambda number: self.constant([number], np.int64)
            self._shapes[text] = arithmetic(text, self.symbols, constant, self.one, "ONNX")
        return self._shapes[text]

    def shape(self, dims: Sequence[Any]) -> str:
        """`int64[len(dims)]`."""
        if all(isinstance(d, int | np.integer) for d in dims):
            return self.constant([int(d) for d in dims], np.int64)
        text = f"({', '.join(map(str, dims))},)"
        if text not in self._shapes:
            self._shapes[text] = self.one("Concat", *(self.dim(d) for d in dims), axis=0)
        return self._shapes[text]

    def model(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], metadata: Mapping[str, str]) -> Any:
        """The model without the content of stored tensors."""
        helper = self._onnx.helper
        describe = lambda t: helper.make_tensor_value_info(t.name, TYPES[t.dtype], [_dim(d) for d in t.shape])
        graph = helper.make_graph(self.nodes, "mpq", list(map(describe, inputs)), list(map(describe, outputs)))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="mpq")
        helper.set_model_props(model, dict(metadata))
        return model

    def size_bytes(self, model: Any, limit: int = LIMIT) -> int:
        """Bytes of the file that `fill` makes of `model`, or of both files where one would have more than `limit`."""
        whole = self._file_bytes(model, {})
        if whole <= limit:
            return whole
        places, length = self._places()
        return self._file_bytes(model, places) + length

    def is_one_file(self, model: Any, limit: int) -> bool:
        """Whether one file of at most `limit` bytes holds all."""
        return self._file_bytes(model, {}) <= limit

    def fill(self, model: Any, data: BinaryIO | None = None) -> bytes:
        """The file: `model` with the stored tensors.

        Args:
          model: without them.
          data: where large tensors go instead, for the file `DATA` beside it; None: they stay in the file.
        """
        places, length = ({}, 0) if data is None else self._places()
        for name, stored in track(self.stored.items(), "export onnx", len(self.stored)):
            tensor = self._tensor(name, stored, places.get(name))
            if data is None or name not in places:
                tensor.raw_data = stored.make()
            else:
                data.write(b"\0" * (places[name] - data.tell()))
                data.write(stored.make())
            model.graph.initializer.append(tensor)
        assert data is None or data.tell() == length
        return model.SerializeToString(deterministic=True)

    def _places(self) -> tuple[dict[str, int], int]:
        """Where tensors of `OUTSIDE` bytes and more lie in the second file, and its bytes."""
        places: dict[str, int] = {}
        end = 0
        for name, stored in self.stored.items():
            if stored.nbytes >= OUTSIDE:
                places[name] = -(-end // ALIGNMENT) * ALIGNMENT
                end = places[name] + stored.nbytes
        return places, end

    def _file_bytes(self, model: Any, places: Mapping[str, int]) -> int:
        graph = model.graph.ByteSize()
        outside = model.ByteSize() - _field(graph)
        tensors = (
            _field(self._tensor(name, s, places.get(name)).ByteSize() + (0 if name in places else _field(s.nbytes)))
            for name, s in self.stored.items()
        )
        return outside + _field(graph + sum(tensors))

    def _tensor(self, name: str, stored: Stored, place: int | None = None) -> Any:
        tensor = self._onnx.TensorProto(name=name, data_type=TYPES[stored.dtype], dims=stored.shape)
        if place is not None:
            tensor.data_location = tensor.EXTERNAL
            for key, value in (("location", DATA), ("offset", place), ("length", stored.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
        return tensor


def _field(size: int) -> int:
    """Bytes of a field of so many bytes: its tag, their number as a varint, and they."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


def _dim(dim: Any) -> int | str:
    return int(dim) if isinstance(dim, int | np.integer) else str(dim)


def require_onnx() -> Any:
    """The `onnx` package.

    Raises:
      MpqError: it is not installed, or is too old, or an onnxruntime too old for its files is installed.
    """
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise MpqError("ONNX files are written by the package onnx: pip install 'mpq[onnx]'") from error
    _require_version("onnx", onnx.__version__, OLDEST, "does not read weights of 4 bits back")
    with contextlib.suppress(ImportError):  # the file may be for another machine
        runtime = importlib.import_module("onnxruntime").__version__
        _require_version("onnxruntime", runtime, OLDEST_RUNTIME, "does not compute all models as they are")
    return onnx


def _require_version(package: str, version: str, oldest: tuple[int, int], lacks: str) -> None:
    if tuple(map(int, version.split(".")[:2])) < oldest:
        raise MpqError(
            f"{package} {version} {lacks}, {'.'.join(map(str, oldest))} and later do: pip install --upgrade 'mpq[onnx]'"
        )
