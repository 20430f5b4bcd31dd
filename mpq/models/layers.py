"""What encoder and vision families share: activations by name, and how PyTorch names what a Flax layer holds."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

from mpq.models.family import LINEAR, Stored
from mpq.types import MpqError

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "relu": jax.nn.relu,
        "relu6": jax.nn.relu6,
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
    }
)
"""By the name that a `config.json` uses. `gelu` is exact, x * Phi(x), and the other two are its approximation by a
hyperbolic tangent (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2)."""

PYTORCH_LEAVES: Mapping[str, str] = MappingProxyType(
    {"kernel": "weight", "embedding": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
)
"""Name of a Flax layer's variable -> name that PyTorch gives the same array; the others have one name in both."""

NUM_BATCHES_TRACKED = r".*\.num_batches_tracked"
"""Tensors in which PyTorch's batch norm counts training steps: inference does not need them."""


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that a config calls `name`.

    Raises:
      MpqError: it is unknown; lists those that are not.
    """
    if name not in ACTIVATIONS:
        raise MpqError(f"config key 'hidden_act' is {name!r}: supported is {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def layer_norm(features: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalization (Ba et al. 2016, arXiv:1607.06450) as PyTorch computes it.

    The variance is the mean of squared deviations: the shorter mean of squares minus square of the mean loses the
    digits that a large mean takes.
    """
    return nnx.LayerNorm(features, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def pytorch_tensor(path: str, kernel: tuple[int, ...] = LINEAR) -> Stored:
    """The tensor of a PyTorch module whose modules are named like ours.

    Args:
      path: module and variable joined by dots: `conv1.kernel`.
      kernel: permutation of a variable called `kernel`; any other is stored as it is.
    """
    module, _, leaf = path.rpartition(".")
    return Stored((f"{module}.{PYTORCH_LEAVES.get(leaf, leaf)}",), kernel if leaf == "kernel" else ())


def num_labels(config: Mapping[str, Any]) -> int:
    """Number of classes that a Hugging Face config implies: it writes their names, and nothing where they are two.

    Raises:
      MpqError: there are none, so that the model would have no head.
    """
    names = config.get("id2label")
    labels = config.get("num_labels", 2 if names is None else len(names))
    if labels < 1:
        raise MpqError(f"the config has {labels} labels: a model that classifies needs at least one")
    return labels


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """`config` less the keys of its family that do not change what a forward pass computes."""
    return {key: value for key, value in config.items() if key not in keys}
