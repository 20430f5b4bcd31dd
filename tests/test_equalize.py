"""Scales move where the model does not notice, and there they make rounding cheaper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.calibrate import calibrate, divided
from mpq.equalize import awq, find_folds
from mpq.equalize.awq import STRENGTHS, factors, output_error
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models import load
from mpq.quantize import RTN
from tests import decoder_cases, tiny
from tests.command import exit_code

QKV = tuple(f"self_attn.{name}_proj.kernel" for name in "qkv")
GLU = ("mlp.gate_proj.kernel", "mlp.up_proj.kernel")
UP, DOWN = "mlp.up_proj.kernel", "mlp.down_proj.kernel"
NORMS = {name: (f"{name}.scale",) for name in ("input_layernorm", "post_attention_layernorm")}
NORMS_WITH_BIAS = {name: (f"{name}.bias", f"{name}.scale") for name in NORMS}
# of the first block: (vectors, columns) -> rows, by hand from the papers' equations
FOLDS = {
    # heads that share keys and values have no output column to a row of o_proj
    "llama": {
        (NORMS["input_layernorm"], None): QKV,
        (NORMS["post_attention_layernorm"], None): GLU,
        ((), UP): (DOWN,),
    },
    # the norms' scales are 1 + g
    "gemma2": {((), UP): (DOWN,)},
    # GELU minds; q, k and v are one weight
    "gpt2": {
        (NORMS_WITH_BIAS["input_layernorm"], None): ("self_attn.qkv_proj.kernel",),
        (NORMS_WITH_BIAS["post_attention_layernorm"], None): (UP,),
    },
    # ReLU does not mind a positive factor; norms after the sum go into the residual stream as well
    "opt, post-norm, projected": {
        (("self_attn.v_proj.bias",), "self_attn.v_proj.kernel"): ("self_attn.o_proj.kernel",),
        (("mlp.up_proj.bias",), UP): (DOWN,),
    },
    # the second norm also goes to the router and into experts, which are read in a batch
    "mixtral": {(NORMS["input_layernorm"], None): QKV},
}


def random_data(vocabulary=16, windows=2, time=12):
    tokens = np.random.default_rng(0).integers(0, vocabulary, (windows, time), dtype=np.int32)
    return Dataset(tokens, np.ones_like(tokens, bool), np.arange(windows, dtype=np.int32), "random tokens", "0")


def weights_of(traced):
    return {spec.path: spec for spec in traced.weights}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """`(model, trace, data, its statistics, its folds)`, one channel of which is large."""
    model, data = tiny.loaded(tmp_path_factory.mktemp("model"), 4)
    params = dict(model.params)
    for layer in range(2):
        path = f"layers.{layer}.input_layernorm.scale"
        params[path] = params[path] * jnp.where(jnp.arange(32) == 5, 60.0, 1.0)
    model = dataclasses.replace(model, params=params)
    traced = model.trace(4, 16)
    return model, traced, data, calibrate(traced, params, data, 4), find_folds(model, traced, data)


@pytest.mark.parametrize("name", FOLDS)
def test_scales_move_where_the_equations_allow_it_and_nowhere_else(tmp_path, name):
    model = load(str(decoder_cases.write(tmp_path / "model", name)))
    traced = model.trace(1, 12)
    folds = find_folds(model, traced, random_data())
    strip = lambda path: None if path is None else path.removeprefix("layers.0.")
    first = [fold for fold in folds if fold.rows[0].startswith("layers.0.")]
    got = {(tuple(map(strip, f.vectors)), strip(f.columns)): tuple(map(strip, f.rows)) for f in first}
    assert got == FOLDS[name]
    inputs, run = random_data().inputs, jax.jit(model.apply)
    before, params = run(model.params, inputs), model.params
    for number, fold in enumerate(folds):
        s = np.random.default_rng(number).uniform(0.1, 10, fold.width).astype(np.float32)
        params = fold.apply(params, weights_of(traced), s)
    np.testing.assert_allclose(run(params, inputs), before, rtol=0, atol=1e-5 * float(jnp.abs(before).max()))


def test_a_final_norm_before_a_tied_head_stays(llama):
    _, _, _, _, folds = llama
    assert not any("norm.scale" in fold.vectors for fold in folds)


def test_the_strength_has_the_least_error_of_all(llama):
    """Against the formulas in float64, for one input that three weights read."""
    model, traced, _, stats, folds = llama
    fold, weights = folds[0], weights_of(traced)
    choice = {path: parse_scheme("int3_g16") for path in weights}
    *_, strengths = awq(model, traced, [fold], choice, stats)
    gram = stats[fold.rows[0]].gram[0].astype(np.float64)
    sizes = np.sqrt(np.diagonal(gram))
    errors = []
    for alpha in (0.0, *STRENGTHS):
        s = sizes**alpha / np.sqrt((sizes**alpha).max() * (sizes**alpha).min()) if alpha else np.ones(32)
        total = 0.0
        for path in fold.rows:
            w = np.asarray(weights[path].read(model.params)[0]).astype(np.float64)
            over = jnp.asarray((gram / np.outer(s, s)).astype(np.float32))
            stored = RTN("mse")(jnp.asarray(w * s[:, None], jnp.float32)[None], choice[path], over[None])
            error = np.asarray(stored.dequantize()[0]).astype(np.float64) / s[:, None] - w
            total += np.einsum("kn,kl,ln->", error, gram, error)
        errors.append(total)
    chosen = (0.0, *STRENGTHS).index(strengths[fold.rows[0]])
    assert errors[chosen] <= min(errors) * (1 + 1e-4)
    rows = [weights[path] for path in fold.rows]
    got = [output_error(model.params, rows, choice, stats, factors(sizes, a)) for a in STRENGTHS]
    np.testing.assert_allclose(got, errors[1:], rtol=1e-3)


def test_large_channels_are_rounded_finer_and_the_floats_stay(llama):
    model, traced, data, stats, folds = llama
    weights, choice = weights_of(traced), {spec.path: parse_scheme("int3_g16") for spec in traced.weights}
    new, moved, strengths = awq(model, traced, folds, choice, stats)
    assert strengths["layers.0.self_attn.q_proj.kernel"] > 0
    run = jax.jit(model.apply)
    before, after = run(model.params, data.inputs), run(new.params, data.inputs)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.abs(before).max()))
    again = calibrate(traced, new.params, data, 4)
    for path in again:  # what is left at the inputs is what was worked out without looking again
        np.testing.assert_allclose(moved[path].gram, again[path].gram, rtol=1e-3, atol=1e-4 * again[path].gram.max())
        np.testing.assert_allclose(moved[path].absmax, again[path].absmax, rtol=1e-4)
    rows = [weights[path] for fold in folds[:1] for path in fold.rows]
    one = np.ones(32, np.float32)
    # float32's outlier takes nearly all of the error with it; this is what AWQ is for
    assert output_error(new.params, rows, choice, moved, one) < 0.9 * output_error(
        model.params, rows, choice, stats, one
    )


def test_a_weight_with_one_scale_keeps_its_columns(llama):
    model, traced, _, stats, folds = llama
    choice = {spec.path: parse_scheme("int4_tensor") for spec in traced.weights}
    *_, strengths = awq(model, traced, folds, choice, stats)
    assert set(strengths) == {fold.rows[0] for fold in folds if fold.columns is None}


def test_weights_without_a_scheme_or_statistics_are_left_alone(llama):
    model, traced, _, stats, folds = llama
    new, moved, strengths = awq(model, traced, folds, {}, stats)
    assert strengths == {}
    assert new.params == dict(model.params)
    assert moved == dict(stats)
    choice = {spec.path: parse_scheme("int4_g16") for spec in traced.weights}
    assert awq(model, traced, folds, choice, {})[2] == {}


def test_channels_that_are_always_zero_stay_as_they_are():
    np.testing.assert_array_equal(factors(np.zeros(3), 0.5), np.ones(3))
    np.testing.assert_allclose(factors(np.asarray([4.0, 0.0, 1.0]), 1.0), [2, 1, 0.5])


def test_statistics_of_divided_inputs(llama):
    _, _, _, stats, _ = llama
    one, s = stats["layers.0.self_attn.q_proj.kernel"], np.arange(1, 33, dtype=np.float32)
    got = divided(one, s)
    np.testing.assert_allclose(got.gram[0, 3, 7], one.gram[0, 3, 7] / 32, rtol=1e-6)
    np.testing.assert_allclose(got.absmax, one.absmax / s)


def test_the_command_writes_a_folder_that_loads_and_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text())
    text = ["--data", "text.txt", "--window", "16", "--max-windows", "8"]
    assert exit_code("quantize", "model", "int3_g16", *text, "--awq", "-o", "out", "--json") == 0
    assert '"equalized": ' in capsys.readouterr().out
    original, model = load("model"), load("out")
    path = "layers.0.input_layernorm.scale"
    assert not np.array_equal(model.params[path], original.params[path])
    message = "mpq: --awq needs --data TEXT and a plan of weights alone; for activations give --smooth"
    for plan, *wrong in (["int3_g16", "--method", "rtn"], ["w8a8", *text], ["int4_g16+int8_token", *text]):
        assert exit_code("quantize", "model", plan, *wrong, "--awq", "-o", "x") == 2
        assert capsys.readouterr().err.strip() == message
