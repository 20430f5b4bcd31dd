"""Inputs rotated where they are rounded: the same function before rounding, a smaller error after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.activations import activation_rows, calibrate_activations, parse_activation_scheme
from mpq.activations.apply import RoundedActivation, choose_activations, turn_of, with_activations
from mpq.activations.smooth import smooth_stats, smooth_weights
from mpq.activations.turn import turn_model
from mpq.calibrate import calibrate
from mpq.distill import Distill
from mpq.equalize.orthogonal import random_rotation
from mpq.evaluate import Reference, score
from mpq.export import orbax
from mpq.export.graphs import ROTATED, rounded_rows
from mpq.formats import parse_scheme
from mpq.litert.activations import _why_not as why_not
from mpq.models import load
from mpq.packed import evaluate_packed, pack_weights
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.types import MpqError
from tests import tiny
from tests.activation_cases import double, make_data, make_model
from tests.command import exit_code

SCHEME = parse_activation_scheme("int4_token")
TURNED = "down"
MLP = {"up": (4, 64), "down": (64, 4)}


def spread(size=40.0, steep=1.0):
    """A model whose MLP has one feature so many times the others; the steeper, the more values are 1 or -1."""
    model, rng = make_model(), np.random.default_rng(1)
    far = jnp.ones(64, jnp.float32).at[2].set(size)
    params = {name: model.params[name] for name in ("embed", "head")}
    params |= {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in MLP.items()}

    def apply(p, tokens):
        h = p["embed"][tokens]
        h = h + (jnp.tanh(h @ p["up"] * steep) * far) @ p["down"]
        return h @ p["head"]

    params["down"] = params["down"] / far[:, None]
    return dataclasses.replace(model, apply=apply, params=params), far


@pytest.fixture(scope="module")
def case():
    """Model, data, rows, choice, statistics, and what turning and smoothing make of them."""
    model, data = spread()[0], make_data(10)
    seen = model.trace(4, data.inputs.shape[1])
    chosen = tuple(RoundedActivation(row, SCHEME) for row in activation_rows(seen))
    choice = {w.path: parse_scheme("int8_channel") for w in seen.weights}
    stats = calibrate(seen, model.params, data, 4)
    everything = (choice, stats, data, 4)
    return model, seen, data, chosen, choice, stats, turn_model(model, seen, chosen, *everything, 0)


def kl_of(model, seen, chosen, choice, data, original):
    params = apply_plan(model.params, seen.weights, Candidates(model.params, seen.weights, RTN()).choose(choice))
    rounded = with_activations(model, seen, chosen)
    return score(rounded, params, data, reference=Reference(original, data, 4), batch_size=0).summary().kl


def test_the_function_stays_and_the_rounded_one_comes_closer(case):
    model, seen, data, chosen, choice, _, (new, rows, _) = case
    turned = {one.spec.path for one in rows if one.turn is not None}
    assert TURNED in turned
    whole = tuple(dataclasses.replace(one, scheme=parse_activation_scheme("int8_token")) for one in rows)
    fine = np.asarray(jax.jit(with_activations(new, seen, whole).apply)(new.params, data.inputs))
    exact = np.asarray(jax.jit(model.apply)(model.params, data.inputs))
    assert np.median(np.abs(fine - exact)) < 0.02 * np.abs(exact).max()
    assert kl_of(new, seen, rows, choice, data, model) < 0.5 * kl_of(model, seen, chosen, choice, data, model)


def test_weights_values_and_statistics_are_those_of_the_equations(case):
    model, seen, data, chosen, _, stats, (new, rows, moved) = case
    one = next(one for one in rows if one.spec.path == TURNED)
    q = random_rotation(64, jax.random.key(0)).matrix
    w = double(model.params)["down"]
    np.testing.assert_allclose(new.params["down"], q.T @ w, rtol=0, atol=2**-23 * np.abs(w).max())
    x = np.random.default_rng(0).normal(size=(1, 5, 64)).astype(np.float32)
    np.testing.assert_allclose(one.prepared(jnp.asarray(x)), x @ q, rtol=0, atol=1e-6)  # three sums of float32
    gram = stats["down"].gram[0].astype(np.float64)
    np.testing.assert_allclose(moved["down"].gram[0], q.T @ gram @ q, rtol=0, atol=1e-6 * gram.max())
    again = RoundedActivation(one.spec, parse_activation_scheme("int8_tensor_static_absmax"))
    found = calibrate_activations(model, seen, [one.spec], data, batch_size=4, turns={TURNED: turn_of(64, 0)})[TURNED]
    far = np.asarray(spread()[1], np.float64)
    params = double(model.params)
    values = (np.tanh(params["embed"][data.inputs] @ params["up"]) * far @ q)[data.mask]
    np.testing.assert_allclose(found.extremes, (values.min(), values.max()), rtol=1e-5)
    assert np.abs(values).max() <= moved["down"].absmax.max() * (1 + 1e-6)
    assert again.turn is None
    assert {one.turn for one in chosen} == {None}


def test_a_row_that_rotation_does_not_help_stays(case):
    """Values of 1 and -1 are exact at any bits, and no longer so once rotated."""
    _, seen, data, chosen, choice, stats, _ = case
    model = spread(size=1.0, steep=1e4)[0]
    seen = model.trace(4, data.inputs.shape[1])
    _, rows, moved = turn_model(model, seen, chosen, choice, stats, data, 4, 0)
    assert next(one for one in rows if one.spec.path == TURNED).turn is None
    assert moved[TURNED] is stats[TURNED]


def test_smoothing_comes_first_and_static_ranges_are_of_both(case):
    model, seen, data, chosen, choice, stats, _ = case
    scheme = parse_activation_scheme("int8_tensor_static_absmax")
    factors = {TURNED: np.linspace(1, 2, 64).astype(np.float32)}
    ranges = calibrate_activations(model, seen, [one.spec for one in chosen], data, batch_size=4, factors=factors)
    rows = choose_activations({one.spec: scheme for one in chosen}, ranges, factors)
    smooth = dataclasses.replace(model, params=smooth_weights(model.params, seen.weights, rows, factors))
    new, both, _ = turn_model(smooth, seen, rows, choice, smooth_stats(stats, rows, factors), data, 4, 0)
    one = next(one for one in both if one.spec.path == TURNED)
    assert one.turn == 0
    params, q = double(model.params), random_rotation(64, jax.random.key(0)).matrix
    far, s = np.asarray(spread()[1], np.float64), factors[TURNED].astype(np.float64)
    values = (np.tanh(params["embed"][data.inputs] @ params["up"]) * far / s @ q)[data.mask]
    # weights were multiplied and divided again in float32
    np.testing.assert_allclose(one.high, np.abs(values).max(), rtol=1e-5)
    w = q.T @ (s[:, None] * params["down"])
    np.testing.assert_allclose(new.params["down"], w, rtol=0, atol=2**-22 * np.abs(w).max())


@pytest.mark.parametrize("scheme", ["int8_token", "int8_token_outlier6"])
def test_integer_products_give_what_is_simulated(case, scheme):
    """Outliers are those of rotated values: both parts of a product multiply the rows that were rotated."""
    _, seen, data, _, choice, _, (new, rows, _) = case
    whole = [dataclasses.replace(one, scheme=parse_activation_scheme(scheme)) for one in rows]
    qtensors = Candidates(new.params, seen.weights, RTN()).choose(choice)
    packed = pack_weights(seen.weights, {w.path: qtensors[w.path] for w in seen.weights})
    inputs = data.inputs[:4]
    got = jax.jit(lambda x: evaluate_packed(seen, {}, packed, x, activations=whole))(inputs)
    want = jax.jit(with_activations(new, seen, whole).apply)(apply_plan(new.params, seen.weights, qtensors), inputs)
    # sums of another order, after which a value on the edge of two codes may take the other: 1/127 of the largest
    assert np.median(np.abs(got - want)) < 1e-5 * float(np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=float(np.abs(want).max()) / 127)


def test_a_plan_keeps_the_seed(case):
    rows = case[-1][1]
    for one in rows:
        assert RoundedActivation.from_json(one.to_json()).turn == one.turn
    assert "turn" not in next(one for one in case[3]).to_json()


def test_training_is_refused(case):
    model, seen, data, _, choice, _, (new, rows, _) = case
    qtensors = Candidates(new.params, seen.weights, RTN()).choose(choice)
    with pytest.raises(MpqError) as error:
        Distill(steps=1, batch_size=4)(new, seen, qtensors, data, key=jax.random.key(0), activations=rows)
    assert str(error.value) == "activations that are rotated online cannot be trained: quantize without --rotate-inputs"
    del model


def test_the_command_writes_a_folder_that_load_rotates_and_no_runtime_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(seed=1))
    text = ["--data", "text.txt", "--window", "16", "--batch-size", "4", "--max-windows", "8"]
    plan = ["quantize", "model", "int8_g16+int4_tensor_static_absmax", "--method", "rtn"]
    assert exit_code(*plan, *text, "--rotate-inputs", "-o", "q", "--json") == 0
    assert '"rotated_inputs": ' in capsys.readouterr().out
    exported, model = orbax.load(tmp_path / "q"), load("q")
    rows = [
        RoundedActivation.from_json(row, exported.ranges[path]) for path, row in exported.plan["activations"].items()
    ]
    assert any(one.turn is not None for one in rows)
    assert orbax.payload_bytes(tmp_path / "q") == exported.plan["size_bytes"]
    original = load("model")
    by_hand = with_activations(original, original.trace(4, 16), rows)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 16)), jnp.int32)
    run = lambda m: np.asarray(jax.jit(m.apply)(model.params, tokens))
    np.testing.assert_array_equal(run(model), run(by_hand))
    capsys.readouterr()
    path = next(one.spec.path for one in rows if one.turn is not None)
    with pytest.raises(MpqError) as error:
        rounded_rows(exported, original, "ONNX", lambda row, scheme: None)
    assert str(error.value) == (
        f"{path} at int4_tensor_static_absmax has no form in ONNX: {ROTATED}; choose another plan"
    )
    turned = next(one for one in rows if one.turn is not None)
    spec = next(spec for spec in exported.weights if spec.path in turned.spec.weights)
    assert why_not(turned, spec, exported.qtensors[spec.path].scheme) == ROTATED
    message = (
        "mpq: --rotate-inputs needs --data TEXT, from which ranges come too, and a plan that rounds activations: leave "
        "out --ranges and --distill"
    )
    whole = ["quantize", "model", "int8_g16", "--method", "rtn", *text]
    for wrong in ([*plan], [*plan, *text, "--distill", "2"], [*plan, *text, "--ranges", "r"], whole):
        assert exit_code(*wrong, "--rotate-inputs", "-o", "x") == 2
        assert capsys.readouterr().err.strip() == message
