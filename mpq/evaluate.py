"""Quality of a model on held-out text: perplexity, KL to a reference, top-1 agreement, each with a standard error.

At every position that predicts a real token, with q the model's and p the reference's next-token distribution:

    nll = -log q(next token)      KL(p || q) = sum_v p(v) (log p(v) - log q(v))      agree = [argmax p == argmax q]

all in nats and from float32 logits. The device returns one sum per window; windows are added up per document on the
host in float64, so no number depends on the batch size. Padding, and windows that only fill up a batch, never count.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import mean_over_documents, paired_difference, sums_over_documents
from mpq.models.model import Model
from mpq.progress import track
from mpq.types import Batch, Dataset, EvalResult, MpqError, Params

Apply = Callable[[Params, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentScores:
    """Sums over the predicted tokens of each document: all that summaries and paired comparisons need.

    Attributes:
      document: `int[D]`, numbers of the documents, ascending.
      tokens: `float64[D]`, predicted tokens.
      nll: `float64[D]`, nats.
      kl: `float64[D]`, nats, KL(reference || model); None without a reference.
      agree: `float64[D]`, positions where both have the same most likely token; None without a reference.
      data_digest: of the dataset.
    """

    document: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray
    kl: np.ndarray | None
    agree: np.ndarray | None
    data_digest: str

    def summary(self) -> EvalResult:
        """Means per token with standard errors over documents."""
        nll, nll_stderr = map(float, mean_over_documents(self.nll, self.tokens))
        kl = agree = (None, None)
        if self.kl is not None and self.agree is not None:
            kl = tuple(map(float, mean_over_documents(self.kl, self.tokens)))
            agree = tuple(map(float, mean_over_documents(self.agree, self.tokens)))
        with np.errstate(over="ignore"):  # above 709 nats the perplexity is infinite, and says so
            perplexity = float(np.exp(nll))
        return EvalResult(
            perplexity=perplexity,
            nll=nll,
            nll_stderr=nll_stderr,
            kl=kl[0],
            kl_stderr=kl[1],
            top1_agreement=agree[0],
            top1_stderr=agree[1],
            num_documents=int((self.tokens > 0).sum()),
            num_tokens=int(self.tokens.sum()),
            data_digest=self.data_digest,
        )

    def difference(self, other: "DocumentScores", quantity: str = "kl") -> tuple[float, float]:
        """`self - other` in nats (or agreement) per token, paired by document.

        Args:
          other: scores of another model on the same dataset.
          quantity: `nll`, `kl` or `agree`.

        Returns:
          `(mean, stderr)`; negative: `self` is smaller.

        Raises:
          MpqError: the datasets differ, or a side has no such quantity.
        """
        if self.data_digest != other.data_digest:
            raise MpqError(
                f"scores of other datasets ({self.data_digest[:12]} and {other.data_digest[:12]}) cannot be paired: "
                "score both models on the same one"
            )
        a, b = (getattr(s, quantity) if quantity in ("nll", "kl", "agree") else None for s in (self, other))
        if a is None or b is None:
            raise MpqError(f"no {quantity!r} in both scores: allowed is nll, and with a reference kl and agree")
        mean, stderr = paired_difference(a, b, self.tokens)
        return float(mean), float(stderr)


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Log-probabilities of the unquantized model on one dataset, computed once for a series of `score` calls.

    They take `num_windows * time * vocabulary * 4` bytes: 64 windows of 256 tokens and 4096 words are 268 MB. Above
    `keep_bytes` nothing is kept and every call pays the reference's forward passes again.

    Attributes:
      model: whose `apply` is run.
      data: the dataset; `score` must be called with the same one.
      batch_size: windows per forward pass.
      params: of the reference; None: the model's own.
      keep_bytes: most memory to hold.
    """

    model: Model
    data: Dataset
    batch_size: int
    params: Params | None = None
    keep_bytes: int = 1 << 30

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Batch, jax.Array]]:
        """Batches `start` to `stop`, each with the reference's `float32[batch, time, vocab]` log-probabilities.

        Raises:
          MpqError: the reference gives NaN.
        """
        if self.nbytes <= self.keep_bytes:
            yield from self._kept[start:stop]
        else:
            yield from self._computed(start, stop)

    @functools.cached_property
    def nbytes(self) -> int:
        """Memory that the log-probabilities of all batches take."""
        params = self._params
        shape = jax.ShapeDtypeStruct((self.batch_size, *self.data.inputs.shape[1:]), jnp.int32)
        logits = jax.eval_shape(self.model.apply, params, shape)
        return -(-len(self.data.inputs) // self.batch_size) * int(np.prod(logits.shape)) * 4

    @property
    def _params(self) -> Params:
        return self.model.params if self.params is None else self.params

    def _computed(self, start: int, stop: int | None) -> Iterator[tuple[Batch, jax.Array]]:
        for batch in itertools.islice(self.data.batches(self.batch_size), start, stop):
            log_p = log_probs(self.model.apply, self._params, batch.inputs)
            require_finite(np.asarray(_nan_if_any(log_p, batch.weight)), self._params, self.data.source)
            yield batch, log_p

    @functools.cached_property
    def _kept(self) -> list[tuple[Batch, jax.Array]]:
        return list(self._computed(0, None))


def score(
    model: Model,
    params: Params,
    data: Dataset,
    *,
    reference: Params | Reference | None = None,
    batch_size: int,
) -> DocumentScores:
    """Score `params` on every predicted token of `data`.

    One compiled function serves all parameters of equal shapes: a series of plans compiles once.

    Args:
      model: the function; `model.params` play no role.
      params: what to score, such as the dequantized weights of a plan.
      data: held-out windows.
      reference: parameters to compare with, or a `Reference` that keeps their outputs between calls; None: no KL.
      batch_size: windows per forward pass; with a `Reference`, its own is used.

    Returns:
      Sums per document.

    Raises:
      MpqError: no token counts, the `Reference` is of other data, or an output is NaN or infinite.
    """
    if data.num_tokens == 0:
        raise MpqError(f"{data.source} has no predicted token: give windows of at least two real tokens")
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(model, data, batch_size, reference, keep_bytes=0)
    if reference is None:
        pairs = ((batch, None) for batch in data.batches(batch_size))
    elif reference.data.digest != data.digest:
        raise MpqError(
            f"the reference was made for {reference.data.source}, not for {data.source}: make one for this data"
        )
    else:
        pairs, batch_size = reference.batches(), reference.batch_size
    sums = []
    for batch, log_p in track(pairs, "evaluate", -(-len(data.inputs) // batch_size)):
        sums.append(_window_scores(model.apply, params, batch.inputs, batch.weight, log_p))
    windows = np.concatenate([np.asarray(s, np.float64) for s in sums])[: len(data.inputs)]
    require_finite(windows, params, data.source)
    documents = sums_over_documents(windows, data.document)
    tokens = sums_over_documents(data.mask[:, 1:].sum(axis=1), data.document)
    kl, agree = (documents[:, 1], documents[:, 2]) if reference is not None else (None, None)
    return DocumentScores(np.unique(data.document), tokens, documents[:, 0], kl, agree, data.digest)


def require_finite(values: np.ndarray, params: Params, what: str) -> None:
    """Raise if anything in `values` is NaN or infinite; the message names the parameter at fault where there is one.

    Raises:
      MpqError: something is not finite.
    """
    if np.isfinite(values).all():
        return
    for path, param in params.items():
        if not bool(jnp.isfinite(param).all()):
            raise MpqError(
                f"weight {path} holds NaN or infinity: mend the checkpoint, or quantize this weight otherwise"
            )
    raise MpqError(
        f"the model gives NaN or infinite outputs on {what} although its weights are finite: use float32 compute"
    )


@functools.partial(jax.jit, static_argnums=0)
def log_probs(apply: Apply, params: Params, inputs: jax.Array) -> jax.Array:
    """`float32[batch, time, vocab]` log-softmax of the model's outputs."""
    return jax.nn.log_softmax(apply(params, inputs).astype(jnp.float32), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def window_kl(apply: Apply, params: Params, inputs: jax.Array, weight: jax.Array, log_p: jax.Array) -> jax.Array:
    """Sum of KL(reference || model) over the counted positions of each window, nats.

    Args:
      apply: the model's function.
      params: its parameters.
      inputs: `int32[batch, time]`.
      weight: `float32[batch, time]`, `Batch.weight`.
      log_p: `float32[batch, time, vocab]`, from `log_probs` of the reference.

    Returns:
      `float32[batch]`.
    """
    return _counted(_kl(log_p, log_probs(apply, params, inputs)), weight)


@functools.partial(jax.jit, static_argnums=0)
def _window_scores(
    apply: Apply, params: Params, inputs: jax.Array, weight: jax.Array, log_p: jax.Array | None
) -> jax.Array:
    """`float32[batch, 3]`: sums of nll, KL and agreement over the counted positions; without a reference only nll."""
    log_q = log_probs(apply, params, inputs)
    following = jnp.roll(inputs, -1, axis=1)[..., None]  # the wrapped last position never counts
    columns = [-jnp.take_along_axis(log_q, following, axis=-1)[..., 0]]
    if log_p is not None:
        columns += [_kl(log_p, log_q), (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).astype(jnp.float32)]
    return jnp.stack([_counted(c, weight) for c in columns], axis=-1)


@jax.jit
def _nan_if_any(log_p: jax.Array, weight: jax.Array) -> jax.Array:
    """NaN if the log-probabilities of a counted position hold one, else 0."""
    return jnp.where(jnp.any(jnp.isnan(log_p).any(axis=-1) & (weight > 0)), jnp.nan, 0.0)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis; a word with p = 0 adds nothing, also where both logits are -inf."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)


def _counted(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over time where `weight` is set; what stands elsewhere, NaN included, has no influence."""
    return jnp.sum(jnp.where(weight > 0, values, 0.0), axis=1)
