"""LLM.int8: features with outliers in floating point, the others in integers, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import quantized_matmul
from mpq import packed as packed_module
from mpq.activations import (
    ACTIVATION_METRICS,
    activation_rows,
    calibrate_activations,
    kv_rows,
    parse_activation_scheme,
)
from mpq.activations.apply import RoundedActivation, choose_activations, with_activations
from mpq.activations.plans import PRESETS, uniform_rows
from mpq.activations.range_file import load_ranges, save_ranges
from mpq.activations.rows import replacing
from mpq.activations.scheme import fake_quantize, quantize
from mpq.activations.smooth import smooth_model
from mpq.array_file import read_arrays, write_arrays
from mpq.calibrate import calibrate
from mpq.distill.rows import train_rounded
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.litert.activations import Rounded
from mpq.models import load
from mpq.packed import evaluate_packed, pack_weights
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.trace import trace
from mpq.types import MpqError
from tests import tiny
from tests.activation_cases import double, forward, logits_of, make_data, make_model, rounded, run, traced
from tests.command import exit_code

DYNAMIC, FIXED = "int8_token_outlier6", "int8_token_outlier6_static"


def values(seed=0, windows=3, time=5, width=12):
    """`float32[windows, time, width]`, features large in some windows or at padding alone, and the mask."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(windows, time, width)).astype(np.float32)
    mask = np.arange(time) < np.array([5, 3, 4])[:windows, None]
    x[0, 1, 2], x[1, 0, 7], x[2, :, 2] = 9.0, -6.0, 30.0
    x[1, 4, 5] = 50.0  # padding
    return x, mask


@pytest.mark.parametrize("text", [DYNAMIC, FIXED, "int4_token_asym_outlier0.75", "int3_token_asym_outlier12.5_static"])
def test_texts_are_read_back(text):
    assert str(parse_activation_scheme(text)) == text


WRONG = {
    "int8_tensor_outlier6": "'int8_tensor_outlier6': outliers are features, apart from scales of tokens; write "
    "int8_token_outlier6",
    "int8_token_outlier0": "unknown activation scheme 'int8_token_outlier0': allowed is int2 to int8 or fp8_e4m3 ",
    "int8_token_outlier06": "unknown activation scheme 'int8_token_outlier06': allowed is int2 to int8 or fp8_e4m3 ",
    "int8_token_outlier6.50": "unknown activation scheme 'int8_token_outlier6.50': allowed is int2 to int8 or fp8",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG.keys())
def test_texts_that_mean_nothing_are_refused(text, message):
    with pytest.raises(MpqError) as refused:
        parse_activation_scheme(text)
    assert str(refused.value).startswith(message)


def fake(x, text, mask):
    """`fake_quantize` of `x[windows, time, width]`, laid out as the matrix of a product has it."""
    scheme, flat = parse_activation_scheme(text), jnp.asarray(x).reshape(1, -1, x.shape[-1])
    y = fake_quantize(flat, scheme.kind, scheme.top, heads=0, real=jnp.asarray(mask))
    return np.asarray(y).reshape(x.shape)


@pytest.mark.parametrize("text", [DYNAMIC, "int5_token_asym_outlier6"])
def test_features_of_outliers_stay_and_the_others_are_rounded_apart_from_them(text):
    scheme, (x, mask) = parse_activation_scheme(text), values()
    got = fake(x, text, mask)
    want = rounded(np.asarray(x, np.float64), scheme, mask)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    kept = (got == x).all(axis=1)  # at all positions of a window
    assert [np.flatnonzero(row).tolist() for row in kept] == [[2], [7], [2]]  # 6 is one, what padding has is not
    plain = fake(x, text.removesuffix("_outlier6"), mask)
    x, got, plain = x[mask], got[mask], plain[mask]
    assert np.abs(got - x).max() < np.abs(plain - x).max() / 5


def test_what_other_windows_hold_changes_nothing():
    x, mask = values()
    alone = [fake(x[i : i + 1], DYNAMIC, mask[i : i + 1]) for i in range(3)]
    np.testing.assert_array_equal(fake(x, DYNAMIC, mask), np.concatenate(alone))
    changed = np.where(mask[..., None], x, 100.0)
    np.testing.assert_array_equal(fake(changed, DYNAMIC, mask)[mask], fake(x, DYNAMIC, mask)[mask])


