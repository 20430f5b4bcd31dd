"""A LiteRT graph under construction: tensors, operators, and the flatbuffer that they make.

The file is a `Model` of the schema that `ai-edge-litert` brings (`schema_py_generated`). Contents lie at multiples of
16 bytes, as its `Buffer` table demands, so the file's size does not depend on what they are: `Graph.size_bytes` builds
it with every content shortened by a multiple of 16, which moves nothing else. Equal vectors of integers are written
once: shapes, and the zeros that stand beside the scales of rows.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpq.litert.versions import version_of
from mpq.progress import track
from mpq.types import MpqError

LIMIT = 2**31 - 1
"""Bytes of a flatbuffer; larger models need contents outside of it, which are not written here."""

TYPES: Mapping[str, str] = {
    "float32": "FLOAT32", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "int32": "INT32",
    "uint8": "UINT8", "int8": "INT8", "int4": "INT4", "int2": "INT2", "bool": "BOOL",
}  # fmt: skip
"""Dtype -> name in `TensorType`."""

_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Content:
    """What a tensor of the file holds: `make` gives its bytes."""

    nbytes: int
    make: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the codes of a tensor are read.

    Attributes:
      scale: `float32[channels]`, one for the tensor or one for every index of `axis`.
      zero_point: of the same shape; None: 0.
      axis: of the channels.
      block: with one, `scale` is None and `scales` is the tensor of scales in float16, `[channels, blocks]`.
      scales: see `block`.
    """

    scale: np.ndarray | None
    zero_point: np.ndarray | None = None
    axis: int = 0
    block: int = 0
    scales: int = -1


