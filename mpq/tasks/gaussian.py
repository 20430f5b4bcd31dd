"""Tasks whose outputs are means of a normal distribution of known variance: sentence embeddings and regression.

With outputs z and variance s, the likelihood of y is N(y; z, s I), so that

    KL(z || z') = ||z - z'||^2 / (2 s)        Fisher = I / s
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats as scipy_stats

from mpq.estimate import mean_over_documents
from mpq.tasks.base import Quality


@dataclasses.dataclass(frozen=True)
class Regression:
    """Real outputs `[batch, d]` with targets of the same shape. Quality: mean squared error, summed over `d`.

    Attributes:
      variance: of the noise of the targets about the model: its mean squared error per output is the natural choice,
        and makes nats of this task mean what they mean for others.
    """

    variance: float = 1.0

    name = "regression"
    unit = "example"
    quality_name = "mse"
    agreement_name = "likeness"

    def counted(self, mask: Any) -> Any:
        """Every example with anything in it."""
        return np.any(mask.reshape(len(mask), -1), axis=1)

    def targets(self, inputs: Any, labels: Any) -> Any:
        """The labels."""
        del inputs
        return labels

    def distribution(self, outputs: jax.Array) -> jax.Array:
        """The means: the outputs in float32."""
        return outputs.astype(jnp.float32)

    def loss(self, q: jax.Array, targets: jax.Array) -> jax.Array:
        """||z - y||^2 / (2 s) + d/2 log(2 pi s)."""
        d = q.shape[-1]
        squared = jnp.sum(jnp.square(q - targets.reshape(q.shape).astype(q.dtype)), axis=-1)
        return squared / (2 * self.variance) + 0.5 * d * np.log(2 * np.pi * self.variance)

    def divergence(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """||z - z'||^2 / (2 s)."""
        return jnp.sum(jnp.square(p - q), axis=-1) / (2 * self.variance)

    def agreement(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """exp(-KL): 1 for equal outputs, falling with their distance in units of the noise."""
        return jnp.exp(-self.divergence(p, q))

    def fisher_root(self, outputs: jax.Array, noise: jax.Array) -> jax.Array:
        """The noise over the standard deviation."""
        del outputs
        return noise / np.sqrt(self.variance)

    def evidence(self, q: jax.Array, targets: jax.Array | None) -> jax.Array:
        """Squared error; NaN without targets."""
        if targets is None:
            return jnp.full(q.shape[:-1], jnp.nan)
        return jnp.sum(jnp.square(q - targets.reshape(q.shape).astype(q.dtype)), axis=-1)

    def quality(self, evidence: np.ndarray, counts: np.ndarray, labels: np.ndarray | None) -> Quality:
        """Mean squared error."""
        del labels
        return Quality(*map(float, mean_over_documents(evidence, counts)))


@dataclasses.dataclass(frozen=True)
class Embedding:
    """One vector a sentence, `[batch, d]`, compared by cosine. Quality: Spearman's correlation with human scores.

    For vectors of length one, ||z - z'||^2 = 2 (1 - cos), so that KL = (1 - cos) / temperature, with the variance of
    the normal distribution as the temperature. The default is the scale that sentence encoders are trained with in a
    softmax over cosines (1/20; Reimers and Gurevych 2019, arXiv:1908.10084, and their library's ranking loss).

    Attributes:
      temperature: cosine distance that costs one nat.
    """

    temperature: float = 0.05

    name = "embedding"
    unit = "example"
    quality_name = "spearman"
    agreement_name = "cosine"

    def counted(self, mask: Any) -> Any:
        """Every sentence with anything in it."""
        return np.any(mask.reshape(len(mask), -1), axis=1)

    def targets(self, inputs: Any, labels: Any) -> Any:
        """None: a single sentence has no right vector. Labels belong to pairs, and `quality` uses them."""
        del inputs, labels

    def distribution(self, outputs: jax.Array) -> jax.Array:
        """The vector, at length one, in float32."""
        z = outputs.astype(jnp.float32)
        return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), axis=-1, keepdims=True), 1e-24))

    def loss(self, q: jax.Array, targets: jax.Array) -> jax.Array:
        """Divergence from given vectors."""
        return self.divergence(self.distribution(targets), q)

    def divergence(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """(1 - cos) / temperature."""
        return jnp.sum(jnp.square(p - q), axis=-1) / (2 * self.temperature)

    def agreement(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """Cosine."""
        return jnp.sum(p * q, axis=-1)

    def fisher_root(self, outputs: jax.Array, noise: jax.Array) -> jax.Array:
        """Noise on the vector at length one, over the standard deviation, pulled back to the outputs."""
        _, pullback = jax.vjp(self.distribution, outputs)
        return pullback(noise / np.sqrt(self.temperature))[0]

    def evidence(self, q: jax.Array, targets: jax.Array | None) -> jax.Array:
        """The vector itself: the evidence of a pair is its cosine."""
        del targets
        return q

    def quality(self, evidence: np.ndarray, counts: np.ndarray, labels: np.ndarray | None) -> Quality:
        """Spearman's rank correlation between the cosines of pairs and their labels; NaN without pairs or labels.

        Its standard error is that of Bonett and Wright 2000 (Psychometrika 65, 23-28, eq. 3): in Fisher's z the
        variance is (1 + rho^2 / 2) / (n - 3), brought back by d rho / d z = 1 - rho^2.
        """
        del counts
        if labels is None or len(labels) < 4 or not np.isfinite(evidence).all():
            return Quality(np.nan, np.nan)
        result: object = scipy_stats.spearmanr(evidence, labels)
        rho = float(getattr(result, "statistic"))  # noqa: B009  # scipy ships no types
        return Quality(rho, (1 - rho**2) * np.sqrt((1 + rho**2 / 2) / (len(labels) - 3)))
