"""The measured loss of whole plans: what a sum over single weights only predicts.

    loss(plan) = 1/N sum KL(original || model with every weight at its scheme)    [nats per output, N that count]

Cost: one forward pass over the data a plan, and what correcting it takes; every plan is measured once.
"""

from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from mpq.estimate import sums_over_documents
from mpq.evaluate import Reference
from mpq.models.model import Model
from mpq.quantize import Candidates, apply_plan
from mpq.sensitivity.base import check_inputs, measured_on, window_divergences
from mpq.store import MemoryStore, Store, kept
from mpq.trace import Trace
from mpq.types import MpqError, Params, Scheme


class Correct(Protocol):
    """What is done to the parameters of a plan before it is measured: `mpq.quantize.one_pass.OnePass`."""

    digest: str
    """Equal digests, equal changes."""

    def __call__(self, params: Params) -> dict[str, jax.Array]:
        """The parameters that are measured."""
        ...


class PlanLoss:
    """Measured KL to the original of plans whose weights one rounding algorithm makes.

    Attributes:
      counts: `float64[D]`, outputs that count in every document of the data.
    """

    def __init__(
        self,
        model: Model,
        traced: Trace,
        candidates: Candidates,
        reference: Reference,
        store: Store | None = None,
        correct: Correct | None = None,
    ) -> None:
        """Measure nothing yet.

        Args:
          model: gives the function and the original parameters.
          traced: gives the weights.
          candidates: quantized weights.
          reference: outputs of the original on the data that is measured on.
          store: measured plans; None: they are kept as long as this object.
          correct: what plans are corrected by; None: only weights change.

        Raises:
          MpqError: no output counts, or a weight is not finite.
        """
        self.counts = check_inputs(model, traced.weights, reference.data)
        self._model, self._weights, self._candidates, self._reference = model, traced.weights, candidates, reference
        self._on = measured_on(model, traced, reference.data, reference.batch_size)
        self._correct = correct
        if correct is not None:
            self._on["corrected"] = correct.digest
        self._store: Store = MemoryStore() if store is None else store

    def documents(self, choice: Mapping[str, Scheme]) -> np.ndarray:
        """Sums of the KL over the outputs of each document, `float64[D]` nats.

        Args:
          choice: path -> scheme, for every weight.

        Raises:
          MpqError: the outputs of the plan are NaN or infinite.
        """
        among = [[w.path, str(choice[w.path]), self._candidates.digest(w, choice[w.path])] for w in self._weights]
        values = kept(self._store, lambda: self._measure(choice), item="plan", **self._on, candidates=among)
        return sums_over_documents(np.asarray(values, np.float64), self._reference.data.document)

    def __call__(self, choice: Mapping[str, Scheme]) -> float:
        """Mean KL, nats per output. Raises as `documents` does."""
        return float(self.documents(choice).sum() / self.counts.sum())

    def _measure(self, choice: Mapping[str, Scheme]) -> list[float]:
        """Sum of the KL over each window."""
        model, windows = self._model, len(self._reference.data.inputs)
        params = apply_plan(model.params, self._weights, self._candidates.choose(choice))
        params = params if self._correct is None else self._correct(params)
        values = window_divergences(model, params, self._reference.batches())[:windows]
        if not np.isfinite(values).all():
            schemes = ", ".join(dict.fromkeys(str(scheme) for scheme in choice.values()))
            raise MpqError(
                f"a plan of {schemes} makes the model's outputs NaN or infinite: leave its smallest scheme out"
            )
        return values.tolist()
