"""Models with weights at mixed schemes, for tests of the files that runtimes read."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mpq import artifacts
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.inputs import Tokens
from mpq.models import Model
from mpq.types import QTensor, Scheme, WeightSpec

Refusal = Callable[[WeightSpec, Scheme], str | None]


def exported(
    model: Model, schemes: tuple[str, ...], folder: Path, refusal: Refusal, make=None, activations=(), trace=(1, 16)
) -> Exported:
    """The model with its weights at these schemes in turn, each at the next one that the runtime has for it."""
    weights, choice = model.trace(*trace).weights, {}
    for i, spec in enumerate(weights):
        turn = [parse_scheme(schemes[(i + k) % len(schemes)]) for k in range(len(schemes))]
        choice[spec.path] = next(scheme for scheme in turn if refusal(spec, scheme) is None)
    rows = {one.spec.path: one.to_json() for one in activations}
    plan = artifacts.make_plan("mix", choice, None, weights, 0, model.digest, rows)
    make = make or noise(model)
    qtensors = {spec.path: make(spec, choice[spec.path]) for spec in weights}
    orbax.save(folder, **export_arguments(model, weights, qtensors, plan, activations))
    return orbax.load(folder)


def noise(model: Model) -> Callable[[WeightSpec, Scheme], QTensor]:
    """Weights of any codes, about as large as the model's: nothing is compiled to make them."""
    rng = np.random.default_rng(0)

    def make(spec: WeightSpec, scheme: Scheme) -> QTensor:
        w = np.asarray(model.params[spec.param], np.float32)
        shape, grid = (spec.batch, spec.k, spec.n), scheme.format
        if not scheme.has_scale:
            return QTensor(jnp.asarray(rng.normal(0, w.std(), shape), grid.dtype), None, None, scheme)
        any_code = lambda size: jnp.asarray(rng.integers(grid.min_qvalue, grid.max_qvalue + 1, size), jnp.int8)
        groups = (spec.batch, *scheme.scale_shape(spec.k, spec.n))
        scale, whole = rng.uniform(1, 2, groups), np.float32(w.std() / grid.max_magnitude)
        zero = any_code(groups) if scheme.zero_point else None
        if not scheme.has_tensor_scale:
            return QTensor(any_code(shape), jnp.asarray(scale * whole, scheme.scale_dtype), zero, scheme)
        matrix = jnp.full((spec.batch, 1, 1), whole)
        return QTensor(any_code(shape), jnp.asarray(scale, scheme.scale_dtype), zero, scheme, matrix)

    return make


def some_inputs(model: Model, batch: int, time: int) -> np.ndarray:
    """Tokens below 20, or bytes of images."""
    rng, struct = np.random.default_rng(batch), model.inputs.struct(batch, time)
    return rng.integers(0, 20 if isinstance(model.inputs, Tokens) else 256, struct.shape).astype(struct.dtype)