def test_codes_of_outliers_are_0():
    for text in (DYNAMIC, "int5_token_asym_outlier6"):
        scheme, (x, mask) = parse_activation_scheme(text), values()
        flat = jnp.asarray(x).reshape(1, 15, 12)
        codes, _ = quantize(flat, scheme.kind, scheme.top, heads=0, real=jnp.asarray(mask))
        codes = np.asarray(codes).reshape(3, 5, 12)
        assert not codes[0, :, 2].any()
        assert not codes[1, :, 7].any()
        assert codes[1, :, 2].any()


@pytest.fixture(scope="module")
def product():
    """A matmul and a convolution of one value with outliers; their weights quantized."""
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(16, 8)), "conv": rng.normal(size=(3, 3, 16, 8))}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    x = rng.normal(size=(2, 5, 5, 16)).astype(np.float32)
    x[0, 2, 3, 4], x[1, :, :, 9], x[1, 1, 1, 0] = 40.0, 17.0, -6.5

    def both(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return x @ params["up"], jax.lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=dims)

    return both, params, jnp.asarray(x)


@pytest.mark.parametrize("columns", [None, (), (4, 9, 0)])
def test_the_integer_path_is_the_emulated_one_and_that_of_float64(product, columns, monkeypatch):
    seen = []
    watched = lambda rows, *args, **options: seen.append(str(rows.dtype)) or quantized_matmul(rows, *args, **options)
    monkeypatch.setattr(packed_module, "quantized_matmul", watched)
    both, params, x = product
    traced = trace(both, params, x)
    qtensors = Candidates(params, traced.weights, RTN()).choose(dict.fromkeys(params, parse_scheme("int8_channel")))
    dequantized = apply_plan(params, traced.weights, qtensors)
    scheme = parse_activation_scheme(DYNAMIC if columns is None else FIXED)
    chosen = [RoundedActivation(row, scheme, columns=columns) for row in activation_rows(traced)]
    packed = pack_weights(traced.weights, qtensors)
    got = jax.jit(functools.partial(evaluate_packed, traced, activations=chosen))({}, packed, x)
    emulate = replacing([one.spec for one in chosen], lambda number, x: chosen[number](x, 2))
    emulated = jax.jit(functools.partial(traced.evaluate, replace=emulate))(dequantized, x)
    # As in tests/test_packed.py: a sum of k float32 products in any order is off by at most k eps of the sum of their
    # magnitudes, of two sums and their sum as well; more roundings are those of codes and scales, and of one addition.
    magnitude = jax.jit(both)(jax.tree.map(jnp.abs, dequantized), jnp.abs(x) + 0.5)
    for a, b, most, k in zip(got, emulated, magnitude, (16, 144), strict=True):
        bound = 2 * (k + 5) * np.finfo(np.float32).eps * np.asarray(most)
        assert (np.abs(a - b) <= bound).all()
    # Codes of both factors multiplied as int64, and what stays as float64.
    flat = np.asarray(x, np.float64).reshape(2, 25, 16)
    for window in range(2):
        large = (np.abs(flat[window]) >= 6).any(axis=0) if columns is None else np.isin(np.arange(16), columns)
        assert columns == () or large.sum() == (3 if columns else 1 + window)
        rest = np.where(large, 0, flat[window])
        step = np.float16(np.abs(rest).max(axis=1, keepdims=True) / 127).astype(np.float64)
        codes = np.round(rest / step).clip(-127, 127).astype(np.int64)
        w, scale = np.asarray(qtensors["up"].qvalue[0], np.int64), np.asarray(qtensors["up"].scale[0], np.float64)
        want = (codes @ w) * step * scale + np.where(large, flat[window], 0) @ (w * scale)
        bound = 2 * 21 * np.finfo(np.float32).eps * np.asarray(magnitude[0][window]).reshape(25, 8)
        assert (np.abs(np.asarray(got[0][window]).reshape(25, 8) - want) <= bound).all()
        # All rounded by the token's largest is elsewhere: the test can tell.
        assert columns == () or (np.abs(np.asarray(got[0] - both(dequantized, x)[0])).max() < 0.2)
    # The product of codes, and that of what stays (both branches are traced); the convolution is XLA's, of floats.
    assert seen == (["int8"] if columns == () else ["int8", "float32"])


