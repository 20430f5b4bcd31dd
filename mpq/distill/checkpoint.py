"""The state of an interrupted training in one file: what was learned, the optimizer's moments, the losses so far."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.array_file import read_arrays, write_arrays
from mpq.types import MpqError

KIND = "distillation"


def save(path: Path, whole: Any, losses: list[float], told: Mapping[str, str]) -> None:
    """Write it; `told["of"]` says which training it is of."""
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(whole))}
    write_arrays(path, KIND, {**told, "losses": losses}, arrays)


def load(path: Path, like: Any, told: Mapping[str, str]) -> tuple[Any, list[float]]:
    """The state in `path`, in the form and on the devices of `like`, and the losses of the steps that it has behind it.

    Raises:
      MpqError: the file is damaged, or of another training.
    """
    header, arrays = read_arrays(path, KIND, "mpq quantize")
    if header["of"] != told["of"]:
        raise MpqError(
            f"{path} belongs to a distillation of another model, plan, text or options: remove it to start anew"
        )
    leaves, form = jax.tree.flatten(like)
    place = lambda array, leaf: jax.device_put(jnp.asarray(array), leaf.sharding)
    return form.unflatten([place(arrays[str(i)], leaf) for i, leaf in enumerate(leaves)]), header["losses"]
