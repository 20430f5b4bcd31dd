"""Layers whose output may be shifted or stretched: against the equations of the models, and on their outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.equalize import find_shifts, shifts
from mpq.inputs import Arrays, Dataset
from mpq.models import load
from mpq.models.model import Model
from mpq.tasks import Regression
from tests import decoder_cases
from tests.test_equalize import random_data
from tests.test_families_vision import images
from tests.test_families_vision import write as write_vision

# weight -> (vectors and signs, gain), by hand from the papers' equations
CIFAR = {
    f"{name.replace('bn', 'conv')}.kernel": ({f"{name}.mean": -1}, f"{name}.scale")
    for name in ("bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "layer2.0.bn2", "layer3.0.bn1", "layer3.0.bn2")
} | {"linear.kernel": ({"linear.bias": 1}, None)}


def found(model, data):
    traced = model.trace(1, data.inputs.shape[1] if data.mask.ndim == 2 else None)
    return find_shifts(model, traced, data)


def as_table(shifts):
    return {s.weight: (dict(zip(s.vectors, s.signs, strict=True)), s.gain) for s in shifts}


def of_images(model):
    some = np.asarray(images(model))
    return Dataset(some, np.ones(len(some), bool), np.arange(len(some), dtype=np.int32), "noise", "0")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    model = load(str(write_vision(tmp_path_factory.mktemp("cifar"), "resnet_cifar")))
    return model, of_images(model)


def test_convolutions_are_shifted_by_the_mean_of_their_norm(cifar):
    assert as_table(found(*cifar)) == CIFAR


def test_moved_shifts_and_gains_leave_the_outputs(cifar):
    """Of every layer at once, by numbers that are no powers of two."""
    model, data = cifar
    traced = model.trace(2)
    weights, params = {spec.path: spec for spec in traced.weights}, dict(model.params)
    rng = np.random.default_rng(0)
    for shift in found(model, data):
        s = rng.uniform(0.5, 2, shift.width).astype(np.float32)
        if shift.gain is not None:
            spec = weights[shift.weight]
            params = spec.write(params, spec.read(params) * s)
            params |= {path: params[path] * s for path in shift.vectors} | {shift.gain: params[shift.gain] / s}
    run = jax.jit(model.apply)
    before = run(model.params, data.inputs)
    np.testing.assert_allclose(run(params, data.inputs), before, rtol=0, atol=1e-4 * float(jnp.abs(before).max()))
    last = found(model, data)[-1]
    np.testing.assert_allclose(run(last.moved(params, np.ones(3)), data.inputs), before + 1, rtol=1e-4, atol=1e-4)


def test_a_bias_before_a_norm_and_a_sum_of_two_layers_are_seen(tmp_path):
    """ResNet-8 has biases in its convolutions: they and the means take shifts up, and either summand's of a sum."""
    model = load(str(write_vision(tmp_path, "resnet_mlperf_tiny")))
    table = as_table(found(model, of_images(model)))
    stem = {"stem.convolution.bias": 1, "stem.normalization.mean": -1}
    assert table["stem.convolution.kernel"] == (stem, "stem.normalization.scale")
    second = {"stages.1.second.convolution.bias": 1, "stages.1.second.normalization.mean": -1}
    assert table["stages.1.second.convolution.kernel"] == (second, "stages.1.second.normalization.scale")
    beside = {"stages.1.shortcut.bias": 1, "stages.1.second.normalization.bias": 1}
    assert table["stages.1.shortcut.kernel"] == (beside, None)
    assert len(table) == 10


@pytest.mark.parametrize("name", ["gpt2", "opt, post-norm, projected", "llama"])
def test_decoders_have_what_their_biases_take_up(tmp_path, name):
    model = load(str(decoder_cases.write(tmp_path / "model", name)))
    shifts = found(model, random_data())
    biased = {path for path in model.params if path.endswith("_proj.bias")}
    got = {s.weight: s for s in shifts}
    assert {p.removesuffix(".kernel") + ".bias" for p in got} == biased
    assert all(s.weight.removesuffix("kernel") + "bias" in s.vectors and s.gain is None for s in shifts)
    assert (name == "llama") == (not shifts)
    for shift in shifts:  # what takes it up is the layer's own, or behind the same sum
        assert set(shift.signs) == {1}


def network(params, x):
    """A layer with a bias that also scales the output; one whose norm is shared; one read twice."""
    h = jax.nn.relu(x @ params["a"] + params["shared"])
    k = jax.nn.relu((h @ params["b"] - params["mean"]) * params["scale"])
    k = k @ params["twice"] @ params["twice"] + params["late"]
    return k * (1 + params["shared"])


def test_a_parameter_that_is_used_elsewhere_as_well_takes_nothing_up():
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 6), "b": (6, 6), "twice": (6, 6), "mean": (6,), "scale": (6,), "shared": (6,), "late": (6,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    model = Model(network, params, dict.fromkeys(params, "float32"), "tiny", Arrays((5,)), Regression())
    x = rng.normal(size=(8, 5)).astype(np.float32)
    data = Dataset(x, np.ones(8, bool), np.arange(8, dtype=np.int32), "noise", "0")
    shifts = find_shifts(model, model.trace(8), data)
    assert as_table(shifts) == {"b": ({"mean": -1}, "scale")}
    bare = dataclasses.replace(model, apply=lambda p, x: x @ p["a"], params={"a": params["a"]})
    assert find_shifts(bare, bare.trace(8), data) == ()


def test_a_model_that_only_scales_is_not_differentiated(tmp_path, monkeypatch):
    """No gradient of a large language model for what its norms cannot do."""
    model = load(str(decoder_cases.write(tmp_path / "model", "llama")))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 7
    data = Dataset(tokens, np.ones(tokens.shape, bool), np.arange(2, dtype=np.int32), "tokens", "0")
    assert {path for path in model.params if "norm" in path} == model.trace(1, 12).scales
    monkeypatch.setattr(shifts, "_gradients", None)
    assert found(model, data) == ()
