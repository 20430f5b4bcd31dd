"""Biases and norms that make up for what rounding does to outputs on average: against the formulas in float64."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.activations import activation_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation
from mpq.distill import Distill, Distilled
from mpq.equalize import find_shifts
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.inputs import Arrays, Dataset
from mpq.models import load
from mpq.models.model import Model
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.quantize.correction import LARGEST, correct_biases, moments
from mpq.tasks import Regression
from tests import tiny
from tests.command import exit_code
from tests.data_cases import write_images
from tests.test_families_vision import write as write_vision

SHAPES = {"a": (5, 6), "bias": (6,), "b": (6, 4), "mean": (4,), "scale": (4,), "shift": (4,), "c": (4, 3), "last": (3,)}
ROUNDED = ("a", "b", "c")


def network(params, x):
    """A layer with a bias, one with a norm, one with a bias."""
    h = jax.nn.relu(x @ params["a"] + params["bias"])
    k = jax.nn.relu((h @ params["b"] - params["mean"]) * params["scale"] + params["shift"])
    return k @ params["c"] + params["last"]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    params["bias"] = params["bias"] + 1
    model = Model(network, params, dict.fromkeys(params, "float32"), "tiny", Arrays((5,)), Regression())
    x = (rng.normal(size=(40, 5)) + 0.5).astype(np.float32)
    mask = rng.random(40) < 0.8
    x[~mask] = 100  # what does not count
    data = Dataset(x, mask, np.arange(40, dtype=np.int32), "noise", "0")
    traced = model.trace(8)
    rounded = {name: params[name] for name in params}
    for name in ROUNDED:
        rounded[name] = jnp.round(params[name] * 1.5) / 1.5
    return model, traced, rounded, data, find_shifts(model, traced, data)


def by_hand(model, rounded, data, norms, change=lambda x: x):
    """Layer by layer; `change` rounds what is multiplied."""
    p = {name: np.asarray(value, np.float64) for name, value in model.params.items()}
    q = {name: np.asarray(value, np.float64) for name, value in rounded.items()}
    x = data.inputs[data.mask].astype(np.float64)
    exact, got = x @ p["a"], change(x) @ q["a"]
    q["bias"] = p["bias"] - (got.mean(0) - exact.mean(0))
    exact, got = np.maximum(exact + p["bias"], 0) @ p["b"], change(np.maximum(got + q["bias"], 0)) @ q["b"]
    a = np.clip(exact.std(0) / got.std(0), 1 / LARGEST, LARGEST) if norms else np.ones(4)
    # (got - mean') scale' has the mean and the deviation of (exact - mean) scale
    q["scale"] = p["scale"] * a
    q["mean"] = got.mean(0) - (exact.mean(0) - p["mean"]) / a
    exact = np.maximum((exact - p["mean"]) * p["scale"] + p["shift"], 0) @ p["c"]
    got = change(np.maximum((got - q["mean"]) * q["scale"] + q["shift"], 0)) @ q["c"]
    q["last"] = p["last"] - (got.mean(0) - exact.mean(0))
    return q


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("batch_size", [8, 11])
def test_vectors_are_those_of_the_formulas(case, norms, batch_size):
    model, traced, rounded, data, shifts = case
    assert [shift.weight for shift in shifts] == ["a", "b", "c"]
    got = correct_biases(model, traced, rounded, shifts, data, norms=norms, batch_size=batch_size)
    want = by_hand(model, rounded, data, norms)
    assert got.keys() == rounded.keys()
    for name in SHAPES:  # sums of 40 in float32
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for name in ("bias", "mean", "last"):
        assert np.abs(np.asarray(got[name] - rounded[name])).max() > 0.01


def test_what_activations_lose_is_taken_back_too(case):
    model, traced, rounded, data, shifts = case
    scheme = parse_activation_scheme("int3_tensor_static_absmax")
    chosen = [RoundedActivation(row, scheme, (-3.0,), (3.0,)) for row in activation_rows(traced)]
    got = correct_biases(model, traced, rounded, shifts, data, activations=chosen, batch_size=8)
    want = by_hand(model, rounded, data, False, lambda x: np.clip(np.round(x), -3, 3))
    for name in SHAPES:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_exact_stays_as_it_is_up_to_rounding(case):
    model, traced, _, data, shifts = case
    got = correct_biases(model, traced, model.params, shifts, data, norms=True, batch_size=8)
    for name, value in model.params.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_vectors_are_rounded_to_the_dtype_that_they_are_stored_in(case):
    model, traced, rounded, data, shifts = case
    half = dataclasses.replace(model, stored=dict.fromkeys(model.params, "bfloat16"))
    got = correct_biases(half, traced, rounded, shifts, data, norms=True, batch_size=8)
    for name in ("bias", "mean", "scale", "last"):
        np.testing.assert_array_equal(got[name], got[name].astype(jnp.bfloat16).astype(jnp.float32))
    # The last layer makes up for what the others lost to that.
    weights = tuple(shift.weight for shift in shifts)
    zeros = {shift.weight: np.zeros(shift.width) for shift in shifts}
    of = lambda params: moments(traced, weights, params, data, zeros, 8)["c"].mean
    offset = np.asarray(got["last"] - rounded["last"])
    np.testing.assert_allclose(of(got) + offset, of(model.params), rtol=0, atol=2.0**-8 * np.abs(got["last"]).max())


def test_a_channel_that_gives_one_value_keeps_its_scale(case):
    model, traced, rounded, data, shifts = case
    dead = rounded | {"b": rounded["b"].at[:, 2].set(0)}
    got = correct_biases(model, traced, dead, shifts, data, norms=True, batch_size=8)
    assert got["scale"][2] == model.params["scale"][2]
    exact = moments(traced, ("b",), model.params, data, {"b": np.zeros(4)}, 8)["b"].mean
    np.testing.assert_allclose(got["mean"][2], model.params["mean"][2] - exact[2], rtol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small ResNet and images."""
    root = tmp_path_factory.mktemp("place")
    write_vision(root / "model", "resnet_cifar")
    tiny.write_folder(root / "llama")
    (root / "text.txt").write_text(tiny.text())
    write_images(root / "images.npz", 48, 48)
    return root


