"""Models: families, checkpoints, and any Flax module.

`FAMILIES` lists the architectures that `load` reads; a new one is one file and one line here.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from flax import nnx
from tokenizers import Tokenizer

from mpq.export import orbax
from mpq.models import llama
from mpq.models.checkpoint import find_family, load_checkpoint, make_model, resolve
from mpq.models.family import Family
from mpq.models.model import Model, functional

FAMILIES: Mapping[str, Family] = MappingProxyType({"llama": llama.FAMILY})

__all__ = ["FAMILIES", "Family", "Model", "find_family", "functional", "load", "resolve"]


def load(source: str) -> Model:
    """The model that `source` names.

    Args:
      source: `reference`; a folder in the Hugging Face layout; a folder that `mpq quantize` wrote, whose weights come
        dequantized; or a hub id `owner/name[@revision]`.

    Raises:
      MpqError: what is missing or wrong, by name.
    """
    folder = resolve(str(source))
    name = "reference" if source == "reference" else folder.name
    if (folder / orbax.MANIFEST).exists():
        return _load_quantized(folder, name)
    return load_checkpoint(folder, FAMILIES, name)


def _load_quantized(folder: Path, name: str) -> Model:
    exported = orbax.load(folder)
    family = find_family(exported.config, FAMILIES)
    apply, _ = functional(nnx.eval_shape(lambda: family.build(family.parse(exported.config))))
    tokenizer = None if exported.tokenizer_json is None else Tokenizer.from_str(exported.tokenizer_json)
    stored = {
        path: str(exported.params[path].dtype) if path in exported.params else "float32" for path in exported.shapes
    }
    return make_model(apply, exported.dequantized(), stored, exported.config, family, tokenizer, name)
