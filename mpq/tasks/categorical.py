"""Tasks whose outputs are logits of a categorical distribution: language modelling and classification."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import mean_over_documents
from mpq.tasks.base import Quality


def distribution(outputs: jax.Array) -> jax.Array:
    """Log-softmax over the last axis, float32."""
    return jax.nn.log_softmax(outputs.astype(jnp.float32), axis=-1)


def loss(q: jax.Array, targets: jax.Array) -> jax.Array:
    """-log q(target)."""
    return -jnp.take_along_axis(q, targets[..., None], axis=-1)[..., 0]


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """sum_v p_v (log p_v - log q_v); a class with p = 0 adds nothing, also where both logits are -inf."""
    probability = jnp.exp(p)
    return jnp.sum(jnp.where(probability > 0, probability * (p - q), 0.0), axis=-1)


def agreement(p: jax.Array, q: jax.Array) -> jax.Array:
    """1 where both have the same most likely class."""
    return (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(jnp.float32)


def fisher_root(outputs: jax.Array, noise: jax.Array) -> jax.Array:
    """S noise with S = diag(sqrt p) - p sqrt(p)^T, for which S S^T = diag(p) - p p^T."""
    p = jax.nn.softmax(outputs, axis=-1)
    coloured = jnp.sqrt(p) * noise
    return coloured - p * jnp.sum(coloured, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: `logits[batch, time, vocab]`, where the output at a position predicts the next token.

    An output counts if the token that it predicts is real. Quality: perplexity, exp of the mean loss.
    """

    name = "causal_lm"
    unit = "token"
    quality_name = "perplexity"
    agreement_name = "top1_agreement"

    distribution = staticmethod(distribution)
    loss = staticmethod(loss)
    divergence = staticmethod(divergence)
    agreement = staticmethod(agreement)
    fisher_root = staticmethod(fisher_root)

    def counted(self, mask: Any) -> Any:
        """True where the next token is real."""
        return np.pad(mask[:, 1:], ((0, 0), (0, 1)))

    def targets(self, inputs: Any, labels: Any) -> Any:
        """The next token; the wrapped last one never counts."""
        del labels
        return jnp.roll(inputs, -1, axis=1)

    def evidence(self, q: jax.Array, targets: jax.Array | None) -> jax.Array:
        """The loss."""
        assert targets is not None
        return loss(q, targets)

    def quality(self, evidence: np.ndarray, counts: np.ndarray, labels: np.ndarray | None) -> Quality:
        """Perplexity; its error by the delta method: perplexity times that of the mean loss."""
        del labels
        nll, stderr = map(float, mean_over_documents(evidence, counts))
        with np.errstate(over="ignore"):  # above 709 nats the perplexity is infinite, and says so
            perplexity = float(np.exp(nll))
        return Quality(perplexity, perplexity * stderr)


@dataclasses.dataclass(frozen=True)
class Classification:
    """One label an example: `logits[batch, classes]`. Quality: accuracy."""

    name = "classification"
    unit = "example"
    quality_name = "accuracy"
    agreement_name = "top1_agreement"

    distribution = staticmethod(distribution)
    loss = staticmethod(loss)
    divergence = staticmethod(divergence)
    agreement = staticmethod(agreement)
    fisher_root = staticmethod(fisher_root)

    def counted(self, mask: Any) -> Any:
        """Every example with anything in it."""
        return np.any(mask.reshape(len(mask), -1), axis=1)

    def targets(self, inputs: Any, labels: Any) -> Any:
        """The labels."""
        del inputs
        return labels

    def evidence(self, q: jax.Array, targets: jax.Array | None) -> jax.Array:
        """1 where the most likely class is the label; NaN without labels."""
        if targets is None:
            return jnp.full(q.shape[:-1], jnp.nan)
        return (q.argmax(axis=-1) == targets).astype(jnp.float32)

    def quality(self, evidence: np.ndarray, counts: np.ndarray, labels: np.ndarray | None) -> Quality:
        """Share of examples whose most likely class is the label."""
        del labels
        return Quality(*map(float, mean_over_documents(evidence, counts)))
