"""Distillation that hands out nothing worse: what it leaves is judged by windows that it did not see.

The loss on the windows that are trained on always falls. Whether the plan is better for it is told by others alone: an
eighth of the data is held out, the KL to the original is measured there before and after, and the smaller one decides.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mpq.activations.apply import RoundedActivation, with_activations
from mpq.data import divide
from mpq.distill.loop import Distill, Distilled
from mpq.evaluate import Reference, score
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.quantize import apply_plan
from mpq.trace import Trace
from mpq.types import Params, QTensor

HELD_OUT = 8
"""One of so many windows is held out."""


class Judged(NamedTuple):
    """What is handed out, and why.

    Attributes:
      distilled: what was trained, or what came in; the losses are of the training in both cases.
      before, after: KL on the held-out windows of what came in and of what was trained, nats per output.
    """

    distilled: Distilled
    before: float
    after: float

    @property
    def helped(self) -> bool:
        """Whether training helped."""
        return self.after < self.before


def distill_harmless(
    options: Distill,
    model: Model,
    traced: Trace,
    qtensors: Mapping[str, QTensor],
    data: Dataset,
    *,
    key: jax.Array,
    state: Path | None = None,
    activations: Sequence[RoundedActivation] = (),
    beside: Params | None = None,
) -> Judged:
    """Train on most of the windows, judge by the others; of a single window, by itself.

    Arguments and errors are those of `Distill`, whose batch becomes no larger than what is left to train on.
    """
    held_out, rest = divide(data, max(1, len(data.inputs) // HELD_OUT))
    options = dataclasses.replace(options, batch_size=min(options.batch_size, len(rest.inputs)))
    began = Distilled(
        dict(qtensors), losses=np.zeros(0, np.float32), activations=tuple(activations), beside=beside or {}
    )
    found = options(model, traced, qtensors, rest, key=key, state=state, activations=activations, beside=beside)
    size = min(options.batch_size, len(held_out.inputs))
    reference = Reference(model, held_out, size)
    before, after = (_divergence(model, traced, one, held_out, reference) for one in (began, found))
    return Judged(found if after < before else began._replace(losses=found.losses), before, after)


def _divergence(model: Model, traced: Trace, made: Distilled, data: Dataset, reference: Reference) -> float:
    params = apply_plan({**model.params, **made.beside}, traced.weights, made.qtensors)
    rounded = with_activations(model, traced, made.activations)
    kl = score(rounded, params, data, reference=reference, batch_size=0).summary().kl
    assert kl is not None  # there is a reference
    return kl
