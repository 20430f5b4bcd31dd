"""A quantized checkpoint of the Hugging Face layout as codes: the way back from `mpq.hf.export.save`, bit for bit."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import activation_rows
from mpq.artifacts import make_plan
from mpq.export.orbax import Exported
from mpq.formats import FORMATS
from mpq.hf.export import FLOATS
from mpq.hf.reading import QuantizedTensors, split_config
from mpq.hf.sites import is_module
from mpq.models import FAMILIES, Model, find_family
from mpq.models.checkpoint import load_checkpoint, match, read_config
from mpq.models.family import Stored
from mpq.models.tensors import find_tensors
from mpq.trace import Trace
from mpq.types import MpqError, QTensor, Scheme


def load_codes(path: str | os.PathLike[str]) -> Exported:
    """Read a checkpoint whose `config.json` has a `quantization_config`.

    Weights that it keeps as floats come under the scheme of that float; inputs that its runtimes round, as those of
    compressed-tensors do, are activations of the plan.

    Raises:
      MpqError: the folder is no quantized checkpoint, or a part of it is missing or not read.
    """
    folder = Path(path)
    config, quantized = _opened(folder)
    model = load_checkpoint(folder, FAMILIES, folder.name)
    wanted = _stored(quantized, config, model)
    traced = model.trace()
    weights = traced.weights
    qtensors: dict[str, QTensor] = {}
    for spec in weights:
        stored = wanted[spec.param]
        if all(quantized.scheme(name) is None for name in stored.names):
            qtensors[spec.path] = _plain(spec.read(model.params), model.stored[spec.param])
        elif is_module(spec, stored):
            qtensors[spec.path] = quantized.qtensor(stored.names[0])
        else:
            raise MpqError(f"weight {spec.path} of {folder} is one of a stack, whose codes are not read")
    covered = {spec.param for spec in weights}
    params = {p: np.asarray(v).astype(jnp.dtype(model.stored[p])) for p, v in model.params.items() if p not in covered}
    schemes = {path: qtensor.scheme for path, qtensor in qtensors.items()}
    indices = (q.row_group for q in qtensors.values() if q.row_group is not None)
    other = 8 * sum(array.nbytes for array in (*params.values(), *indices))
    chosen = tuple(_rounded(folder, quantized, traced, wanted))
    rows = {one.spec.path: one.to_json() for one in chosen}
    ranges = {one.spec.path: np.array([one.low, one.high], np.float32) for one in chosen if one.low is not None}
    plan = make_plan(folder.name, schemes, None, weights, other, model.digest, rows)
    shapes = {p: (tuple(v.shape), str(v.dtype)) for p, v in model.params.items()}
    text = (folder / "tokenizer.json").read_text() if (folder / "tokenizer.json").exists() else None
    return Exported(plan.to_json(), config, text, weights, qtensors, params, shapes, ranges)


def rounded_inputs(folder: Path, model: Model) -> tuple[RoundedActivation, ...]:
    """The inputs that runtimes of a quantized checkpoint round; `model` is what was read of it.

    Raises:
      MpqError: weights that read the same one have it rounded differently, or a range is missing or none of ours.
    """
    config, quantized = _opened(folder)
    if not quantized.rounds_inputs:
        return ()
    return tuple(_rounded(folder, quantized, model.trace(), _stored(quantized, config, model)))


def _opened(folder: Path) -> tuple[dict[str, Any], QuantizedTensors]:
    """The model's config, and the tensors.

    Raises:
      MpqError: the folder is no quantized checkpoint, or of a kind that is not read.
    """
    config, quantization = split_config(read_config(folder))
    tensors = find_tensors(folder)
    if quantization is None or tensors is None:
        raise MpqError(f"{folder} is no quantized checkpoint: it lacks a quantization_config or weights")
    return config, QuantizedTensors(tensors, quantization)


def _stored(quantized: QuantizedTensors, config: Mapping[str, Any], model: Model) -> Mapping[str, Stored]:
    """Which tensors every parameter is made of."""
    family = find_family(config, FAMILIES)
    return match(quantized, family, family.parse(config), model.params)[0]


def _rounded(
    folder: Path, quantized: QuantizedTensors, traced: Trace, wanted: Mapping[str, Stored]
) -> Iterator[RoundedActivation]:
    """The inputs that are rounded.

    Raises:
      MpqError: as `rounded_inputs`.
    """
    names = {spec.path: wanted[spec.param].names[0] for spec in traced.weights}
    modules = {path: name for path, name in names.items() if quantized.scheme(name) is not None}
    for row in activation_rows(traced):
        found = [quantized.inputs(modules[path]) if path in modules else None for path in row.weights]
        told = {None if one is None else (one[0], None if one[1] is None else one[1].tobytes()) for one in found}
        if len(told) > 1:
            raise MpqError(f"readers of the activation {row.path} of {folder} round it differently, which is not read")
        if found[0] is not None:
            scheme, limits = found[0]
            yield RoundedActivation.from_json({**dataclasses.asdict(row), "scheme": scheme}, limits)


def _plain(matrix: jnp.ndarray, dtype: str) -> QTensor:
    name = next(name for name, stored in FLOATS.items() if stored == dtype)
    return QTensor(matrix.astype(dtype), None, None, Scheme(FORMATS[name]))
