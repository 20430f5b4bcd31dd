"""A quantized model as one `.tflite` file for LiteRT (TensorFlow Lite): `mpq export OUT --to litert`.

Text models read `input_ids`, `int32[batch, window]`, others `inputs`; the batch is open (`resize_tensor_input`), a
window fixed. Schemes and shapes of the weights are in the metadata of the file, so that `load` gives the codes back.

Weights are dequantized as they are needed and inputs of products stay float32, so that the file computes what the plan
was scored by. Where the plan rounds inputs (`mpq.litert.activations`), LiteRT multiplies integers; `with_whole_biases`
is the model with the biases that it then adds.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mpq.export.graphs import described, model_of, require_forms
from mpq.export.orbax import Exported
from mpq.files import write_bytes
from mpq.formats import parse_scheme
from mpq.inputs import Tokens
from mpq.litert.activations import Rounded
from mpq.litert.convert import Converter, traced
from mpq.litert.graph import TYPES, Graph, require_litert
from mpq.litert.weights import read_codes, refusal, unpack
from mpq.types import MpqError, QTensor

_METADATA = "mpq.weights"


def save(
    path: str | os.PathLike[str], exported: Exported, name: str, *, window: int | None = None, integer: bool = False
) -> int:
    """Write the file, whole or not at all.

    Args:
      path: of the file.
      exported: a quantized model, as `mpq.export.orbax.load` reads it.
      name: of the model, for a person.
      window: tokens of text; None: the whole context, but at most `convert.WINDOW`.
      integer: of static ranges, round what residual sums add as well, which the plan does not, and let LiteRT multiply
        codes of 4 bits as they are, which it rounds twice.

    Returns:
      Its size in bytes, which is `size_bytes`.

    Raises:
      MpqError: a weight and its scheme, or an operation of the model, have no form in LiteRT, `ai-edge-litert` is not
        installed, or the disk is full or refuses.
    """
    data = _build(exported, name, window, integer)[0].file()
    write_bytes(path, data)
    return len(data)


def size_bytes(exported: Exported, name: str, *, window: int | None = None, integer: bool = False) -> int:
    """Bytes of the file that `save` writes. Raises as it does."""
    return _build(exported, name, window, integer)[0].size_bytes()


def with_whole_biases(exported: Exported, name: str, *, window: int | None = None, integer: bool = False) -> Exported:
    """The model that the file computes: what integer convolutions add is of whole steps of their sums.

    The bias of such a convolution is an int32 of the scale of its input times that of its weight. Where a norm or the
    layer itself adds a parameter, that is changed here by less than such a step, so that the plan in JAX adds what the
    file does; both files are the same, to the byte, unless several convolutions add one parameter, which suits the
    first of them here. Arguments and errors are those of `save`.
    """
    params = dict(exported.params)
    for path, change in _build(exported, name, window, integer)[1].items():
        params[path] = (params[path].astype(np.float64) + change.reshape(params[path].shape)).astype(np.float32)
    return dataclasses.replace(exported, params=params)


def load(path: str | os.PathLike[str]) -> dict[str, QTensor]:
    """The codes of every weight of a file that `save` wrote, by path; plain floats come as their values.

    Raises:
      MpqError: the file is no LiteRT model, or not one of `save`.
    """
    schema = require_litert()
    try:
        data = Path(path).read_bytes()
        if data[4:8] != b"TFL3":
            raise ValueError("it does not begin as one")
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        metadata = {m.name.decode(): m.buffer for m in model.metadata or ()}
        weights = json.loads(model.buffers[metadata[_METADATA]].data.tobytes())
    except (OSError, ValueError, KeyError) as error:
        reason = type(error).__name__
        raise MpqError(f"{path} is no LiteRT file that `mpq export --to litert` wrote: {reason}") from error
    reader = _Reader(schema, model)
    found: dict[str, QTensor] = {}
    for weight, (scheme, k, n, batch) in weights.items():
        found[weight] = read_codes(reader.arrays(weight), parse_scheme(scheme), k, n, batch)
    return found


class _Reader:
    def __init__(self, schema: Any, model: Any) -> None:
        self._buffers, self._list = model.buffers, model.subgraphs[0].tensors
        self._tensors = {t.name.decode(): t for t in self._list}
        self._dtypes = {getattr(schema.TensorType, code): dtype for dtype, code in TYPES.items()}

    def arrays(self, weight: str) -> dict[str, np.ndarray]:
        """What is stored of a weight, with its scales, wherever they are."""
        tensor = self._tensors[weight]
        found = {"qvalue": self._array(tensor)}
        for part in ("scale", "zero_point", "sign"):
            if (own := self._tensors.get(f"{weight}.{part}")) is not None:
                found[part] = self._array(own)
        q = tensor.quantization
        if q is not None and q.scale is not None and "scale" not in found:
            found |= {"scale": np.asarray(q.scale, np.float32), "zero_point": np.asarray(q.zeroPoint)}
        if q is not None and q.quantizedDimension == len(tensor.shape) - 1 > 0:  # channels last, and not rows
            found["qvalue"] = found["qvalue"].reshape(-1, tensor.shape[-1]).T
        return found

    def _array(self, tensor: Any) -> np.ndarray:
        dtype, raw = self._dtypes[tensor.type], self._buffers[tensor.buffer].data
        if dtype in ("int2", "int4", "int8"):
            return unpack(raw, int(np.prod(tensor.shape)), int(dtype[3:]))
        return raw.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _build(exported: Exported, name: str, window: int | None, integer: bool) -> tuple[Graph, dict[str, np.ndarray]]:
    require_litert()
    require_forms(exported, "litert", refusal)
    model = model_of(exported, name)
    closed, shape, dtype = traced(model, window)
    graph, paths = Graph(), sorted(exported.shapes)
    specs = {spec.param: spec for spec in exported.weights}
    params = {path: np.asarray(value) for path, value in exported.params.items()}
    given = "input_ids" if isinstance(model.inputs, Tokens) else "inputs"
    rounded, apart = Rounded.of(exported, integer), frozenset[int]()
    if rounded.static and not integer:  # what is read as it is, too, shows only when all of it was walked
        first = Converter(Graph(), specs, exported.qtensors, params, rounded)
        first.run(closed, paths, shape, dtype, given)
        apart = frozenset(first.read)
    converter = Converter(graph, specs, exported.qtensors, params, rounded, apart)
    graph.inputs[given], graph.outputs["outputs"] = converter.run(closed, paths, shape, dtype, given)
    graph.metadata |= {"mpq.model": name.encode(), _METADATA: described(exported).encode()}
    return graph, converter.biases
