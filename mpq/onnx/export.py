"""A quantized model as one ONNX file for ONNX Runtime: `mpq export OUT --to onnx`.

Text models read `input_ids`, `int64[batch, time]`, of any length within their context; others `inputs`. Schemes and
shapes of the weights are in the metadata of the file, so that `load` gives the codes back.
"""

import json
import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from mpq.export.orbax import Exported
from mpq.files import write_bytes
from mpq.formats import parse_scheme
from mpq.models import FAMILIES, find_family, functional
from mpq.models.checkpoint import make_model
from mpq.onnx.convert import Converter, traced
from mpq.onnx.graph import Graph, require_onnx
from mpq.onnx.weights import read_codes, refusal
from mpq.types import MpqError, QTensor


def save(path: str | os.PathLike[str], exported: Exported, name: str) -> int:
    """Write the file, whole or not at all.

    Args:
      path: of the file.
      exported: a quantized model, as `mpq.export.orbax.load` reads it.
      name: of the model, for a person.

    Returns:
      Its size in bytes, which is `size_bytes`.

    Raises:
      MpqError: a weight and its scheme, or an operation of the model, have no form in ONNX, the `onnx` package is not
        installed, or the disk is full or refuses.
    """
    graph, model = _build(exported, name)
    data = graph.fill(model)
    write_bytes(path, data)
    return len(data)


def size_bytes(exported: Exported, name: str) -> int:
    """Bytes of the file that `save` writes. Raises as it does."""
    graph, model = _build(exported, name)
    return graph.size_bytes(model)


def load(path: str | os.PathLike[str]) -> dict[str, QTensor]:
    """The codes of every weight of a file that `save` wrote, by path; plain floats come as their values.

    Raises:
      MpqError: the file is no ONNX model, or not one of `save`.
    """
    onnx = require_onnx()
    from google.protobuf.message import DecodeError  # comes with onnx

    try:
        model = onnx.load(path)
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


def _build(exported: Exported, name: str) -> tuple[Graph, Any]:
    onnx = require_onnx()
    for spec in exported.weights:
        scheme = exported.qtensors[spec.path].scheme
        if reason := refusal(spec, scheme):
            raise MpqError(f"weight {spec.path} at {scheme} has no form in onnx: {reason}; choose another plan")
    closed, x, out = traced(_shapes(exported, name))
    graph, paths = Graph(onnx), sorted(exported.shapes)
    specs = {spec.param: spec for spec in exported.weights}
    params = {path: np.asarray(value) for path, value in exported.params.items()}
    Converter(graph, specs, exported.qtensors, params).run(closed, paths, x, out)
    described = {s.path: [str(exported.qtensors[s.path].scheme), s.k, s.n, s.batch] for s in exported.weights}
    metadata = {"mpq.model": name, "mpq.weights": json.dumps(described, sort_keys=True)}
    return graph, graph.model([x], [out], metadata)


def _shapes(exported: Exported, name: str) -> Any:
    """The model with shapes for parameters."""
    family = find_family(exported.config, FAMILIES)
    apply, _ = functional(nnx.eval_shape(lambda: family.build(family.parse(exported.config))))
    shapes = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in exported.shapes.items()}
    return make_model(apply, shapes, {}, exported.config, family, None, name)
