"""From a model and a plan to what `mpq.export.orbax.save` writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.artifacts import Plan
from mpq.models import Model
from mpq.types import WeightSpec


def export_arguments(
    model: Model,
    weights: tuple[WeightSpec, ...],
    qtensors: Mapping[str, Any],
    plan: Plan,
    chosen: Sequence[RoundedActivation] = (),
) -> dict[str, Any]:
    """Everything `mpq.export.orbax.save` wants; `chosen` are the plan's activations with their static ranges."""
    return {
        "params": model.params,
        "stored": model.stored,
        "weights": weights,
        "qtensors": qtensors,
        "plan_json": plan.to_json(),
        "config": dict(model.config),
        "tokenizer_json": None if model.tokenizer is None else model.tokenizer.to_str(),
        "ranges": {a.spec.path: np.array([a.low, a.high], np.float32) for a in chosen if a.low is not None},
        "columns": {a.spec.path: np.packbits(a.kept) for a in chosen if a.kept is not None},
        "smooth": {a.spec.path: np.array(a.smooth, np.float32) for a in chosen if a.smooth is not None},
    }
