"""Models with weights at mixed schemes, for tests of the files that runtimes read."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq import artifacts
from mpq.activations import parse_activation_scheme
from mpq.activations.apply import RoundedActivation
from mpq.activations.plans import rows_of
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.formats.integer import Integer
from mpq.inputs import Tokens
from mpq.models import Model, load
from mpq.types import MpqError, Params, QTensor, Scheme, WeightSpec
from tests import decoder_cases, vision_cases
from tests.test_families_encoder import write as write_encoder
from tests.test_families_vision import write as write_vision

Refusal = Callable[[WeightSpec, Scheme], str | None]


def made(name: str, folder: Path) -> Model:
    """A tiny random model of a family."""
    if name in vision_cases.CASES:
        write_vision(folder, name)
    elif name == "bert":
        write_encoder(folder)
    else:
        decoder_cases.write(folder, name)
    return load(str(folder))


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
        largest = 2 ** (grid.bits - 1) if isinstance(grid, Integer) else grid.max_magnitude
        scale, whole = rng.uniform(1, 2, groups), np.float32(w.std() / largest)
        zero = any_code(groups) if scheme.zero_point else None
        if not scheme.has_tensor_scale:
            levels = None
            if scheme.has_codebook:
                levels = jnp.asarray(np.sort(rng.uniform(-1, 1, (spec.batch, 2**grid.bits, 1)), axis=1), jnp.float16)
            scales = jnp.asarray(scale * whole, scheme.scale_dtype)
            return QTensor(any_code(shape), scales, zero, scheme, codebook=levels)
        matrix = jnp.full((spec.batch, 1, 1), whole)
        return QTensor(any_code(shape), jnp.asarray(scale, scheme.scale_dtype), zero, scheme, matrix)

    return make


def some_inputs(model: Model, batch: int, time: int) -> np.ndarray:
    """Tokens below 20, or bytes of images."""
    rng, struct = np.random.default_rng(batch), model.inputs.struct(batch, time)
    return rng.integers(0, 20 if isinstance(model.inputs, Tokens) else 256, struct.shape).astype(struct.dtype)


def rounded_rows(model: Model, scheme: str, smooth: bool) -> tuple[RoundedActivation, ...]:
    """All inputs of weights; static ranges are any that clip, factors any."""
    scheme, rng = parse_activation_scheme(scheme), np.random.default_rng(0)
    rows = []
    for row in rows_of("activations", model.trace(2, 16)):
        ends = ((-1.5,), (2.5,)) if scheme.static else (None, None)
        factors = tuple(map(float, np.float32(rng.uniform(0.5, 2, row.width)))) if smooth and row.batch == 1 else None
        rows.append(RoundedActivation(row, scheme, *ends, smooth=factors))
    return tuple(rows)


def require_equal(codes: Mapping[str, QTensor], quantized: Exported) -> None:
    """A file gives the codes, scales and zero points back."""
    assert set(codes) == set(quantized.qtensors)
    for weight, q in quantized.qtensors.items():
        assert str(codes[weight].scheme) == str(q.scheme)
        for part in ("qvalue", "scale", "zero_point", "tensor_scale"):
            ours, theirs = getattr(q, part), getattr(codes[weight], part)
            assert (ours is None) == (theirs is None), (weight, part)
            assert ours is None or (ours.dtype == theirs.dtype and bool(jnp.array_equal(ours, theirs))), (weight, part)


def kl_and_agreement(want: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Mean KL in nats an output, and how often the first choice is the same."""
    p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(z, jnp.float32)), np.float64) for z in (want, got))
    return float((np.exp(p) * (p - q)).sum(-1).mean()), float((want.argmax(-1) == got.argmax(-1)).mean())


def within_last_bits(apply: Callable[..., jax.Array], params: Params, inputs: np.ndarray) -> np.ndarray:
    """Outputs with every weight changed by up to half its last bit: another draw of what rounded activations decide."""
    rng = np.random.default_rng(0)
    nudge = lambda w: np.asarray(w, np.float32) * (1 + rng.uniform(-1, 1, w.shape) * 2.0**-24).astype(np.float32)
    return np.asarray(apply({path: nudge(w) for path, w in params.items()}, inputs))


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(MpqError) as caught:
        call()
    return str(caught.value)
