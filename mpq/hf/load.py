"""A quantized checkpoint of the Hugging Face layout as codes: the way back from `mpq.hf.export.save`, bit for bit."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mpq.artifacts import make_plan
from mpq.export.orbax import Exported
from mpq.formats import FORMATS
from mpq.hf.export import FLOATS
from mpq.hf.reading import QuantizedTensors, split_config
from mpq.hf.sites import is_module
from mpq.models import FAMILIES, find_family, load
from mpq.models.checkpoint import match, read_config
from mpq.models.tensors import find_tensors
from mpq.types import MpqError, QTensor, Scheme


def load_codes(path: str | os.PathLike[str]) -> Exported:
    """Read a checkpoint whose `config.json` has a `quantization_config`.

    Weights that it keeps as floats come under the scheme of that float.

    Raises:
      MpqError: the folder is no quantized checkpoint, or a part of it is missing or not read.
    """
    folder = Path(path)
    config, quantization = split_config(read_config(folder))
    tensors = find_tensors(folder)
    if quantization is None or tensors is None:
        raise MpqError(f"{folder} is no quantized checkpoint: it lacks a quantization_config or weights")
    quantized = QuantizedTensors(tensors, quantization)
    model = load(str(folder))
    family = find_family(config, FAMILIES)
    wanted, _ = match(quantized, family, family.parse(config), model.params)
    weights = model.trace().weights
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
    plan = make_plan(folder.name, schemes, None, weights, other, model.digest)
    shapes = {p: (tuple(v.shape), str(v.dtype)) for p, v in model.params.items()}
    text = (folder / "tokenizer.json").read_text() if (folder / "tokenizer.json").exists() else None
    return Exported(plan.to_json(), config, text, weights, qtensors, params, shapes)


def _plain(matrix: jnp.ndarray, dtype: str) -> QTensor:
    name = next(name for name, stored in FLOATS.items() if stored == dtype)
    return QTensor(matrix.astype(dtype), None, None, Scheme(FORMATS[name]))
