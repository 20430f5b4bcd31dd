"""A quantized model as one ONNX file for ONNX Runtime: `mpq export OUT --to onnx`.

Text models read `input_ids`, `int64[batch, time]`, of any length within their context; others `inputs`. Schemes and
shapes of the weights are in the metadata of the file, so that `load` gives the codes back. Activations that the plan
rounds are rounded by the same formulas, `mpq.onnx.activations`.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mpq.export.graphs import described, model_of, require_forms, rounded_rows
from mpq.export.orbax import Exported
from mpq.files import write_bytes, writing
from mpq.formats import parse_scheme
from mpq.onnx.activations import refusal as rounding_refusal
from mpq.onnx.cache import traced as with_cache
from mpq.onnx.convert import Converter, traced
from mpq.onnx.graph import DATA, LIMIT, MODEL, Graph, require_onnx
from mpq.onnx.weights import read_codes, refusal
from mpq.types import MpqError, QTensor


def save(
    path: str | os.PathLike[str], exported: Exported, name: str, limit: int = LIMIT, *, kv_cache: bool = False
) -> int:
    """Write the file, or a folder of two where it would be too large; whole or not at all.

    Args:
      path: of the file or folder.
      exported: a quantized model, as `mpq.export.orbax.load` reads it.
      name: of the model, for a person.
      limit: bytes of a file; beyond them large tensors lie in `model.onnx.data` beside `model.onnx`.
      kv_cache: of a language model, read the keys and values of the tokens before, and give those of all
        (`mpq.onnx.cache`).

    Returns:
      Its size in bytes, which is `size_bytes`.

    Raises:
      MpqError: a weight and its scheme, a rounded activation or an operation of the model have no form in ONNX, the
        `onnx` package is not installed, or the disk is full or refuses.
    """
    graph, model = _build(exported, name, kv_cache)
    size = graph.size_bytes(model, limit)
    if graph.is_one_file(model, limit):
        write_bytes(path, graph.fill(model))
        return size
    with writing(path) as folder:
        folder.mkdir()
        with open(folder / DATA, "wb") as data:
            (folder / MODEL).write_bytes(graph.fill(model, data))
    return size


def size_bytes(exported: Exported, name: str, limit: int = LIMIT, *, kv_cache: bool = False) -> int:
    """Bytes of what `save` writes. Raises as it does."""
    graph, model = _build(exported, name, kv_cache)
    return graph.size_bytes(model, limit)


def load(path: str | os.PathLike[str]) -> dict[str, QTensor]:
    """The codes of every weight of a file that `save` wrote, by path; plain floats come as their values.

    Raises:
      MpqError: the file is no ONNX model, or not one of `save`.
    """
    onnx = require_onnx()
    path = Path(path)
    from google.protobuf.message import DecodeError  # comes with onnx

    try:
        model = onnx.load(path / MODEL if path.is_dir() else path)
        weights = {p.key: p.value for p in model.metadata_props}["mpq.weights"]
    except (OSError, ValueError, KeyError, DecodeError) as error:
        raise MpqError(f"{path} is no ONNX file that `mpq export --to onnx` wrote: {type(error).__name__}") from error
    tensors = {t.name: t for t in model.graph.initializer}
    found: dict[str, QTensor] = {}
    for weight, (scheme, *shape) in json.loads(weights).items():
        named = {part: tensors.get(f"{weight}.{part}") for part in ("qvalue", "scale", "zero_point")}
        arrays = {part: onnx.numpy_helper.to_array(t) for part, t in named.items() if t is not None}
        found[weight] = read_codes(arrays, parse_scheme(scheme), *shape)
    return found


def _build(exported: Exported, name: str, kv_cache: bool) -> tuple[Graph, Any]:
    onnx = require_onnx()
    require_forms(exported, "onnx", refusal)
    model = model_of(exported, name)
    rows = rounded_rows(exported, model, "onnx", rounding_refusal)
    closed, inputs, outputs = with_cache(exported) if kv_cache else traced(model)
    graph, paths = Graph(onnx), sorted(exported.shapes)
    specs = {spec.param: spec for spec in exported.weights}
    params = {path: np.asarray(value) for path, value in exported.params.items()}
    Converter(graph, specs, exported.qtensors, params, rows).run(closed, paths, inputs, outputs)
    metadata = {"mpq.model": name, "mpq.weights": described(exported)}
    if rows:
        metadata["mpq.activations"] = json.dumps({row.spec.path: str(row.scheme) for row in rows}, sort_keys=True)
    return graph, graph.model(inputs, outputs, metadata)
