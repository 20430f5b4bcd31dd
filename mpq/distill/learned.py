"""What a training changes, the loss of it, and the optimizer, with a rate of its own for every kind of number."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import replacing
from mpq.distill.beside import reconstruct_beside
from mpq.distill.latent import Latent, reconstruct
from mpq.distill.rows import start_rows, train_rounded
from mpq.models.model import Model
from mpq.trace import Trace
from mpq.types import Params, QTensor, WeightSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """The numbers that are trained.

    Attributes:
      weights: of quantized weights, by path.
      ranges: of static ranges of activations, by path of the row.
      beside: of parameters that hold no weight, by path.
    """

    weights: dict[str, Latent]
    ranges: dict[str, jax.Array]
    beside: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """What stays while they are trained.

    Attributes:
      original: parameters of the float model.
      params: those of the quantized one, before its trained weights are put in.
      qtensors: what the trained weights began with, by path.
    """

    original: Params
    params: Params
    qtensors: dict[str, QTensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """The quantized model that is trained, and its loss.

    Attributes:
      model: the original.
      traced: its trace, for inputs of any shape.
      specs: of the weights that are trained, by path.
      rows: activations that are rounded.
      kept: parameters beside the weights that stay positive.
    """

    model: Model
    traced: Trace
    specs: Mapping[str, WeightSpec]
    rows: tuple[RoundedActivation, ...]
    kept: frozenset[str]

    def loss(self, learned: Learned, fixed: Fixed, inputs: jax.Array, counted: jax.Array) -> jax.Array:
        """Mean KL(original || quantized) of the outputs that count, nats."""
        model = self.model
        p = model.task.distribution(model.apply(fixed.original, inputs))
        q = model.task.distribution(self.outputs(learned, fixed, inputs))
        total = jnp.sum(model.task.divergence(p, q), where=counted)
        return total / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)

    def outputs(self, learned: Learned, fixed: Fixed, inputs: jax.Array) -> jax.Array:
        """Those of the quantized model."""
        moved = reconstruct_beside(learned.beside, fixed.params, self.model.stored, self.kept)
        params = {**fixed.params, **moved}
        for path, spec in self.specs.items():
            qtensor = fixed.qtensors[path]
            latent = learned.weights[path].merged(spec.read(fixed.original), qtensor)
            params = spec.write(params, reconstruct(latent, qtensor))
        if not self.rows:
            return self.model.apply(params, inputs)
        still = start_rows(self.rows)

        def change(number: int, x: jax.Array) -> jax.Array:
            one = self.rows[number]
            return train_rounded(one, x, len(inputs), learned.ranges.get(one.spec.path, still.get(one.spec.path)))

        replace = replacing([one.spec for one in self.rows], change)
        return self.traced.on(inputs.shape).evaluate(params, inputs, replace)


def optimizer(learned: Learned, rates: Mapping[str, float], warmup: int, steps: int) -> optax.GradientTransformation:
    """Adam with warmup and cosine decay.

    Args:
      learned: what it is for.
      rates: peak rate of each kind: the fields of `Latent`, `ranges`, `beside`.
      warmup: steps over which rates rise.
      steps: in all.
    """
    adam = lambda peak: optax.adam(optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps), b2=0.99, eps=1e-12)

    def kind(path: tuple[Any, ...], _: Any) -> str:
        return path[-1].name if path[0].name == "weights" else path[0].name

    kinds = jax.tree_util.tree_map_with_path(kind, learned)
    return optax.multi_transform({name: adam(peak) for name, peak in rates.items()}, kinds)
