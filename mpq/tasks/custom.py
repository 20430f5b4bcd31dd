"""A person's own loss, as one function."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import mean_over_documents
from mpq.tasks.base import Quality
from mpq.types import MpqError

MAX_OUTPUTS = 1024
"""Longest output vector whose Hessian is formed."""


@dataclasses.dataclass(frozen=True)
class Custom:
    """A task given by what a change of the outputs costs.

    Everything else follows: the loss is that cost from the label, and the Fisher matrix is the Hessian of the cost at
    equal outputs, whose square root colours noise to give scores of that second moment.

    Attributes:
      cost: `(reference[d], outputs[d]) -> scalar` in nats: smooth, 0 and smallest at `outputs == reference`. It is
        mapped over all outputs.
      name: of the task.
      unit: of one output.
    """

    cost: Callable[[jax.Array, jax.Array], jax.Array]
    name: str = "custom"
    unit: str = "example"

    quality_name = "loss"
    agreement_name = "likeness"

    def counted(self, mask: Any) -> Any:
        """Every example with anything in it."""
        return np.any(mask.reshape(len(mask), -1), axis=1)

    def targets(self, inputs: Any, labels: Any) -> Any:
        """The labels."""
        del inputs
        return labels

    def distribution(self, outputs: jax.Array) -> jax.Array:
        """The outputs in float32."""
        return outputs.astype(jnp.float32)

    def loss(self, q: jax.Array, targets: jax.Array) -> jax.Array:
        """The cost of the outputs, seen from the targets."""
        return self.divergence(targets.reshape(q.shape).astype(q.dtype), q)

    def divergence(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """The cost of `q`, seen from `p`."""
        d = q.shape[-1]
        flat = jax.vmap(self.cost)(p.reshape(-1, d), q.reshape(-1, d))
        if flat.shape != (q.size // d,):
            raise MpqError(f"task {self.name}: the cost returned shape {flat.shape[1:]} for one output; it is a scalar")
        return flat.reshape(q.shape[:-1])

    def agreement(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """exp(-cost)."""
        return jnp.exp(-self.divergence(p, q))

    def fisher_root(self, outputs: jax.Array, noise: jax.Array) -> jax.Array:
        """H^(1/2) noise, H the Hessian of the cost at equal outputs; directions of negative curvature are left out.

        Raises:
          MpqError: the output is too long for a Hessian.
        """
        d = outputs.shape[-1]
        if d > MAX_OUTPUTS:
            raise MpqError(
                f"task {self.name} has outputs of {d} numbers: Fisher needs their Hessian, at most {MAX_OUTPUTS} wide; "
                "use the metric kl"
            )
        z = outputs.astype(jnp.float32).reshape(-1, d)
        hessian = jax.vmap(jax.hessian(self.cost, argnums=1))(z, z)
        values, vectors = jnp.linalg.eigh(hessian)
        coloured = noise.reshape(z.shape) * jnp.sqrt(jnp.maximum(values, 0.0))
        return jnp.einsum("nij,nj->ni", vectors, coloured).reshape(outputs.shape)

    def evidence(self, q: jax.Array, targets: jax.Array | None) -> jax.Array:
        """The loss; NaN without labels."""
        return jnp.full(q.shape[:-1], jnp.nan) if targets is None else self.loss(q, targets)

    def quality(self, evidence: np.ndarray, counts: np.ndarray, labels: np.ndarray | None) -> Quality:
        """Mean loss."""
        del labels
        return Quality(*map(float, mean_over_documents(evidence, counts)))
