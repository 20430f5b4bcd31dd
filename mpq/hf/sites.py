"""Where a checkpoint of the Hugging Face layout keeps every weight and every other parameter of a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpq.hf.container import Container, Site
from mpq.models import FAMILIES, find_family
from mpq.models.family import Stored
from mpq.types import MpqError, Scheme, WeightSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
    """The names of one model's parameters.

    Attributes:
      stored: parameter path -> its tensors.
      sites: weight path -> the linear layer or embedding it is; missing where it is none.
    """

    stored: Mapping[str, Stored]
    sites: Mapping[str, Site]


def names_of(config: Mapping[str, Any], paths: Sequence[str], weights: Sequence[WeightSpec]) -> Names:
    """The names that the family of a config gives.

    Raises:
      MpqError: the config is of no family.
    """
    family = find_family(config, FAMILIES)
    parsed = family.parse(config)
    stored = {path: family.stored(parsed, path) for path in paths}
    sites = {
        spec.path: site._replace(module=stored[spec.param].names[0].removesuffix(".weight"))
        for spec in weights
        if (site := site_of(spec)) is not None and is_module(spec, stored[spec.param])
    }
    return Names(stored, sites)


HEADS = ("lm_head.kernel", "classifier.kernel", "head.kernel")
"""Parameters whose outputs are the model's."""


def site_of(spec: WeightSpec) -> Site | None:
    """What a weight looks like from a checkpoint whose names are not known; None of a stack or a convolution."""
    if spec.index or spec.batch > 1 or spec.factors or len(spec.shape) != 2:
        return None
    head = spec.param in HEADS or "+" in spec.kind
    return Site(spec.path, spec.param.rpartition(".")[0], spec.kind, spec.k, spec.n, head)


def is_module(spec: WeightSpec, stored: Stored) -> bool:
    """Whether a weight is the whole `weight`, `[n, k]`, of one PyTorch module."""
    if site_of(spec) is None or len(stored.names) != 1 or not stored.names[0].endswith(".weight"):
        return False
    order = stored.permutation or (0, 1)
    return tuple(order[axis] for axis in spec.permutation) == (1, 0)


def require(container: Container, spec: WeightSpec, site: Site | None, scheme: Scheme) -> None:
    """Refuse what a container cannot store.

    Raises:
      MpqError: names the weight, the scheme and the reason.
    """
    if reason := why_not(container, spec, site, scheme):
        raise MpqError(f"weight {spec.path} at {scheme} has no form in {container.name}: {reason}; choose another plan")


def why_not(container: Container, spec: WeightSpec, site: Site | None, scheme: Scheme) -> str | None:
    """Why a container cannot store a weight under a scheme; None where it can. Plain floats it always can."""
    if not scheme.has_scale:
        return None
    if site is None:
        shape = " x ".join(map(str, spec.shape))
        return f"it takes linear layers and embeddings, and this is {spec.kind} of {shape}, or one of a stack"
    return container.refusal(site, scheme)