def test_outliers_of_calibration_are_those_that_reached_the_threshold():
    model, data = make_model(), make_data(10)
    rows, seen = activation_rows(traced(model)), {}
    logits_of(double(model.params), data.inputs, lambda name, x: seen.setdefault(name, x))
    ranges = calibrate_activations(model, traced(model), rows, data, batch_size=4)
    scheme = parse_activation_scheme("int3_token_outlier8_static")
    chosen = choose_activations(dict.fromkeys(rows, scheme), ranges)
    masks = {p: np.abs(x[data.mask]).max(axis=0) >= 8 for p, x in seen.items()}
    assert {one.spec.path: one.columns for one in chosen} == {
        row.path: tuple(np.flatnonzero(masks[row.path])) for row in rows
    }
    assert [int(masks[row.path].sum()) for row in rows] == [0, 0, 3, 0, 3]  # of 4 features, and 6
    change = lambda name, x: rounded(x, scheme, data.mask, masks[name]) if name in masks and x.size else x
    want = logits_of(double(model.params), data.inputs, lambda n, x: x if n in ("key", "value") else change(n, x))
    got = np.asarray(jax.jit(with_activations(model, traced(model), chosen).apply)(model.params, data.inputs))
    off = np.abs(got - want).max(axis=-1)  # a value that rounds the other way moves a token by a step
    assert np.median(off) < 1e-5
    assert (off < 1e-4).mean() > 0.9
    # Scored with the same columns: rounding one row alone, and what both metrics say of it.
    tables = [
        metric(model, traced(model), rows, (scheme,), data, key=jax.random.key(0), batch_size=4, ranges=ranges)
        for metric in ACTIVATION_METRICS.values()
    ]
    alone = run(ACTIVATION_METRICS["kl"], "activations", model, data, schemes=(parse_activation_scheme("int3_token"),))
    assert tables[0].quantizer == "static"
    better = tables[0].loss_increase < 0.9 * alone.loss_increase
    assert better[:, 0].tolist() == [False, False, True, False, True]
    ratio = tables[1].loss_increase.sum() / tables[0].loss_increase.sum()
    assert 0.3 < ratio < 3


def test_files_without_magnitudes_of_features_are_refused(tmp_path):
    model, data = make_model(), make_data(4)
    rows = activation_rows(traced(model))
    save_ranges(tmp_path / "r", calibrate_activations(model, traced(model), rows, data, batch_size=4), "m", ["d"])
    header, arrays = read_arrays(tmp_path / "r", "activation ranges", "")
    kept = {name: array for name, array in arrays.items() if not name.startswith("largest/")}
    write_arrays(
        tmp_path / "old", "activation ranges", {k: header[k] for k in header if k not in ("kind", "schema")}, kept
    )
    with pytest.raises(MpqError) as refused:
        load_ranges(tmp_path / "old")
    assert str(refused.value) == (
        f"{tmp_path / 'old'} is of an earlier version: run `mpq calibrate --of activations` again"
    )


def test_what_does_not_suit_is_refused():
    model = make_model()
    row, cache = activation_rows(traced(model))[0], kv_rows(traced(model), "key")[0]
    scheme, fixed = map(parse_activation_scheme, (DYNAMIC, FIXED))
    with pytest.raises(MpqError) as refused:
        choose_activations({cache: scheme}, {})
    message = (
        "int8_token_outlier6 leaves outliers in floating point, and the cache of key is of codes alone: use int8_token"
    )
    assert str(refused.value) == message
    with pytest.raises(MpqError, match=f"^{message}$"):
        uniform_rows(traced(model), None, DYNAMIC, "key")
    with pytest.raises(MpqError) as refused:
        choose_activations({row: fixed}, {})
    assert str(refused.value) == (
        "{query,key,value} at int8_token_outlier6_static has no calibrated outliers: run mpq calibrate --of "
        "activations, or find them as they come, int8_token_outlier6"
    )
    with pytest.raises(MpqError, match=r"^\{query,key,value\} at int8_token_outlier6_static has no calibrated range"):
        with_activations(model, traced(model), [RoundedActivation(row, fixed)])
    with pytest.raises(MpqError) as refused:
        fake_quantize(jnp.ones((1, 5, 4)), scheme.kind, scheme.top, heads=0, real=jnp.ones(2, bool))
    assert str(refused.value) == (
        "5 positions are not those of 2 windows, whose outliers are wanted: use a scheme without them, or with those "
        "of calibration, int8_token_outlier6_static"
    )
    for name in ("onnx", "pt2"):
        reason = TARGETS[name].rounding_refusal(row, dataclasses.replace(scheme, bits=6))
        what = {"onnx": "graph", "pt2": "program"}[name]
        assert reason == f"the {what} keeps no features in floating point; int6_token rounds them all"


