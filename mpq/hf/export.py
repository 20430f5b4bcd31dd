"""A quantized model as a checkpoint folder that `transformers` loads: `mpq export OUT --to hf`, `gptq`, `bnb` ...

    FOLDER/config.json           the model's, with `quantization_config`
    FOLDER/model.safetensors     packed weights, and every other parameter in the dtype that it is stored in
    FOLDER/tokenizer.json ...    if the model has a tokenizer

`dtype` of the config is that of the scales, so that no loader rounds them: float16 unless the plan says otherwise.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mpq.export.orbax import Exported
from mpq.files import canonical_json, writing
from mpq.hf.container import Container, Part
from mpq.hf.file import METADATA, predicted_bytes
from mpq.hf.sites import Names, names_of, require
from mpq.models.checkpoint import write_config
from mpq.models.family import Stored
from mpq.progress import track
from mpq.types import MpqError, Scheme, WeightSpec

WEIGHTS = "model.safetensors"
FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Plain float format -> the dtype that it is stored in."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: what it is, and what makes it."""

    part: Part
    make: Callable[[], np.ndarray]


def save(path: str | os.PathLike[str], exported: Exported, container: Container) -> int:
    """Write the folder, whole or not at all.

    Args:
      path: of the folder.
      exported: a quantized model, as `mpq.export.orbax.load` reads it.
      container: a value of `CONTAINERS`.

    Returns:
      Bytes of the weights file, which is `size_bytes`.

    Raises:
      MpqError: a weight and its scheme have no form in the container, or the disk is full or refuses.
    """
    names = names_of(exported.config, tuple(exported.shapes), exported.weights)
    tensors, config = _tensors(exported, container, names), _config(exported, container, names)
    made = {name: t.make() for name, t in track(tensors.items(), f"export {container.name}", len(tensors))}
    with writing(path) as sibling:
        sibling.mkdir()
        save_file(made, sibling / WEIGHTS, metadata=METADATA)
        write_config(sibling, config)
        if exported.tokenizer_json is not None:
            (sibling / "tokenizer.json").write_bytes(exported.tokenizer_json.encode())
            (sibling / "tokenizer_config.json").write_text(canonical_json(_tokenizer_config(exported)))
        return (sibling / WEIGHTS).stat().st_size


def size_bytes(exported: Exported, container: Container) -> int:
    """Bytes of the weights file that `save` writes. Raises as it does."""
    names = names_of(exported.config, tuple(exported.shapes), exported.weights)
    return predicted_bytes({name: t.part for name, t in _tensors(exported, container, names).items()})


def _tensors(exported: Exported, container: Container, names: Names) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    by_param: dict[str, list[WeightSpec]] = {path: [] for path in exported.shapes}
    for spec in exported.weights:
        require(container, spec, names.sites.get(spec.path), exported.qtensors[spec.path].scheme)
        by_param[spec.param].append(spec)
    for path, specs in by_param.items():
        qtensors = [exported.qtensors[spec.path] for spec in specs]
        if qtensors and qtensors[0].scheme.has_scale:
            (spec,), (qtensor,) = specs, qtensors
            qtensor.require_neighbours(spec.path)
            try:
                made = container.pack(qtensor)
            except MpqError as error:
                raise MpqError(f"weight {spec.path} at {qtensor.scheme}: {error}") from error
            for end, part in container.parts(qtensor.scheme, spec.k, spec.n).items():
                found[f"{names.sites[spec.path].module}.{end}"] = _Tensor(part, lambda array=made[end]: array)
            for end, array in container.beside.get(spec.path, {}).items():
                part = Part(array.dtype.name, array.shape)
                found[f"{names.sites[spec.path].module}.{end}"] = _Tensor(part, lambda array=array: array)
        else:
            found |= _plain(exported, path, specs, names.stored[path])
    return found


def _plain(exported: Exported, path: str, specs: list[WeightSpec], stored: Stored) -> dict[str, _Tensor]:
    """The tensors of a parameter that stays in floating point, in the dtype that it is stored in."""
    kept = exported.params.get(path)
    values = [np.asarray(exported.qtensors[spec.path].qvalue) for spec in specs] + ([] if kept is None else [kept])
    dtypes = {value.dtype for value in values}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype("float32")
    param = jnp.zeros(exported.shapes[path][0], "float32") if kept is None else jnp.asarray(kept, "float32")
    for spec in specs:
        param = spec.from_matrix(exported.qtensors[spec.path].dequantize(), param)
    array = np.asarray(param).astype(dtype)
    parts = array if len(stored.names) > 1 else array[None]
    found: dict[str, _Tensor] = {}
    for name, part in zip(stored.names, parts, strict=True):
        value = np.ascontiguousarray(part.transpose(np.argsort(stored.permutation)) if stored.permutation else part)
        value = value.reshape(part.shape if not stored.permutation else value.shape)  # a scalar stays one
        found[name] = _Tensor(Part(dtype.name, value.shape), lambda value=value: value)
    return found


def _config(exported: Exported, container: Container, names: Names) -> dict[str, Any]:
    schemes = {path: qtensor.scheme for path, qtensor in exported.qtensors.items()}
    sites = {site.module: site for site in names.sites.values()}
    modules: dict[str, Scheme] = {site.module: schemes[path] for path, site in names.sites.items()}
    config = {key: value for key, value in exported.config.items() if key != "torch_dtype"}
    quantization = container.config(modules, sites)
    return config | {"dtype": _dtype(container, modules), "quantization_config": quantization}


def _dtype(container: Container, modules: Mapping[str, Scheme]) -> str:
    """Of the scales, and of what the loader computes in: none of them is rounded.

    Scales of bitsandbytes are always float32, and its loader leaves plain floats in the dtype of the file: then it is
    theirs, where they agree.
    """
    dtypes = {scheme.scale_dtype for scheme in modules.values() if scheme.has_scale}
    dtypes |= {of["input_scale"].dtype.name for of in container.beside.values()}
    if dtypes and container.scale_dtype is not None:
        dtypes = {FLOATS[scheme.format.name] for scheme in modules.values() if not scheme.has_scale}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _tokenizer_config(exported: Exported) -> dict[str, Any]:
    """What `AutoTokenizer` needs beside `tokenizer.json`: its class, and which tokens begin and end a text."""
    vocabulary = json.loads(exported.tokenizer_json or "{}")
    ids = {entry["id"]: entry["content"] for entry in vocabulary.get("added_tokens", [])}
    special = {name: ids.get(exported.config.get(f"{name}_id")) for name in ("bos_token", "eos_token", "pad_token")}
    given = {name: token for name, token in special.items() if token is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **given}
