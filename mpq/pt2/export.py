"""A quantized model as a program of `torch.export`: `mpq export OUT --to pt2`.

    import torch
    import torch.ao.quantization.fx._decomposed  # only where the plan has static ranges of activations
    model = torch.export.load("model.pt2").module()
    logits = model(tokens)

Text models read `input_ids`, `int64[batch, time]`, of any length within their context; others `inputs`. Schemes and
shapes of the weights lie in the archive beside the program, so that `load` gives the codes back; it reads no pickle.
"""

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.export.graphs import described, model_of, open_inputs, require_forms, rounded_rows
from mpq.export.jaxprs import trace_open
from mpq.export.orbax import Exported
from mpq.files import write_bytes
from mpq.formats import parse_scheme
from mpq.inputs import Inputs, Tokens
from mpq.models import Model
from mpq.progress import track
from mpq.pt2.activations import refusal as rounding_refusal
from mpq.pt2.convert import Converter
from mpq.pt2.graph import EXTRA, Graph, require_torch
from mpq.pt2.weights import read_codes, refusal
from mpq.types import MpqError, QTensor

_CONFIG = "data/weights/model_weights_config.json"


def save(path: str | os.PathLike[str], exported: Exported, name: str) -> int:
    """Write the file, whole or not at all.

    Args:
      path: of the file.
      exported: a quantized model, as `mpq.export.orbax.load` reads it.
      name: of the model, for a person.

    Returns:
      Its size in bytes, which is `size_bytes`.

    Raises:
      MpqError: a weight and its scheme, a rounded activation or an operation of the model have no form in PyTorch, the
        `torch` package is not installed, or the disk is full or refuses.
    """
    data = _build(exported, name)
    write_bytes(path, data)
    return len(data)


def size_bytes(exported: Exported, name: str) -> int:
    """Bytes of what `save` writes, counted by making it: `torch.export` alone knows its program. Raises as it does."""
    return len(_build(exported, name))


def load(path: str | os.PathLike[str]) -> dict[str, QTensor]:
    """The codes of every weight of a file that `save` wrote, by path; plain floats come as their values.

    Raises:
      MpqError: the file is no program of `torch.export`, or not one of `save`.
    """
    try:
        with zipfile.ZipFile(Path(path)) as archive:
            names = archive.namelist()
            (root,) = {name.removesuffix(_CONFIG) for name in names if name.endswith(_CONFIG)}
            (text,) = (name for name in names if name.endswith(f"/{EXTRA}"))
            weights = json.loads(archive.read(text))["weights"]
            places = json.loads(archive.read(root + _CONFIG))["config"]
            read = lambda place: np.frombuffer(archive.read(f"{root}data/weights/{place['path_name']}"), np.uint8)
            found: dict[str, QTensor] = {}
            for weight, (scheme, k, n, batch) in weights.items():
                parts = {p: f"{weight}.{p}" for p in ("qvalue", "scale", "zero_point", "tensor_scale", "codebook")}
                arrays = {part: read(places[place]) for part, place in parts.items() if place in places}
                found[weight] = read_codes(arrays, parse_scheme(scheme), k, n, batch)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise MpqError(f"{path} is no file that `mpq export --to pt2` wrote: {type(error).__name__}") from error
    return found


def _build(exported: Exported, name: str) -> bytes:
    torch = require_torch()
    require_forms(exported, "pt2", refusal)
    model = model_of(exported, name)
    rows = rounded_rows(exported, model, "pt2", rounding_refusal)
    opened, graph = open_inputs(model), Graph(torch)
    about: dict[str, Any] = {"model": name, "weights": json.loads(described(exported))}
    about["activations"] = {row.spec.path: str(row.scheme) for row in rows}
    steps: list[Callable[[Any], Any]] = [
        lambda _: _emit(graph, exported, model, rows, opened),
        lambda result: graph.program(result, *_example(graph, model.inputs, opened.shape)),
        lambda program: graph.file(program, json.dumps(about, sort_keys=True)),
    ]
    made: Any = None
    for step in track(steps, "export pt2", len(steps)):
        made = step(made)
    return made


def _emit(graph: Graph, exported: Exported, model: Model, rows: Sequence[RoundedActivation], opened: Any) -> Any:
    """The whole model in the graph; the node of its output."""
    closed = trace_open(model.apply, model.params, [opened], "batches or lengths, which one program cannot")
    specs = {spec.param: spec for spec in exported.weights}
    params = {path: np.asarray(value) for path, value in exported.params.items()}
    given = "input_ids" if isinstance(model.inputs, Tokens) else "inputs"
    return Converter(graph, specs, exported.qtensors, params, rows).run(
        closed, sorted(exported.shapes), opened.shape, given
    )


def _example(graph: Graph, inputs: Inputs, shape: Sequence[Any]) -> tuple[Any, dict[int, tuple[str, int, int | None]]]:
    """An input, and its open axes."""
    dims: dict[int, tuple[str, int, int | None]] = {0: ("batch", 1, None)}
    if isinstance(inputs, Tokens):
        dims[1] = "time", 2, inputs.context
    dtype = graph.torch.int64 if isinstance(inputs, Tokens) else graph.dtype(inputs.struct(1).dtype.name)
    return graph.torch.zeros([2 if axis in dims else size for axis, size in enumerate(shape)], dtype=dtype), dims