def test_smoothing_and_training_know_them():
    model, data = make_model(), make_data(6)
    rows, scheme = activation_rows(traced(model)), parse_activation_scheme("int3_token_outlier1.5_static")
    stats = calibrate(traced(model), model.params, data, 4)
    choice = {spec.path: parse_scheme("int8_channel") for spec in traced(model).weights}
    start = tuple(RoundedActivation(row, scheme) for row in rows)
    smoothed, chosen, _ = smooth_model(model, traced(model), start, choice, stats, data, 4)
    # Whatever is divided is divided where it stays in floating point, too: without rounding the outputs are the same.
    all_kept = [dataclasses.replace(one, columns=tuple(range(one.spec.width))) for one in chosen]
    assert any(one.smooth is not None for one in chosen)
    same = with_activations(smoothed, traced(model), all_kept).apply(smoothed.params, data.inputs)
    np.testing.assert_allclose(same, forward(model.params, data.inputs), rtol=1e-4, atol=1e-5)
    one = RoundedActivation(rows[0], scheme, columns=(1, 3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 4)) * 2, jnp.float32)
    trained, pull = jax.vjp(lambda x: train_rounded(one, x, 2, None), x)
    np.testing.assert_allclose(trained, one(x, 2), rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], 1)
    np.testing.assert_array_equal(trained[..., 1], x[..., 1])


def test_plans_with_outliers_go_through_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(seed=1))
    text = ("--data", "text.txt", "--window", "16", "--batch-size", "4", "--max-windows", "8")
    plan = "int8_channel+int8_token_outlier2_static"
    assert exit_code("quantize", "model", plan, "--method", "rtn", *text, "-o", "q", "--json") == 0
    exported = orbax.load(tmp_path / "q")
    rows = exported.plan["activations"]
    assert exported.columns.keys() == rows.keys()
    assert {n: a.size for n, a in exported.columns.items()} == {n: -(-row["width"] // 8) for n, row in rows.items()}
    assert '"size_bytes":' in (out := capsys.readouterr().out)
    size = orbax.payload_bytes(tmp_path / "q")
    assert f'"size_bytes": {size}' in out or f'"size_bytes":{size}' in out
    model = load("model")
    chosen = [RoundedActivation.from_json(row, columns=exported.columns[path]) for path, row in rows.items()]
    assert any(one.columns for one in chosen)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (3, 16)), jnp.int32)
    by_hand = with_activations(model, model.trace(4, 16), chosen)
    quantized = load("q")
    apply = lambda m: np.asarray(jax.jit(m.apply)(quantized.params, tokens))
    np.testing.assert_array_equal(apply(quantized), apply(by_hand))
    assert np.abs(apply(quantized) - apply(model)).max() > 1e-4
    assert exit_code("quantize", "model", plan, "--method", "rtn", "-o", "no") == 2
    assert "static ranges of activations need calibration: give --data TEXT or --ranges FILE" in capsys.readouterr().err
    assert exit_code("quantize", "model", "llm_int8", "--method", "rtn", "-o", "d") == 0
    assert PRESETS["llm_int8"] == f"int8_channel+{DYNAMIC}"
    for to, said in (("onnx", "int8_token"), ("pt2", "int8_token"), ("litert", "int8_token_asym")):
        with pytest.raises(MpqError, match=f"keeps? no features in floating point; {said} rounds them all"):
            _refuse(to, orbax.load(tmp_path / "d"))


def _refuse(to, exported):
    """What the exporter of a runtime says first, without its packages."""
    if to == "litert":
        Rounded.of(exported)
        return
    from mpq.export.graphs import model_of, rounded_rows

    rounded_rows(exported, model_of(exported, "d"), to, TARGETS[to].rounding_refusal)


def test_export_arguments_pack_a_bit_a_feature():
    model = make_model()
    row = activation_rows(traced(model))[0]
    one = RoundedActivation(row, parse_activation_scheme(FIXED), columns=(0, 3))
    packed = export_arguments(model, (), {}, _Plan(), [one])["columns"][row.path]
    assert packed.tolist() == [0b10010000]
    assert RoundedActivation.from_json(one.to_json(), columns=packed) == one
    assert one.range_bits == 8


class _Plan:
    def to_json(self):
        return {}
