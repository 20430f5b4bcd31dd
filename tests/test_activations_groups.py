"""FP8 and groups of features: against ml_dtypes, number by number in float64, and in integers through `mpq.packed`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import KernelError, grouped_matmul, pack, segment_size
from mpq import packed as packed_module
from mpq.activations import ACTIVATION_METRICS, ActivationSpec, activation_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation
from mpq.activations.clip import choose_range
from mpq.activations.plans import PRESETS
from mpq.activations.ranges import ActivationRange, rebinned
from mpq.activations.rows import replacing
from mpq.activations.scheme import fake_quantize, nearest_fp8, quantize
from mpq.distill.rows import train_rounded
from mpq.export import orbax
from mpq.export.graphs import model_of, rounded_rows
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.litert.activations import Rounded
from mpq.models import load
from mpq.packed import evaluate_packed, pack_weights
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.trace import trace
from mpq.types import MpqError
from tests import tiny
from tests.activation_cases import double, log_softmax, logits_of, make_data, make_model, only, round_group, run
from tests.command import exit_code

FP8 = ml_dtypes.float8_e4m3fn
LEVELS = np.unique(np.arange(256, dtype=np.uint8).view(FP8).astype(np.float64))
LEVELS = LEVELS[np.isfinite(LEVELS)]
TEXTS = ("fp8_e4m3_token", "fp8_e4m3_head", "fp8_e4m3_tensor", "fp8_e4m3_g5", "int4_g4", "int3_g5_asym", "int8_g64")


def round_fp8(values, seen):
    """`values` by the range of `seen`; the nearest level by distance, the even one of two."""
    scale = float(np.float16(max(0.0, *np.abs(seen)) / 448)) or 2.0**-24
    return [float(np.float64(min(max(v / scale, -448), 448)).astype(FP8)) * scale for v in values]


def oracle(x, text):
    """`x[windows, time, width]` rounded, in float64: a group at a time."""
    scheme, y = parse_activation_scheme(text), np.empty_like(x, np.float64)
    one = round_fp8 if scheme.minifloat else functools.partial(round_group, scheme=scheme)
    for b, t in np.ndindex(x.shape[:2]):
        ends = range(scheme.group_size, x.shape[2], scheme.group_size) if scheme.group_size else ()
        parts = np.split(x[b, t], 2 if scheme.granularity == "head" else tuple(ends) or 1)
        seen = [x[b].ravel()] if scheme.granularity == "tensor" else parts
        y[b, t] = np.concatenate([one(part, of) for part, of in zip(parts, seen, strict=True)])
    return y


def fake(x, text, **options):
    scheme = parse_activation_scheme(text)
    flat, real = jnp.asarray(x, jnp.float32).reshape(1, -1, x.shape[-1]), jnp.ones(len(x), bool)
    quantized = jax.jit(lambda x: fake_quantize(x, scheme.kind, scheme.top, heads=2, real=real, **options))(flat)
    return np.asarray(quantized).reshape(x.shape)


@pytest.mark.parametrize("text", [*TEXTS, "fp8_e4m3_tensor_static", "fp8_e4m3_head_static_percentile"])
def test_texts_are_read_back(text):
    assert str(parse_activation_scheme(text)) == text


def test_the_nearest_of_fp8_is_that_of_ml_dtypes_and_of_distances():
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2  # exact in float32: ties, and their neighbours on both sides
    x = np.concatenate(
        [middles, np.nextafter(np.float32(middles), np.float32(1e9)), LEVELS, np.linspace(-448, 448, 999)]
    )
    x = x.astype(np.float32)
    got = np.asarray(jax.jit(nearest_fp8)(x))
    np.testing.assert_array_equal(got, x.astype(FP8).astype(np.float32))
    distance = np.abs(x[:, None].astype(np.float64) - LEVELS)
    np.testing.assert_array_equal(np.abs(got - x.astype(np.float64)), distance.min(axis=1))
    assert len(LEVELS) == 253
    assert (got[: len(middles)].astype(FP8).view(np.uint8) % 2 == 0).all()  # of two equally near, the even one


@pytest.mark.parametrize("text", TEXTS)
def test_values_are_rounded_as_in_float64(text):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 4, 12)) * np.exp(2 * rng.normal(size=(3, 4, 12)))).astype(np.float32)
    x[0, 0], x[1, 2, 3:8] = 0, 0  # a token, and a group, of nothing
    got, want = fake(x, text), oracle(x, text)
    # A quotient in float32 may fall on the other side of a middle: then it is the other neighbour, as near up to that.
    same = np.isclose(got, want, rtol=2e-6, atol=0)
    assert same.mean() > 0.99
    np.testing.assert_allclose(np.abs(got - x), np.abs(want - x), rtol=1e-4, atol=1e-6 * np.abs(x).max())
    assert (got[0, 0] == 0).all()
    assert (got[1, 2, 3:8] == 0).all()
    assert np.abs(got - x).max() > 1e-3


def test_a_group_shares_no_scale_with_its_neighbours_and_codes_are_filled_up():
    x = np.random.default_rng(0).normal(size=(1, 3, 10)).astype(np.float32)
    large = x.copy()
    large[0, 1, 5] = 1e3
    changed = fake(x, "int4_g4") != fake(large, "int4_g4")
    assert not changed[0, [0, 2]].any()
    assert changed[0, 1].tolist() == [False] * 4 + [True] * 4 + [False] * 2
    scheme = parse_activation_scheme("int4_g4")
    codes, scale = quantize(jnp.asarray(x), scheme.kind, scheme.top, heads=0, real=jnp.ones(1, bool))
    assert codes.shape == (1, 3, 3, 4)
    assert scale.shape == (1, 3, 3, 1)
    assert not codes[:, :, 2, 2:].any()


def test_sizes_count_a_scale_for_every_group():
    row = ActivationSpec("x", "activation", "x", ("x",), batch=2, width=70, heads=0)
    bits = lambda text: row.size_bits(parse_activation_scheme(text))
    assert bits("int4_g32") == 2 * (70 * 4 + 3 * 16)
    assert bits("int4_g32_asym") == 2 * (70 * 4 + 3 * (16 + 4))
    assert bits("fp8_e4m3_token") == bits("int8_token") == 2 * (70 * 8 + 16)
    assert RoundedActivation(row, parse_activation_scheme("fp8_e4m3_tensor_static")).range_bits == 64


WRONG = {
    "int8_g32_static": "'int8_g32_static': tokens to come are not known in advance; a static range is of a tensor or a "
    "head",
    "fp8_e4m3_token_asym": "'fp8_e4m3_token_asym': fp8_e4m3 has a sign and steps that grow with the value: _asym goes "
    "with integers alone",
    "fp8_e4m3_tensor_static_entropy": "'fp8_e4m3_tensor_static_entropy': fp8_e4m3 has a sign and steps that grow with "
    "the value: entropy counts equal steps; take mse",
    "int8_g32_outlier6": "'int8_g32_outlier6': outliers are features, apart from scales of tokens; write "
    "int8_token_outlier6",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG.keys())
def test_texts_that_mean_nothing_are_refused(text, message):
    with pytest.raises(MpqError) as refused:
        parse_activation_scheme(text)
    assert str(refused.value) == message


@pytest.mark.slow
def test_both_metrics_score_them():
    model, data = make_model(), make_data(8)
    schemes = tuple(map(parse_activation_scheme, ("fp8_e4m3_token", "int3_g2")))
    kl, fisher = (run(m, "activations", model, data, schemes=schemes) for m in ACTIVATION_METRICS.values())
    params, p = double(model.params), None
    p = log_softmax(logits_of(params, data.inputs, lambda name, x: x))
    counted = data.mask[:, 1:]
    for number, row in enumerate(kl.activations):
        for column, scheme in enumerate(schemes):
            change = only(row.path, lambda x, scheme=scheme: oracle(x, str(scheme)))
            q = log_softmax(logits_of(params, data.inputs, change))
            want = (np.exp(p) * (p - q)).sum(-1)[:, :-1][counted].mean()
            assert kl.loss_increase[number, column] == pytest.approx(want, rel=0.05, abs=1e-6)
    assert 0.5 < fisher.loss_increase.sum() / kl.loss_increase.sum() < 2


def test_a_static_range_of_fp8_has_the_least_squared_error_of_all_shares():
    x = np.random.default_rng(0).standard_t(2, size=4000).astype(np.float32)
    exponent = int(np.frexp(np.abs(x).max())[1])
    bins = np.floor(x * 4096.0 * 2.0**-exponent).astype(int) + 4096
    counts = np.bincount(bins, minlength=8192)[None].astype(np.int64)
    row = ActivationSpec("x", "activation", "x", ("x",), 1, 1, 0)
    ends = np.full((1, 1), x.min(), np.float32), np.full((1, 1), x.max(), np.float32)
    found = ActivationRange(row, rebinned(counts, 0), exponent, *ends, np.abs(x).max(keepdims=True))
    (low,), (high,) = choose_range(found, parse_activation_scheme("fp8_e4m3_tensor_static"), "x")
    largest = float(np.abs(x).max())
    error = lambda end: np.square(
        (x.astype(np.float64) / end * 448).clip(-448, 448).astype(FP8) * (end / 448) - x
    ).mean()
    tried = [error(share * largest) for share in np.arange(1, 129) / 128]
    assert low == -high
    # Bins are 2^-12 of the range, so errors are known up to about that.
    assert error(float(high)) < 1.02 * min(tried)
    assert choose_range(found, parse_activation_scheme("fp8_e4m3_tensor_static_absmax"), "x")[1][0] == np.float32(
        largest
    )


def test_what_is_trained_is_what_runs():
    row = ActivationSpec("x", "activation", "x", ("x",), 1, 10, 0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 10)) * 3, jnp.float32)
    for text in ("int4_g4", "fp8_e4m3_token"):
        one = RoundedActivation(row, parse_activation_scheme(text))
        trained, pull = jax.vjp(lambda x, one=one: train_rounded(one, x, 2, None), x)
        np.testing.assert_allclose(trained, one(x, 2), rtol=1e-6)
        np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], 1)
    one = RoundedActivation(row, parse_activation_scheme("fp8_e4m3_tensor_static"), (-4.0,), (4.0,))
    trained, pull = jax.vjp(lambda x, f: train_rounded(one, x, 2, f), x, jnp.zeros(1))
    np.testing.assert_allclose(trained, one(x, 2), rtol=1e-5, atol=1e-6)
    dx, factor = pull(jnp.ones_like(x))
    inside = np.abs(np.asarray(x)) <= 4
    np.testing.assert_array_equal(dx, inside.astype(np.float32))
    # LSQ, eq. 3, in the logarithm of the scale s: s (q(v) - v) inside, and the end of the range outside.
    scale = float(np.float16(4 / 448))
    v = np.asarray(x, np.float64) / scale
    want = (
        np.where(np.abs(v) <= 448, v.clip(-448, 448).astype(FP8).astype(np.float64) - v, np.sign(v) * 448).sum() * scale
    )
    np.testing.assert_allclose(factor[0], want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("group", "of_weight", "zero_point", "k"),
    [(4, 8, True, 24), (8, 4, False, 22), (6, None, True, 20), (64, 5, False, 13), (5, 5, True, 13)],
)
def test_products_of_groups_are_those_of_int64(group, of_weight, zero_point, k):
    rng, n, m = np.random.default_rng(0), 7, 3
    groups, parts = -(-k // (of_weight or k)), -(-k // group)
    codes, w = (rng.integers(-127, 128, size).astype(np.int8) for size in ((m, k), (k, n)))
    scales, steps = rng.uniform(0.5, 2, (m, parts)).astype(np.float32), rng.uniform(0.5, 2, (groups, n))
    zeros = rng.integers(-9, 9, (groups, n)).astype(np.int8) if zero_point else None
    packed = pack(w, steps.astype(np.float32), zeros, bits=8, group_size=of_weight, layout="plain")
    got = jax.jit(functools.partial(grouped_matmul, group_size=group))(codes, scales, packed)
    spread = lambda array, size: np.repeat(array, size, axis=0)[:k]
    x = codes.astype(np.float64) * spread(scales.T.astype(np.float64), group).T
    centre = 0 if zeros is None else spread(zeros.astype(np.int64), of_weight or k)
    exact = (w.astype(np.int64) - centre) * spread(steps.astype(np.float32).astype(np.float64), of_weight or k)
    # Sums of a segment are exact; at most k of them, scaled twice and added, in float32.
    bound = (k + 3) * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(exact))
    assert (np.abs(got - x @ exact) <= bound).all()


def test_groups_that_do_not_nest_are_refused():
    packed = pack(np.zeros((12, 2), np.int8), np.ones((2, 2), np.float32), bits=8, group_size=6)
    assert segment_size(packed, 4) is None
    with pytest.raises(KernelError) as refused:
        grouped_matmul(jnp.zeros((1, 12), jnp.int8), jnp.ones((1, 3)), packed, 4)
    assert str(refused.value) == (
        "no product of integers of groups of 4 with a weight in groups of 6: one has to divide the other"
    )
    table = pack(np.zeros((12, 2), np.int8), np.ones((2, 2), np.float32), bits=1, group_size=6, levels=(-1.0, 1.0))
    with pytest.raises(KernelError) as refused:
        grouped_matmul(jnp.zeros((1, 12), jnp.int8), jnp.ones((1, 2)), table, 6)
    assert str(refused.value) == (
        "no product of integers of groups of 6 with a weight in groups of 6 of looked up values: one has to divide the "
        "other"
    )


@pytest.mark.parametrize(
    ("text", "weights"), [("int8_g8", "int4_g8"), ("int4_g5", "int8_channel"), ("int8_g6", "int4_g4")]
)
def test_the_integer_path_is_the_emulated_one(text, weights, monkeypatch):
    """A matmul, a convolution, which is one of floats, and a stack of experts."""
    seen = []
    watched = lambda *args: seen.append(str(args[0].dtype)) or grouped_matmul(*args)
    monkeypatch.setattr(packed_module, "grouped_matmul", watched)
    rng, scheme = np.random.default_rng(0), parse_activation_scheme(text)
    params = {
        "up": rng.normal(size=(16, 8)),
        "conv": rng.normal(size=(3, 3, 16, 8)),
        "experts": rng.normal(size=(2, 16, 4)),
    }
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 16)) * np.exp(rng.normal(size=(2, 5, 5, 16))), jnp.float32)

    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x @ p["up"], y, jnp.einsum("emk,ekn->emn", x.reshape(2, 25, 16), p["experts"])

    traced = trace(fn, params, x)
    qtensors = Candidates(params, traced.weights, RTN()).choose(dict.fromkeys(params, parse_scheme(weights)))
    dequantized = apply_plan(params, traced.weights, qtensors)
    chosen = [RoundedActivation(row, scheme) for row in activation_rows(traced)]
    packed = pack_weights(traced.weights, qtensors)
    got = jax.jit(functools.partial(evaluate_packed, traced, activations=chosen))({}, packed, x)
    emulate = replacing([one.spec for one in chosen], lambda number, x: chosen[number](x, 2))
    want = jax.jit(functools.partial(traced.evaluate, replace=emulate))(dequantized, x)
    # As in tests/test_packed.py: two sums of k products in float32, each off by at most k eps of their magnitudes.
    magnitude = jax.jit(fn)(jax.tree.map(jnp.abs, dequantized), jnp.abs(x) + 0.5)
    for a, b, most, k in zip(got, want, magnitude, (16, 144, 16), strict=True):
        assert (np.abs(a - b) <= 2 * (k + 4) * np.finfo(np.float32).eps * np.asarray(most)).all()
    assert seen[:2] == (["int8", "int8"] if (text, weights) != ("int8_g6", "int4_g4") else [])
    assert np.abs(np.asarray(got[0] - fn(dequantized, x)[0])).max() > 1e-3


def test_plans_with_them_go_through_the_commands_and_exporters_refuse_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "model")
    for number, (plan, text) in enumerate(
        {"int4_g16+int4_g5+fp8_e4m3_head": "int4_g5", "w8a8_fp8": "fp8_e4m3_token"}.items()
    ):
        assert exit_code("quantize", "model", plan, "--method", "rtn", "-o", f"q{number}", "--json") == 0
        exported = orbax.load(tmp_path / f"q{number}")
        rows = exported.plan["activations"]
        assert {row["scheme"] for row in rows.values() if row["kind"] == "activation"} == {text}
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (3, 16)), jnp.int32)
        quantized, original = load(f"q{number}"), load("model")
        kept = dataclasses.replace(original, params=quantized.params)
        assert np.abs(quantized.apply(quantized.params, tokens) - kept.apply(kept.params, tokens)).max() > 1e-4
        for to in ("onnx", "pt2"):
            with pytest.raises(MpqError) as refused:
                rounded_rows(exported, model_of(exported, "q"), to, TARGETS[to].rounding_refusal)
            assert str(refused.value) == REFUSED[to, text]
    with pytest.raises(MpqError) as refused:
        Rounded.of(exported)
    assert str(refused.value).endswith(
        ": it has no FP8; use int8_token_asym; quantize with the plan of the weights alone, or another"
    )
    assert PRESETS["w8a8_fp8"] == "fp8_e4m3_channel+fp8_e4m3_token"
    capsys.readouterr()


FIRST = "embed_tokens.embedding"
REFUSED = {
    (
        "onnx",
        "int4_g5",
    ): f"{FIRST} at int4_g5 has no form in onnx: its CPU provider has one scale before each sum, none "
    "for groups of features; use int4_token; choose another plan",
    ("pt2", "int4_g5"): f"{FIRST} at int4_g5 has no form in pt2: the program has one scale before each sum, none for "
    "groups of features; use int4_token; choose another plan",
    ("onnx", "fp8_e4m3_token"): f"{FIRST} at fp8_e4m3_token has no form in onnx: its CPU provider has no products of "
    "FP8; use int8_token; choose another plan",
    ("pt2", "fp8_e4m3_token"): f"{FIRST} at fp8_e4m3_token has no form in pt2: the program rounds to no FP8; use "
    "int8_token; choose another plan",
}
