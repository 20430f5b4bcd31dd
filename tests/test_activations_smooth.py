"""SmoothQuant: the same function before rounding, a smaller error after it, and the folder that holds the factors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.activations import activation_rows, calibrate_activations, parse_activation_scheme
from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.smooth import STRENGTHS, search_smoothing, smooth_model, smooth_stats
from mpq.calibrate import calibrate
from mpq.evaluate import Reference, score
from mpq.export import orbax
from mpq.formats import parse_scheme
from mpq.models import load
from mpq.quantize import RTN, Candidates, apply_plan
from tests import tiny
from tests.activation_cases import double, logits_of, make_data, make_model, traced
from tests.command import exit_code

SCHEME = parse_activation_scheme("int4_token")


def with_outliers():
    """The model with one channel of the embedding, and so of the residual stream, forty times the others."""
    model = make_model()
    params = dict(model.params)
    params["embed"] = params["embed"] * jnp.asarray([1, 40, 1, 1], jnp.float32)
    for name in ("query", "key", "value", "up", "head"):
        params[name] = params[name] * jnp.asarray([[1], [1 / 40], [1], [1]], jnp.float32)
    return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def smoothed():
    model, data = with_outliers(), make_data(10)
    chosen = [RoundedActivation(row, SCHEME) for row in activation_rows(traced(model))]
    choice = {w.path: parse_scheme("int8_channel") for w in traced(model).weights}
    stats = calibrate(traced(model), model.params, data, 4)
    return model, data, chosen, choice, stats, smooth_model(model, traced(model), chosen, choice, stats, data, 4)


def relative_error(x, weights, s, scheme):
    """Of all readers' outputs, in float64: tokens rounded to their largest, columns of weights to theirs."""
    total = 0.0
    for w in weights:
        step = np.abs(x / s).max(axis=1, keepdims=True) / scheme.top
        rounded = np.round(x / s / step) * step
        column = np.abs(w * s[:, None]).max(axis=0) / 127
        stored = np.round(w * s[:, None] / column) * column
        total += ((rounded @ stored - x @ w) ** 2).sum(axis=1) / ((x @ w) ** 2).sum(axis=1)
    return total.mean()


def test_the_strength_has_the_least_error_of_all(smoothed):
    model, data, chosen, choice, stats, _ = smoothed
    found = search_smoothing(model, traced(model), chosen, choice, stats, data)
    assert found
    seen, params = {}, double(model.params)
    logits_of(params, data.inputs, lambda name, x: seen.setdefault(name, x))
    for one in chosen:
        x, every = seen[one.spec.path], seen[one.spec.path][data.mask]
        x = x[:4][data.mask[:4]]
        weights = [params[path] for path in one.spec.weights]
        largest, heaviest = np.abs(every).max(axis=0), np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
        tried = [np.ones(len(largest)), *(largest**a / heaviest ** (1 - a) for a in STRENGTHS)]
        errors = [relative_error(x, weights, s / np.exp(np.log(s).mean()), SCHEME) for s in tried]
        got = relative_error(x, weights, np.asarray(found.get(one.spec.path, tried[0]), np.float64), SCHEME)
        # float16 scales move every value by 2^-11 of itself, a twentieth of the error of the 7 steps at most
        assert got <= 1.05 * min(errors)
    assert set(found) >= {"{query,key,value}"}


def test_the_function_stays_and_the_rounded_one_comes_closer(smoothed):
    model, data, chosen, choice, _, (new, rows, stats) = smoothed
    whole = tuple(dataclasses.replace(one, scheme=parse_activation_scheme("int8_token")) for one in rows)
    undone = {one.spec.path: np.asarray(one.smooth) for one in rows if one.smooth is not None}
    fine = np.asarray(jax.jit(with_activations(new, traced(model), whole).apply)(new.params, data.inputs))
    exact = np.asarray(model.apply(model.params, data.inputs))
    assert np.median(np.abs(fine - exact)) < 0.02 * np.abs(exact).max()
    kl = {}
    for name, (m, r) in {"plain": (model, chosen), "smooth": (new, rows)}.items():
        weights = Candidates(m.params, traced(model).weights, RTN()).choose(choice)
        params = apply_plan(m.params, traced(model).weights, weights)
        rounded = with_activations(m, traced(model), r)
        kl[name] = score(rounded, params, data, reference=Reference(model, data, 4), batch_size=0).summary().kl
    assert kl["smooth"] < 0.5 * kl["plain"]
    again = calibrate(traced(model), model.params, data, 4)
    for path, s in undone.items():
        first = next(one.spec.weights[0] for one in rows if one.spec.path == path)
        np.testing.assert_allclose(stats[first].gram[0], again[first].gram[0] / np.outer(s, s), rtol=1e-5)
        np.testing.assert_allclose(stats[first].absmax[0] * s, again[first].absmax[0], rtol=1e-5)
    assert smooth_stats(again, chosen, {}) == again


def test_ranges_are_of_what_was_divided(smoothed):
    model, data, *_, (_, rows, _) = smoothed
    one = next(one for one in rows if one.smooth is not None)
    factors = {one.spec.path: np.asarray(one.smooth, np.float32)}
    divided = calibrate_activations(model, traced(model), [one.spec], data, batch_size=4, factors=factors)
    seen: dict = {}
    logits_of(double(model.params), data.inputs, lambda name, x: seen.setdefault(name, x))
    values = (seen[one.spec.path] / np.asarray(one.smooth))[data.mask]
    np.testing.assert_allclose(divided[one.spec.path].extremes, (values.min(), values.max()), rtol=1e-5)


def test_the_command_writes_factors_that_load_applies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(seed=1))
    text = ["--data", "text.txt", "--window", "16", "--batch-size", "4", "--max-windows", "8"]
    plan = ["quantize", "model", "int8_g16+int4_tensor_static_absmax", "--method", "rtn"]
    assert exit_code(*plan, *text, "--smooth", "-o", "q", "--json") == 0
    exported, model = orbax.load(tmp_path / "q"), load("q")
    assert exported.smooth
    assert orbax.payload_bytes(tmp_path / "q") == exported.plan["size_bytes"]
    rows = [
        RoundedActivation.from_json(row, exported.ranges[path], exported.smooth.get(path))
        for path, row in exported.plan["activations"].items()
    ]
    original = load("model")
    by_hand = with_activations(original, original.trace(4, 16), rows)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 16)), jnp.int32)
    run = lambda m: np.asarray(jax.jit(m.apply)(model.params, tokens))
    np.testing.assert_array_equal(run(model), run(by_hand))
    capsys.readouterr()
    for wrong in (["--smooth"], [*text, "--smooth", "--distill", "2"], [*text, "--smooth", "--ranges", "r"]):
        assert exit_code(*plan, *wrong, "-o", "x") == 2
        assert capsys.readouterr().err.strip() == (
            "mpq: --smooth needs --data TEXT, from which ranges come too: leave out --ranges and --distill"
        )
