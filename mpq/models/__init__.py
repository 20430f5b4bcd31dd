"""Models: families, checkpoints, and any Flax module.

`FAMILIES` lists the architectures that `load` reads; a new one is one file and one line here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import unquote

from flax import nnx
from tokenizers import Tokenizer

from mpq.export import orbax
from mpq.files import read_json
from mpq.gguf.reader import is_gguf
from mpq.models import (
    bert,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    mobilenet_v2,
    opt,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    resnet,
    resnet_cifar,
    squeezenet,
    vit,
)
from mpq.models.checkpoint import (
    abstract_checkpoint,
    find_family,
    load_checkpoint,
    make_model,
    read_tokenizer,
    save_orbax,
)
from mpq.models.family import Family
from mpq.models.hub import model_name, resolve
from mpq.models.model import Model, functional
from mpq.models.python import is_python, load_python

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": llama.FAMILY,
        "gemma2": gemma2.FAMILY,
        "gemma3_text": gemma3.FAMILY,
        "gpt2": gpt2.FAMILY,
        "gpt_neox": gpt_neox.FAMILY,
        "mistral": mistral.FAMILY,
        "mixtral": mixtral.FAMILY,
        "opt": opt.FAMILY,
        "phi3": phi3.FAMILY,
        "qwen2": qwen2.FAMILY,
        "qwen2_moe": qwen2_moe.FAMILY,
        "qwen3": qwen3.FAMILY,
        "qwen3_moe": qwen3_moe.FAMILY,
        "bert": bert.FAMILY,
        "deit": vit.DEIT_FAMILY,
        "mobilenet_v2": mobilenet_v2.FAMILY,
        "resnet": resnet.FAMILY,
        "resnet_cifar": resnet_cifar.CIFAR,
        "resnet_mlperf_tiny": resnet_cifar.MLPERF_TINY,
        "squeezenet": squeezenet.FAMILY,
        "vit": vit.VIT,
    }
)

if TYPE_CHECKING:
    from mpq.activations.apply import RoundedActivation

__all__ = ["FAMILIES", "Family", "Model", "find_family", "functional", "load", "load_shapes", "resolve", "save_orbax"]


def load(source: str) -> Model:
    """The model that `source` names.

    Args:
      source: `reference`; a folder with `config.json` and safetensors, or an Orbax checkpoint in `params/`; a folder
        that `mpq quantize` wrote, or a quantized checkpoint of the hub, whose weights come dequantized and whose
        activations are rounded as their runtimes do; a GGUF file, dequantized; a hub id `owner/name[@revision]`; or a
        Python file that defines `MODEL`.

    Raises:
      MpqError: what is missing or wrong, by name.
    """
    if is_python(source):
        return load_python(Path(source))
    if is_gguf(source):
        from mpq.gguf.load import load_gguf  # it imports this package

        return load_gguf(source, FAMILIES)
    folder = resolve(str(source))
    name = model_name(str(source), folder)
    if (folder / orbax.MANIFEST).exists():
        return _load_quantized(folder, name)
    model = load_checkpoint(folder, FAMILIES, name)
    if not model.schemes:
        return model
    from mpq.hf.load import rounded_inputs  # it imports this package

    return _rounding(model, rounded_inputs(folder, model))


def load_shapes(source: str) -> Model:
    """The model that `source` names, its parameters as shapes: to be traced and sized, not run. Reads no weight.

    Args:
      source: as for `load`; also a folder with a `config.json` alone, or that file under any name.

    Raises:
      MpqError: what is missing or wrong, by name.
    """
    if is_python(source):
        return load_python(Path(source))
    if is_gguf(source):
        from mpq.gguf.load import load_gguf_shapes

        return load_gguf_shapes(source, FAMILIES)
    path = Path(source)
    if path.is_file():
        folder = path.parent if path.name == "config.json" else path
    else:
        folder = resolve(str(source), weights=False)
    name = model_name(str(source), folder)
    if (folder / orbax.MANIFEST).exists():
        return _quantized_shapes(folder, name)
    return abstract_checkpoint(folder, FAMILIES, name)


def _load_quantized(folder: Path, name: str) -> Model:
    exported = orbax.load(folder)
    family = find_family(exported.config, FAMILIES)
    apply, _ = functional(nnx.eval_shape(lambda: family.build(family.parse(exported.config))))
    tokenizer = None if exported.tokenizer_json is None else Tokenizer.from_str(exported.tokenizer_json)
    stored = {
        path: str(exported.params[path].dtype) if path in exported.params else "float32" for path in exported.shapes
    }
    model = make_model(apply, exported.dequantized(), stored, exported.config, family, tokenizer, name)
    from mpq.activations.apply import RoundedActivation  # what rounds models imports this package

    rows = exported.plan.get("activations") or {}
    return _rounding(model, [RoundedActivation.from_json(row, *exported.of_row(path)) for path, row in rows.items()])


def _rounding(model: Model, chosen: Sequence["RoundedActivation"]) -> Model:
    """The model with these activations rounded, if any."""
    if not chosen:
        return model
    from mpq.activations.apply import with_activations

    return with_activations(model, model.trace(), chosen)


def _quantized_shapes(folder: Path, name: str) -> Model:
    manifest = read_json(folder / orbax.MANIFEST, "the quantized model's manifest")
    family = find_family(manifest["config"], FAMILIES)
    apply, shapes = functional(nnx.eval_shape(lambda: family.build(family.parse(manifest["config"]))))
    kept = {unquote(key): entry["dtype"] for key, entry in manifest["arrays"].items()}
    stored = {path: kept.get(f"params.{path}", "float32") for path in shapes}
    return make_model(apply, shapes, stored, manifest["config"], family, read_tokenizer(folder), name)