def test_the_command_corrects_and_says_so(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    data = ["--data", "images.npz", "--max-windows", "32", "--method", "rtn", "--json"]
    kl = {}
    plan = "int3_channel+int6_tensor_static"
    for name, flags in {"plain": [], "bias": ["--correct-bias"], "norms": ["--correct-norms", "--smooth"]}.items():
        assert exit_code("quantize", "model", plan, *data, *flags, "-o", name) == 0
        body = json.loads(capsys.readouterr().out)
        assert body.get("corrected") == (8 if flags else None)
        assert body["size_bytes"] == body["payload_bytes"]
        assert exit_code("evaluate", name, "--data", "images.npz", "--reference", "model", "--json") == 0
        kl[name] = json.loads(capsys.readouterr().out)["kl"]
    assert kl["norms"] < kl["bias"] < 0.7 * kl["plain"]
    plain, bias = load("plain"), load("bias")
    changed = {p for p in plain.params if not np.array_equal(plain.params[p], bias.params[p])}
    assert changed == {p for p in plain.params if p.endswith(".mean")} | {"linear.bias"}


def test_training_starts_from_what_was_corrected(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    seen = []

    def stand_still(self, model, traced, qtensors, data, *, key, state, activations, beside):
        seen.append((model, beside))
        state.mkdir()
        return Distilled(qtensors, np.zeros(1), activations, beside)

    monkeypatch.setattr(Distill, "__call__", stand_still)
    data = ["--data", "images.npz", "--max-windows", "32", "--json"]
    assert exit_code("qat", "model", "int3_channel", *data, "--correct-norms", "-o", "trained") == 0
    assert json.loads(capsys.readouterr().out)["corrected"] == 8
    ((model, beside),) = seen
    original, trained = load("model"), load("trained")
    assert model.digest == original.digest  # the outputs that are trained for are those of the original
    assert {path.rpartition(".")[2] for path in beside} == {"mean", "scale", "bias"}
    for path, param in beside.items():
        np.testing.assert_array_equal(trained.params[path], param)
        assert (param != original.params[path]).any()


def test_what_cannot_be_corrected_is_refused(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for flag in ("--correct-bias", "--correct-norms"):
        assert exit_code("quantize", "model", "int3_channel", "--method", "rtn", flag, "-o", "x") == 2
        assert capsys.readouterr().err.strip() == (
            "mpq: --correct-bias and --correct-norms need --data TEXT, on which errors are averaged"
        )
    text = ["--data", "text.txt", "--window", "16", "--max-windows", "8", "--method", "rtn"]
    assert exit_code("quantize", "llama", "int4_g16", *text, "--correct-bias", "-o", "x") == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            "llama has no bias and no norm that what a layer gives is added to alone: leave out --correct-bias and "
            "--correct-norms"
        )
    )
    assert not (place / "x").exists()


def test_errors_that_add_up_over_a_network_are_less(place):
    """On images that the correction did not see."""
    model = load(str(place / "model"))
    with np.load(place / "images.npz") as file:
        sets = [Dataset(file[n], np.ones(48, bool), np.arange(48, dtype=np.int32), n, n) for n in ("train_x", "test_x")]
    traced = model.trace(16)
    choice = {spec.path: parse_scheme("int3_channel") for spec in traced.weights}
    rounded = apply_plan(model.params, traced.weights, Candidates(model.params, traced.weights, RTN()).choose(choice))
    shifts, reference = find_shifts(model, traced, sets[0]), Reference(model, sets[1], 16)
    kl = lambda params: score(model, params, sets[1], reference=reference, batch_size=0).summary().kl
    correct = lambda norms: correct_biases(model, traced, rounded, shifts, sets[0], norms=norms, batch_size=16)
    assert kl(correct(False)) < 0.7 * kl(rounded)
    assert kl(correct(True)) < 0.7 * kl(rounded)
