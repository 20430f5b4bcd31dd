"""Models: families, checkpoints, and any Flax module.

`FAMILIES` lists the architectures that `load` reads; a new one is one file and one line here.
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpq.models import llama
from mpq.models.checkpoint import find_family, load_checkpoint, resolve
from mpq.models.family import Family
from mpq.models.model import Model, functional

FAMILIES: Mapping[str, Family] = MappingProxyType({"llama": llama.FAMILY})

__all__ = ["FAMILIES", "Family", "Model", "find_family", "functional", "load"]


def load(source: str) -> Model:
    """The model that `source` names: `reference`, a folder in the Hugging Face layout, or a hub id `owner/name[@revision]`.

    Raises:
      MpqError: what is missing or wrong, by name.
    """
    folder = resolve(str(source))
    name = "reference" if source == "reference" else folder.name
    return load_checkpoint(folder, FAMILIES, name)
