"""A model whose head has a table of its own, where the format of its checkpoint has a place for one."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mpq.models import FAMILIES
from mpq.models.model import Model, functional
from mpq.types import MpqError

TIED = "tie_word_embeddings"
"""Key of a `config.json` that says that the head is the table of embeddings."""


def untie(model: Model, path: str) -> Model:
    """The same function with a copy of the parameter `path` for the head.

    Args:
      model: a tied language model, read from a checkpoint.
      path: its table of embeddings, `[vocabulary, width]`.

    Raises:
      MpqError: the model has no `config.json`, or its family has no head of its own.
    """
    family = FAMILIES.get(str(model.config.get("model_type")))
    if family is None:
        raise MpqError(
            f"`{path}` is both looked up and multiplied, and {model.name} has no config.json that could give the head "
            "a table of its own: give it one in the model's code"
        )
    config = {**model.config, TIED: False}
    apply, shapes = functional(nnx.eval_shape(lambda: family.build(family.parse(config))))
    new = sorted(shapes.keys() - model.params.keys())
    table = model.params[path]
    if len(new) != 1 or sorted(shapes[new[0]].shape) != sorted(table.shape):
        raise MpqError(
            f"`{path}` is both looked up and multiplied, and the family {family.name} has no head of its own"
        )
    head = table if shapes[new[0]].shape == table.shape else table.T
    params = {name: jnp.array(head) if name == new[0] else model.params[name] for name in shapes}
    stored = {**model.stored, new[0]: model.stored[path]}
    return dataclasses.replace(model, apply=apply, params=params, stored=stored, config=config)
