"""Weights of tokens by the end loss: against derivatives worked out by hand in float64, and in what rounding sees."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.artifacts import load_stats
from mpq.calibrate import calibrate
from mpq.config import RunConfig
from mpq.formats import parse_scheme
from mpq.guide import Guide
from mpq.hand_out import HandOut
from mpq.inputs import Arrays, Dataset, Tokens
from mpq.models import Model, load
from mpq.pipeline import prepare
from mpq.quantize import RTN, Candidates
from mpq.quantize.propagate import Propagation
from mpq.tasks import CausalLM, Regression
from mpq.types import MpqError
from tests import tiny
from tests.command import exit_code

WIDTH, HIDDEN, VOCABULARY, VARIANCE = 5, 7, 11, 0.25
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"up": normal(WIDTH, HIDDEN), "down": normal(HIDDEN, 1)}


def mean_of_positions(params, x):
    """`[batch, time, width]` to one number: positions differ in how much it depends on them."""
    return (jnp.tanh(x @ params["up"]) @ params["down"]).mean(axis=1)


def next_token(params, ids):
    """Logits; positions do not meet."""
    return jnp.tanh(params["table"][ids] @ params["up"]) @ params["head"]


@pytest.fixture(scope="module")
def regression():
    stored = dict.fromkeys(PARAMS, "float32")
    model = Model(mean_of_positions, PARAMS, stored, "mean", Arrays((4, WIDTH)), Regression(VARIANCE))
    x = np.asarray(normal(5, 4, WIDTH))
    return model, model.trace(2), Dataset(x, np.ones(x.shape[:2], bool), np.arange(5, dtype=np.int32), "arrays", "0")


@pytest.fixture(scope="module")
def language():
    params = {"table": normal(VOCABULARY, WIDTH), "up": normal(WIDTH, HIDDEN), "head": normal(HIDDEN, VOCABULARY)}
    stored = dict.fromkeys(params, "float32")
    model = Model(next_token, params, stored, "language", Tokens(VOCABULARY), CausalLM())
    ids = RNG.integers(0, VOCABULARY, (3, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([6, 4, 5])[:, None]
    return model, model.trace(2, 6), Dataset(ids, mask, np.arange(3, dtype=np.int32), "ids", "0")


def by_weight(guide, model, traced, data, batch_size):
    """Path -> `[windows, tokens of a window]`, without what fills up the last batch."""
    batches = list(guide(model, traced, data, batch_size))
    return {
        path: np.concatenate([np.asarray(b[path, value])[0].reshape(batch_size, -1) for b in batches])[
            : len(data.inputs)
        ]
        for path, value in batches[0]
    }


def test_one_output_gives_its_derivatives_squared_whatever_the_signs(regression):
    model, traced, data = regression
    got = by_weight(Guide(exponent=1, num_samples=1, seed=3), model, traced, data, 2)
    up, down = (np.asarray(PARAMS[name], np.float64) for name in ("up", "down"))
    slope = 1 / (4 * np.sqrt(VARIANCE))  # of the score in the output of `down`, everywhere alike
    np.testing.assert_allclose(got["down"], np.full((5, 4), slope**2), rtol=1e-5)
    h = np.tanh(np.asarray(data.inputs, np.float64) @ up)
    of_up = slope * (1 - h**2) * down[:, 0]
    np.testing.assert_allclose(got["up"], (of_up**2).mean(axis=-1), rtol=1e-4)


def test_signs_stand_for_the_fisher_matrix_of_the_softmax(language):
    model, traced, data = language
    samples = [by_weight(Guide(1, 8, seed), model, traced, data, 3) for seed in range(40)]
    params = {name: np.asarray(param, np.float64) for name, param in model.params.items()}
    h = np.tanh(params["table"][data.inputs] @ params["up"])
    logits = h @ params["head"]
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    fisher = p[..., None] * np.eye(VOCABULARY) - p[..., None] * p[..., None, :]
    back = (1 - h**2)[..., None] * params["head"]  # [windows, time, hidden, vocabulary]
    exact = {
        "head": np.einsum("btvv->bt", fisher) / VOCABULARY,
        "up": np.einsum("bthv,btvw,bthw->bt", back, fisher, back) / HIDDEN,
    }
    counted = np.pad(data.mask[:, 1:], ((0, 0), (0, 1)))
    for path, want in exact.items():
        drawn = np.stack([sample[path] for sample in samples])
        assert not drawn[:, ~counted].any()  # what is predicted there is padding
        z = (drawn.mean(axis=0) - want)[counted] / (drawn.std(axis=0, ddof=1) / np.sqrt(len(drawn)))[counted]
        assert np.abs(z).max() < 4.5


def test_batches_change_nothing_but_rounding(language):
    model, traced, data = language
    one, three = (by_weight(Guide(), model, traced, data, size) for size in (1, 3))
    for path, weights in one.items():
        np.testing.assert_allclose(weights, three[path], rtol=1e-5)
    other = by_weight(Guide(seed=1), model, traced, data, 3)
    assert not np.allclose(other["up"], three["up"])


def test_grams_are_means_over_weighted_tokens(language):
    model, traced, data = language
    guide = Guide(exponent=0.7)
    stats = calibrate(traced, model.params, data, 2, guide(model, traced, data, 2))
    weights = by_weight(guide, model, traced, data, 2)
    x = np.asarray(model.params["table"], np.float64)[data.inputs]
    inputs = {"up": x, "head": np.tanh(x @ np.asarray(model.params["up"], np.float64))}
    for path, rows in inputs.items():
        weight = np.where(data.mask, weights[path], 0.0)
        want = np.einsum("bt,btk,btl->kl", weight, rows, rows) / weight.sum()
        np.testing.assert_allclose(stats[path].gram[0], want, rtol=1e-4, atol=1e-6)
        assert stats[path].num_tokens == data.mask.sum()
        np.testing.assert_allclose(stats[path].absmax[0], np.abs(rows[data.mask]).max(axis=0), rtol=1e-5)


def test_an_exponent_of_zero_is_no_guide(language):
    model, traced, data = language
    flat = Guide(exponent=0)
    plain, got = (calibrate(traced, model.params, data, 2, w) for w in (None, flat(model, traced, data, 2)))
    for path, stats in plain.items():
        np.testing.assert_array_equal(got[path].gram, stats.gram)
    choice = {spec.path: parse_scheme("int3_channel") for spec in traced.weights}
    candidates = Candidates(model.params, traced.weights, RTN(), plain)

    def propagated(guide):
        weightings = None if guide is None else list(guide(model, traced, data, 2))
        return Propagation(traced, candidates, data, batch_size=2, weightings=weightings).choose(choice)

    exact, same, led = map(propagated, (None, flat, Guide(exponent=2)))
    for path in choice:
        np.testing.assert_array_equal(exact[path].qvalue, same[path].qvalue)
    assert not np.array_equal(exact["head"].qvalue, led["head"].qvalue)


def test_values_that_make_no_guide_are_refused():
    sentence = "exponent {} and num_samples {} of a guide must be at least 0 and 1, such as 0.5 and 4".format
    for wrong in ((-0.1, 4), (float("inf"), 4), (float("nan"), 4), (0.5, 0)):
        with pytest.raises(MpqError) as error:
            Guide(*wrong)
        assert str(error.value) == sentence(*wrong)


def test_a_gradient_that_is_not_finite_is_named(regression):
    model, traced, data = regression
    spoilt = dataclasses.replace(model, params={**model.params, "down": model.params["down"] * 1e30})
    with pytest.raises(MpqError) as error:
        list(Guide()(spoilt, traced, data, 2))
    assert str(error.value) == (
        "the gradient in the output of weight up is not finite on windows 0 to 1 of arrays: check the model on these "
        "inputs"
    )


def test_commands_take_it_and_refuse_what_does_not_go_with_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text())
    text = ("--data", "text.txt", "--window", "16", "--max-windows", "4", "--batch-size", "2")

    def made(*arguments):
        assert exit_code(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    grams = []
    for more in ((), ("--guided",)):
        made("calibrate", "model", *text, *more, "-o", "stats")
        path = "layers.1.self_attn.v_proj.kernel"
        grams.append(load_stats(tmp_path / "stats", load(str(tmp_path / "model")).digest)[0][path].gram)
    assert not np.allclose(*grams, rtol=0.01)
    told = made("quantize", "model", "int3_g16", *text, "--guided", "--propagate", "-o", "in_order")
    assert told["guided"]
    assert told["propagated"]

    of_file = "--guided needs --data TEXT; the grams of a file are what `mpq calibrate --guided` makes them: leave out "
    of_cache = "grams that the loss guides are of weights: leave --guided out with --of kv"
    refused = {
        ("quantize", "model", "int3_g16", "--stats", "stats", "--guided", "-o", "out"): of_file + "--stats",
        ("calibrate", "model", *text, "--of", "kv", "--guided", "-o", "out"): of_cache,
    }
    for arguments, sentence in refused.items():
        assert exit_code(*arguments) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"mpq: {sentence}"
        assert not (tmp_path / "out").exists()


def test_a_run_goes_by_it(tmp_path):
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text())
    config = RunConfig(
        "guided",
        model=str(tmp_path / "model"),
        data=str(tmp_path / "text.txt"),
        schemes=("int2_g16", "int3_g16"),
        metrics=("weight_mse",),
        allocate_by="weight_mse",
        compare_methods=(),
        budgets=("3.5bpw",),
        hand_out="3.5bpw",
        window=16,
        batch_size=4,
        guided=True,
        calibration_windows=12,
        selection_windows=4,
        test_windows=4,
    )
    run = prepare(config, tmp_path / "runs")
    path = "layers.0.mlp.up_proj.kernel"
    assert not np.allclose(run.rounding_stats[path].gram, run.stats[path].gram, rtol=0.01)
    handed = HandOut(run)
    codes = handed.qtensors(handed.plan, "gptq+propagate")
    assert codes.keys() == {spec.path for spec in run.traced.weights}
