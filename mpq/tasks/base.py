"""What all tasks share."""

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


class Quality(NamedTuple):
    """A task's own measure of a model, such as perplexity or accuracy, with its standard error."""

    value: float
    stderr: float


class Task(Protocol):
    """How a model's outputs are read. A frozen, hashable dataclass: compiled functions take it as a static argument.

    Outputs are `[batch, ..., d]`; one vector of `d` numbers is one output. Which outputs count is `bool[batch, ...]`.
    The outputs stand for a distribution with negative log-likelihood `loss` in nats. `divergence` is the KL between
    two of them, and the Hessian of `divergence` in the second at the first is the Fisher matrix of one output (Martens
    2020, JMLR 21(146), section 5): metrics that are "in nats" mean this divergence.
    """

    @property
    def name(self) -> str:
        """Key in `TASKS`."""
        ...

    @property
    def unit(self) -> str:
        """What one output is about: `token`, `example`."""
        ...

    @property
    def quality_name(self) -> str:
        """Name of the measure that `quality` returns."""
        ...

    @property
    def agreement_name(self) -> str:
        """Name of what `agreement` returns."""
        ...

    def counted(self, mask: Any) -> Any:
        """Which outputs count, `bool[batch, ...]`, from `Dataset.mask`."""
        ...

    def targets(self, inputs: Any, labels: Any) -> Any:
        """What every output is compared with in `loss`, or None if the data has no such thing."""
        ...

    def distribution(self, outputs: jax.Array) -> jax.Array:
        """Outputs to parameters of their distribution, float32 and of the same shape."""
        ...

    def loss(self, q: jax.Array, targets: jax.Array) -> jax.Array:
        """Negative log-likelihood of `targets` under distribution `q`, `[batch, ...]` nats."""
        ...

    def divergence(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """KL(p || q) of every output, `[batch, ...]` nats."""
        ...

    def agreement(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """How far two models decide alike, `[batch, ...]`, 1 where they fully do."""
        ...

    def fisher_root(self, outputs: jax.Array, noise: jax.Array) -> jax.Array:
        """S_t noise_t for every output t, where S_t S_t^T is its Fisher matrix; linear in `noise`, and of its shape.

        Noise of second moment I gives scores, gradients of the loss at targets drawn from the outputs' own
        distribution, in all that a quadratic form sees of them; signs with less variance than drawn targets.
        """
        ...

    def evidence(self, q: jax.Array, targets: jax.Array | None) -> jax.Array:
        """What `quality` is made of.

        A number for every output, `[batch, ...]`, is summed over documents; of vectors, `[batch, d]`, documents of two
        rows (pairs) have the inner product.
        """
        ...

    def quality(self, evidence: np.ndarray, counts: np.ndarray, labels: np.ndarray | None) -> Quality:
        """The task's own measure.

        Args:
          evidence: `float64[D]`, of every document.
          counts: `[D]`, outputs of each document.
          labels: `[D, ...]`, labels of the documents' first examples, or None.
        """
        ...
