"""Weights that make up for those before them: against the formulas in float64, and on a whole model."""

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.calibrate import calibrate
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models import load
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.quantize.propagate import DAMPING, Propagation
from mpq.trace import trace
from mpq.types import MpqError
from tests import tiny
from tests.command import exit_code

WIDTH, VOCABULARY = 8, 24
SCHEME = parse_scheme("int3_channel")


def propagate(traced, params, choice, quantizer, stats, data, **options):
    candidates = Candidates(params, traced.weights, quantizer, stats)
    return Propagation(traced, candidates, data, **options).choose(choice)


def apply(params, ids):
    """A lookup, two weights of one value, and one of what they give; positions of one window do not meet."""
    x = params["table"][ids]
    h = jnp.tanh(x @ params["a"]) * (x @ params["b"])
    return jnp.tanh(h @ params["c"]) @ params["d"]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCABULARY, WIDTH), "a": (WIDTH, 12), "b": (WIDTH, 12), "c": (12, WIDTH), "d": (WIDTH, 5)}
    params = {name: jnp.asarray(rng.normal(size=shape) * 0.7, jnp.float32) for name, shape in shapes.items()}
    tokens = rng.integers(0, VOCABULARY, (6, 10), dtype=np.int32)
    mask = np.arange(10) < rng.integers(4, 11, (6, 1))
    data = Dataset(tokens, mask, np.arange(6, dtype=np.int32), "random ids", "0")
    traced = trace(apply, params, tokens[:2])
    return traced, params, data, calibrate(traced, params, data, 2)


def rounded(w):
    """To nearest, in float64: what `RTN` does with a scale in float16 for every column."""
    scale = (np.abs(w).max(axis=0) / 3).astype(np.float16).astype(np.float64)
    return np.clip(np.round(w / scale), -4, 3) * scale


def by_hand(params, data, strength, chosen):
    """The chain above, one value after the other; weights that are not chosen stay as they are."""
    exact = {name: np.asarray(param).astype(np.float64) for name, param in params.items()}
    ids = data.inputs[data.mask]
    x, quantized = exact["table"][ids], exact | {"table": rounded(exact["table"].T).T}
    real = quantized["table"][ids]

    def of(names, x, real):
        gram, cross = real.T @ real / len(real), real.T @ x / len(real)
        damping = DAMPING * np.diagonal(gram).mean() * np.eye(len(gram))
        for name in set(names) & set(chosen):
            fit = np.linalg.solve(gram + damping, (cross + damping) @ exact[name])
            quantized[name] = rounded(exact[name] + strength * (fit - exact[name]))

    of("ab", x, real)
    through = lambda w, x: np.tanh(x @ w["a"]) * (x @ w["b"])
    x, real = through(exact, x), through(quantized, real)
    of("c", x, real)
    of("d", np.tanh(x @ exact["c"]), np.tanh(real @ quantized["c"]))
    return quantized


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_weights_are_those_of_the_formulas(case, strength):
    traced, params, data, stats = case
    choice = dict.fromkeys(params, SCHEME)
    got = propagate(traced, params, choice, RTN(), stats, data, batch_size=2, strength=strength)
    expected = by_hand(params, data, strength, params)
    assert list(got) == list(choice)
    values = apply_plan(params, traced.weights, got)
    for name in params:
        np.testing.assert_allclose(values[name], expected[name], rtol=0, atol=2e-3, err_msg=name)  # scales in float16


def test_strength_0_rounds_the_weights_themselves(case):
    traced, params, data, stats = case
    choice = dict.fromkeys(params, SCHEME)
    got = propagate(traced, params, choice, RTN(), stats, data, batch_size=2, strength=0.0)
    plain = Candidates(params, traced.weights, RTN(), stats).choose(choice)
    for name in params:
        np.testing.assert_array_equal(got[name].dequantize(), plain[name].dequantize())


def test_nothing_to_make_up_for_changes_nothing(case):
    """What precedes is stored as it is: the fit is the identity, up to float32."""
    traced, params, data, stats = case
    got = propagate(traced, params, {"d": parse_scheme("f32")}, RTN(), stats, data, batch_size=2, strength=1.0)
    np.testing.assert_allclose(got["d"].dequantize()[0], params["d"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batches_change_nothing_but_rounding(case, batch_size):
    traced, params, data, stats = case
    choice = dict.fromkeys(params, parse_scheme("f32"))
    choice["table"] = SCHEME
    run = lambda size: propagate(traced, params, choice, RTN(), stats, data, batch_size=size)
    a, b = run(2), run(batch_size)
    for name in params:
        np.testing.assert_allclose(a[name].dequantize(), b[name].dequantize(), rtol=0, atol=1e-5)


def test_errors_do_not_add_up_over_a_model(tmp_path):
    model, data = tiny.loaded(tmp_path / "model", 16)
    traced = model.trace(4, 16)
    stats = calibrate(traced, model.params, data, 4)
    choice = {spec.path: parse_scheme("int3_g16") for spec in traced.weights}
    reference = Reference(model, data, 4)
    plain = Candidates(model.params, traced.weights, RTN("mse"), stats).choose(choice)
    made = propagate(traced, model.params, choice, RTN("mse"), stats, data, batch_size=4)

    def kl(qtensors):
        params = apply_plan(model.params, traced.weights, qtensors)
        return score(model, params, data, reference=reference, batch_size=0).summary().kl

    assert kl(made) < 0.9 * kl(plain)


def test_what_is_refused_is_refused_as_without_it(case):
    traced, params, data, stats = case
    run = lambda params, choice: propagate(traced, params, choice, RTN(), stats, data, batch_size=2)
    with pytest.raises(MpqError, match="weight d holds NaN or infinity: mend the checkpoint before quantizing it"):
        run(params | {"d": params["d"] * jnp.nan}, {"d": SCHEME})
    with pytest.raises(MpqError, match="the plan names e, which is not one of the 5 weights: trace it again"):
        run(params, {"e": SCHEME})


def test_weights_between_may_stay_as_they_are(case):
    traced, params, data, stats = case
    choice = {"table": SCHEME, "d": SCHEME}
    got = propagate(traced, params, choice, RTN(), stats, data, batch_size=2)
    assert list(got) == list(choice)
    expected = by_hand(params, data, 0.5, choice)
    np.testing.assert_allclose(got["d"].dequantize()[0], expected["d"], rtol=0, atol=2e-3)


def test_the_strength_has_bounds(case):
    traced, params, data, stats = case
    for strength in (-0.1, 1.5, float("nan")):
        with pytest.raises(MpqError, match=f"the strength of propagation is {strength}: it must be 0 to 1"):
            propagate(traced, params, {}, RTN(), stats, data, batch_size=2, strength=strength)


def test_the_command_rounds_in_order_and_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text())
    text = ["--data", "text.txt", "--window", "16", "--max-windows", "8"]
    assert exit_code("quantize", "model", "int3_g16", *text, "--awq", "--propagate", "-o", "out", "--json") == 0
    assert '"propagated": true' in capsys.readouterr().out
    assert load("out").params.keys() == load("model").params.keys()
    message = (
        "mpq: --propagate needs --data TEXT, and the inputs that --smooth and --rotate-inputs change: leave those out"
    )
    for wrong in (["--method", "rtn"], [*text, "--smooth"]):
        assert exit_code("quantize", "model", "int3_g16", *wrong, "--propagate", "-o", "x") == 2
        assert capsys.readouterr().err.strip() == message