class Graph:
    """Tensors and operators, by number.

    Attributes:
      inputs, outputs: name in the signature -> tensor.
      metadata: name -> content.
    """

    def __init__(self) -> None:
        self.schema = require_litert()
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        self.metadata: dict[str, bytes] = {}
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self._contents: list[Content] = [Content(0, bytes)]  # buffer 0 is the empty one
        self._codes: dict[tuple[int, int], int] = {}
        self._constants: dict[Any, int] = {}
        self._made: dict[Any, list[int]] = {}
        self._types = {getattr(self.schema.TensorType, name): dtype for dtype, name in TYPES.items()}

    def tensor(
        self,
        name: str,
        shape: Sequence[Any],
        dtype: str,
        content: Content | None = None,
        quantization: Quantization | None = None,
    ) -> int:
        """Add a tensor; dimensions that are no ints are open, and written as 1 with the signature -1."""
        made = self.schema.TensorT()
        made.name, made.type = name.encode(), getattr(self.schema.TensorType, TYPES[dtype])
        made.shape = np.array([d if isinstance(d, int | np.integer) else 1 for d in shape], np.int32)
        if any(not isinstance(d, int | np.integer) for d in shape):
            made.shapeSignature = np.array([d if isinstance(d, int | np.integer) else -1 for d in shape], np.int32)
        made.hasRank = True
        if content is not None:
            made.buffer = len(self._contents)
            self._contents.append(content)
        if quantization is not None:
            made.quantization = self._quantization(quantization)
        self.tensors.append(made)
        return len(self.tensors) - 1

    def constant(self, value: Any, dtype: Any = None) -> int:
        """A small tensor that the computation needs; equal ones are stored once."""
        array = np.asarray(value, dtype)
        raw = array.tobytes()
        key = array.dtype.name, array.shape, raw
        if key not in self._constants:
            content = Content(len(raw), lambda: raw)
            name = f"c{len(self._constants)}"
            self._constants[key] = self.tensor(name, array.shape, array.dtype.name, content)
        return self._constants[key]

    def op(
        self,
        kind: str,
        inputs: Sequence[int],
        shape: Sequence[Any],
        dtype: str,
        quantization: Quantization | None = None,
        **options: Any,
    ) -> int:
        """Add an operator with one output; the number of that. Equal operators are computed once.

        Args:
          kind: its name in `BuiltinOperator`.
          inputs: numbers of tensors, -1 where an optional one is left out.
          shape: of the output.
          dtype: of the output.
          quantization: of the output.
          options: fields of its options table, and under `options` the name of that where it is not the operator's.
        """
        return self.ops(kind, inputs, [(shape, dtype)], quantization, **options)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[int],
        outputs: Sequence[tuple[Sequence[Any], str]],
        quantization: Quantization | None = None,
        **options: Any,
    ) -> list[int]:
        """`op` with an output for each of several shapes and dtypes."""
        shapes = tuple((tuple(map(str, shape)), dtype) for shape, dtype in outputs)
        key = kind, tuple(inputs), shapes, repr(sorted(options.items())), repr(quantization)
        if key in self._made:
            return self._made[key]
        schema, made = self.schema, self.schema.OperatorT()
        ranks = [len(self.tensors[i].shape) for i in inputs if i >= 0]
        types = [self._types[self.tensors[i].type] if i >= 0 else "" for i in inputs]
        made.opcodeIndex = self._code(kind, version_of(kind, types, max(ranks, default=0), outputs[0][1]))
        made.inputs = np.array(inputs, np.int32)
        numbers = [self.tensor(f"t{len(self.tensors)}", s, d, quantization=quantization) for s, d in outputs]
        made.outputs = np.array(numbers, np.int32)
        if options:
            name = options.pop("options", "".join(p.capitalize() for p in kind.split("_")) + "Options")
            made.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            made.builtinOptions = getattr(schema, f"{name}T")()
            for field, value in options.items():
                assert hasattr(made.builtinOptions, field), (name, field)
                setattr(made.builtinOptions, field, value)
        self.operators.append(made)
        self._made[key] = numbers
        return numbers

    def batch_zeros(self) -> int:
        """`float32[batch]` of zeros: the open dimension of the input, which must be its first."""
        x = self.tensors[0]
        rank, dtype = len(x.shape), self._types[x.type]
        starts, ends = self.constant([0] * rank, np.int32), self.constant([-1] + [1] * (rank - 1), np.int32)
        first = self.op("SLICE", [0, starts, ends], ["batch", *[1] * (rank - 1)], dtype, options="SliceOptions")
        value = self.op("CAST", [first], ["batch", *[1] * (rank - 1)], "float32")
        flat = self.op("RESHAPE", [value, self.constant([-1], np.int32)], ["batch"], "float32")
        return self.op("ZEROS_LIKE", [flat], ["batch"], "float32")

    def shape_of(self, number: int) -> tuple[int, ...]:
        """Of a tensor, open dimensions as -1."""
        tensor = self.tensors[number]
        return tuple(map(int, tensor.shape if tensor.shapeSignature is None else tensor.shapeSignature))

    def file(self) -> bytes:
        """The whole file.

        Raises:
          MpqError: it is larger than one file may be.
        """
        if (size := self.size_bytes()) > LIMIT:
            raise MpqError(f"the LiteRT file would have {size} bytes, and one holds {LIMIT}: choose a smaller plan")
        return self._build(lambda content: content.make())

    def size_bytes(self) -> int:
        """Bytes of the file, whose contents are not made for it."""
        left_out = 0

        def short(content: Content) -> bytes:
            nonlocal left_out
            kept = content.nbytes % _ALIGNMENT + (_ALIGNMENT if content.nbytes >= _ALIGNMENT else 0)
            left_out += content.nbytes - kept
            return bytes(kept)

        return len(self._build(short)) + left_out

    def _code(self, kind: str, version: int) -> int:
        code = getattr(self.schema.BuiltinOperator, kind)
        return self._codes.setdefault((code, version), len(self._codes))

    def _quantization(self, q: Quantization) -> Any:
        made = self.schema.QuantizationParametersT()
        made.quantizedDimension = q.axis
        if q.block:
            made.detailsType = self.schema.QuantizationDetails.BlockwiseQuantization
            made.details = self.schema.BlockwiseQuantizationT()
            made.details.scales, made.details.zeroPoints, made.details.blockSize = q.scales, -1, q.block
            return made
        assert q.scale is not None
        made.scale = np.asarray(q.scale, np.float32)
        made.zeroPoint = np.zeros(len(q.scale), np.int64) if q.zero_point is None else q.zero_point.astype(np.int64)
        return made

    def _build(self, fill: Callable[[Content], bytes]) -> bytes:
        schema, flatbuffers = self.schema, importlib.import_module("flatbuffers")
        model, graph = schema.ModelT(), schema.SubGraphT()
        graph.tensors, graph.operators, graph.name = self.tensors, self.operators, b"main"
        graph.inputs = np.array(list(self.inputs.values()), np.int32)
        graph.outputs = np.array(list(self.outputs.values()), np.int32)
        model.version, model.description, model.subgraphs = 3, b"mpq", [graph]
        model.operatorCodes = [self._operator_code(code, version) for code, version in self._codes]
        contents = [*self._contents, *(Content(len(raw), lambda raw=raw: raw) for raw in self.metadata.values())]
        filled = track(contents, "export litert", len(contents))
        model.buffers = [_Aligned(schema, None if i == 0 else fill(content)) for i, content in enumerate(filled)]
        model.metadata = []
        for i, name in enumerate(self.metadata):
            entry = schema.MetadataT()
            entry.name, entry.buffer = name.encode(), len(self._contents) + i
            model.metadata.append(entry)
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
        signature.inputs, signature.outputs = (self._maps(names) for names in (self.inputs, self.outputs))
        model.signatureDefs = [signature]
        builder = _sharing(flatbuffers.Builder)(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _operator_code(self, code: int, version: int) -> Any:
        made = self.schema.OperatorCodeT()
        made.builtinCode, made.deprecatedBuiltinCode, made.version = code, min(code, 127), version
        return made

    def _maps(self, names: Mapping[str, int]) -> list[Any]:
        found = []
        for name, number in names.items():
            made = self.schema.TensorMapT()
            made.name, made.tensorIndex = name.encode(), number
            found.append(made)
        return found


class _Aligned:
    """A `Buffer` whose content lies at a multiple of 16 bytes, which the generated Python code sees not to."""

    def __init__(self, schema: Any, data: bytes | None) -> None:
        self._schema, self._data = schema, data

    def Pack(self, builder: Any) -> int:
        """As generated classes name it."""
        where = None
        if self._data is not None:
            builder.StartVector(1, len(self._data), _ALIGNMENT)
            builder.head -= len(self._data)
            builder.Bytes[builder.head : builder.head + len(self._data)] = self._data
            where = builder.EndVector()
        self._schema.BufferStart(builder)
        if where is not None:
            self._schema.BufferAddData(builder, where)
        return self._schema.BufferEnd(builder)


def _sharing(builder: type) -> type:
    """A flatbuffer's `builder` that writes equal vectors of integers once: tables point to them by offsets."""

    class Sharing(builder):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self._written: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: np.ndarray) -> int:
            if x.dtype.kind != "i":
                return super().CreateNumpyVector(x)
            key = x.dtype.str, x.tobytes()
            if key not in self._written:
                self._written[key] = super().CreateNumpyVector(x)
            return self._written[key]

    return Sharing


def require_litert() -> Any:
    """The schema of LiteRT's files.

    Raises:
      MpqError: the package that brings it is not installed, or is too old.
    """
    try:
        schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    except ImportError as error:
        raise MpqError("LiteRT files are written by the package ai-edge-litert: pip install 'mpq[litert]'") from error
    if not hasattr(schema.TensorType, "INT2"):
        raise MpqError("this ai-edge-litert knows no int2 and is too old: pip install --upgrade 'mpq[litert]'")
    return schema
