"""Scales, and the cache of candidates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import QUANTIZERS, Candidates, apply_plan, scales
from mpq.quantize.gptq import GPTQ
from mpq.quantize.rtn import RTN
from mpq.types import LayerStats, MpqError, Use, WeightSpec
from tests.quantize_cases import K, N, assert_equal, correlated_gram, intermediates, weights


def groups_of(a: np.ndarray, size: int) -> list[np.ndarray]:
    return [a[start : start + size] for start in range(0, len(a), size)]


def half(value) -> np.ndarray:
    return np.asarray(value, np.float16).astype(np.float64)


class TestScales:
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_absmax_is_the_largest_magnitude_over_the_largest_level(self, bits):
        w = weights()
        got = RTN("absmax")(jnp.asarray(w), parse_scheme(f"int{bits}_g16"))
        expected = np.stack(
            [np.abs(part).max(axis=0) / np.float32(2 ** (bits - 1) - 1) for part in groups_of(w[0], 16)]
        )
        np.testing.assert_array_equal(np.asarray(got.scale)[0], expected.astype(np.float16))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_affine_absmax_spans_the_range_with_zero_in_it(self, bits):
        w = weights()
        w[0, :, 0], w[0, :, 1] = np.abs(w[0, :, 0]) + 1, -np.abs(w[0, :, 1]) - 1  # zero at an end of the range
        got = RTN("absmax")(jnp.asarray(w), parse_scheme(f"int{bits}_g16_zp"))
        low = np.stack([np.minimum(part.min(axis=0), 0) for part in groups_of(w[0], 16)]).astype(np.float64)
        high = np.stack([np.maximum(part.max(axis=0), 0) for part in groups_of(w[0], 16)]).astype(np.float64)
        scale, zero = np.asarray(got.scale, np.float64)[0], np.asarray(got.zero_point)[0]
        # One rounding to float16 (2^-11) and a few to float32, of which the last can move the float16 by one more.
        np.testing.assert_allclose(scale, (high - low) / (2**bits - 1), rtol=2.0**-11 * 1.001)
        np.testing.assert_array_equal(
            zero, np.clip(np.round(-(2 ** (bits - 1)) - low / scale), -(2 ** (bits - 1)), 127)
        )
        assert (zero[:, 0] == -(2 ** (bits - 1))).all()
        assert (zero[:, 1] == 2 ** (bits - 1) - 1).all()

    @pytest.mark.parametrize("text", ["int2_g16", "int4_g16", "nf4_g16", "int3_g16_zp"])
    @pytest.mark.parametrize("weighted", [True, False])
    def test_mse_finds_the_best_of_its_candidates(self, text, weighted):
        """Brute force in float64: every candidate, rounded to float16, scored on the dequantized weights."""
        scheme, w = parse_scheme(text), weights()
        gram = correlated_gram() if weighted else None
        row = np.ones(K) if gram is None else np.asarray(scales.row_weight(jnp.asarray(gram[0].diagonal())), np.float64)
        got = np.asarray(RTN("mse")(jnp.asarray(w), scheme, gram).dequantize(), np.float64)[0]
        grid = scheme.format
        levels = np.asarray(grid.decode(jnp.arange(grid.min_qvalue, grid.max_qvalue + 1, dtype=jnp.int8)), np.float64)
        for start in range(0, K, 16):
            part, h = w[0, start : start + 16].astype(np.float64), row[start : start + 16, None]
            best = np.full(N, np.inf)
            for candidate in np.asarray(scales._candidates(scheme), np.float64):
                if scheme.zero_point:
                    low, high = (
                        np.minimum(part.min(axis=0), 0) * candidate[0],
                        np.maximum(part.max(axis=0), 0) * candidate[1],
                    )
                    scale = half((high - low) / 7)
                    reached = (levels[:, None] - np.clip(np.round(-4 - low / scale), -4, 3)) * scale
                else:
                    reached = levels[:, None] * half(np.abs(part).max(axis=0) / grid.max_magnitude * candidate)
                nearest = np.abs(part[:, None] - reached[None]).min(axis=1)
                best = np.minimum(best, (h * nearest**2).sum(axis=0))
            error = (h * (part - got[start : start + 16]) ** 2).sum(axis=0)
            # A float16 scale or a zero point may round the other way in float32; two such candidates hardly differ.
            np.testing.assert_allclose(error, best, rtol=2e-3)

    def test_mse_uses_the_extra_negative_code_for_the_longer_tail(self):
        w = np.zeros((1, 16, 2), np.float32)
        w[0, :8, 0] = np.arange(1, 9) / 8  # int4 holds -8..7: eight positive steps need a negative scale
        w[0, :8, 1] = -np.arange(1, 9) / 8
        got = RTN("mse")(jnp.asarray(w), parse_scheme("int4_g16"))
        plain = RTN("absmax")(jnp.asarray(w), parse_scheme("int4_g16"))
        assert got.scale[0, 0, 0] < 0 < got.scale[0, 0, 1]
        error = lambda q: ((np.asarray(q.dequantize()) - w) ** 2).sum(axis=1)[0]
        assert (error(got) < error(plain)).all()

    @pytest.mark.parametrize(
        "text", ["int2_g16", "int3_g16", "int4_g16", "int8_g16", "int2_g16_zp", "int4_g16_zp", "nf4_g16"]
    )
    def test_mse_is_never_worse_than_absmax(self, text):
        w, scheme = weights(1), parse_scheme(text)
        error = lambda method: (
            (np.asarray(RTN(method)(jnp.asarray(w), scheme).dequantize(), np.float64) - w) ** 2
        ).sum(axis=1)
        # Chosen per group by float32 sums of 16 squares, each of relative error below 20 eps.
        assert (error("mse") <= error("absmax") * (1 + 40 * np.finfo(np.float32).eps)).all()

    @pytest.mark.parametrize(
        ("value", "expected"), [(1e9, 65504.0), (1e-20, 2.0**-24), (-1e9, -65504.0), (-1e-20, -(2.0**-24))]
    )
    def test_half_precision_scales_are_clamped_to_what_it_holds(self, value, expected):
        assert scales.round_scale(jnp.float32(value), "float16") == expected

    def test_half_precision_scales_keep_subnormals_and_are_exact_in_half_precision(self):
        values = np.geomspace(1e-7, 6e4, 500).astype(np.float32)
        np.testing.assert_array_equal(scales.round_scale(jnp.asarray(values), "float16"), values.astype(np.float16))

    @pytest.mark.parametrize(
        ("value", "expected"), [(0.0, np.finfo(np.float32).tiny), (np.inf, np.finfo(np.float32).max)]
    )
    def test_single_precision_scales_are_clamped_to_what_it_holds(self, value, expected):
        assert scales.round_scale(jnp.float32(value), "float32") == expected

    def test_weights_beyond_the_range_of_the_scale_saturate(self):
        got = RTN()(jnp.full((1, 16, 1), 1e7), parse_scheme("int4_g16"))
        assert (got.dequantize() == 7 * 65504.0).all()

    def test_rows_that_count_more_are_fitted_better(self):
        w = weights(2, 16, 64)
        diagonal = np.where(np.arange(16) < 2, 100.0, 0.01).astype(np.float32)
        scheme = parse_scheme("int2_channel")
        error = lambda gram: ((np.asarray(RTN("mse")(jnp.asarray(w), scheme, gram).dequantize()) - w)[0, :2] ** 2).sum()
        assert error(jnp.diag(diagonal)[None]) < error(None)

    def test_row_weights_are_one_percent_of_the_mean_where_nothing_was_seen(self):
        np.testing.assert_allclose(scales.row_weight(jnp.array([0.0, 2.0])), [0.01, 2.01], rtol=1e-6)
        np.testing.assert_array_equal(scales.row_weight(jnp.zeros(3)), np.ones(3))

    @pytest.mark.parametrize("text", ["int4_g16", "int4_g16_zp", "nf4_g16"])
    def test_rows_that_fill_up_the_last_group_have_no_influence(self, text):
        scheme, w = parse_scheme(text), weights(3, 23)
        part, alone = (RTN("mse")(jnp.asarray(a), scheme) for a in (w, w[:, 16:]))
        np.testing.assert_array_equal(part.scale[:, 1:], alone.scale)
        if scheme.zero_point:
            np.testing.assert_array_equal(part.zero_point[:, 1:], alone.zero_point)
        np.testing.assert_array_equal(part.qvalue[:, 16:], alone.qvalue)

    @pytest.mark.parametrize(
        "text", ["int4_g64", "int4_g64_zp", "nf4_g64", "int8_channel", "fp4_g64_sfp8", "int4_tensor"]
    )
    def test_the_search_of_a_large_weight_takes_memory_of_a_few_copies(self, text):
        shape = (1, 2048, 1024)
        quantize = lambda w: scales.quantize(w, parse_scheme(text), "mse", jnp.ones(shape[:2]))
        largest = max(
            a.size for a in intermediates(jax.make_jaxpr(quantize)(jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr)
        )
        assert largest <= shape[1] * shape[2]


SPEC = WeightSpec("a", "a", (), (N, K), (1, 0), 1, K, N, "a", (Use("matmul", "x", K * N),))
SLICE = WeightSpec("stack[1]", "stack", (1,), (K, N), (0, 1), 1, K, N, "b", (Use("matmul", "x", K * N),))


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16).astype(jnp.float32)
    return {"a": draw(N, K), "stack": draw(2, K, N), "norm": draw(K)}


def stats(gram=None) -> LayerStats:
    return LayerStats(correlated_gram() if gram is None else gram, np.ones((1, K), np.float32), 300)


class CountingRtn:
    """RTN that counts its calls and remembers whether it saw a gram."""

    name = "counting"

    def __init__(self):
        self.calls = []

    def __call__(self, w, scheme, gram=None):
        self.calls.append((w.shape, str(scheme), gram is not None))
        return RTN()(w, scheme, gram)


class TestCandidates:
    @pytest.mark.parametrize("name", QUANTIZERS)
    def test_every_pair_is_the_quantizer_s_own_result(self, params, name):
        candidates = Candidates(params, [SPEC, SLICE], QUANTIZERS[name], {"a": stats()})
        assert candidates.quantizer is QUANTIZERS[name]
        for spec in (SPEC, SLICE):
            gram = jnp.asarray(correlated_gram()) if spec is SPEC else None
            w, scheme = spec.to_matrix(params[spec.param]), parse_scheme("int3_g16")
            expected = QUANTIZERS[name](w, scheme, gram)
            assert_equal(candidates.qtensor(spec, scheme), expected)
            np.testing.assert_array_equal(candidates.dequantized(spec, scheme), expected.dequantize())
            error = (np.asarray(expected.dequantize(), np.float64) - np.asarray(w, np.float64)) ** 2
            assert candidates.squared_error(spec, scheme) == pytest.approx(error.sum(), rel=1e-12)  # float64 sums

    def test_each_pair_is_computed_once(self, params):
        quantizer = CountingRtn()
        candidates = Candidates(params, [SPEC, SLICE], quantizer, {"a": stats()})
        assert not quantizer.calls
        for _ in range(3):
            candidates.qtensor(SPEC, parse_scheme("int4_g16"))
            candidates.dequantized(SPEC, parse_scheme("int4_g16"))
            candidates.squared_error(SLICE, parse_scheme("int2_g16"))
        assert quantizer.calls == [((1, K, N), "int4_g16", True), ((1, K, N), "int2_g16", False)]

    def test_a_result_does_not_depend_on_what_else_was_asked_for(self, params):
        alone = Candidates(params, [SPEC, SLICE], GPTQ(), {"a": stats()}).qtensor(SPEC, parse_scheme("int3_g16"))
        candidates = Candidates(params, [SLICE, SPEC], GPTQ(), {"a": stats(), SLICE.path: stats()})
        candidates.qtensor(SLICE, parse_scheme("int3_g16"))
        assert_equal(candidates.qtensor(SPEC, parse_scheme("int3_g16")), alone)

    def test_values_stored_in_bfloat16_are_exact_under_bf16(self, params):
        candidates = Candidates(params, [SPEC], GPTQ(), {"a": stats()})
        assert candidates.squared_error(SPEC, parse_scheme("bf16")) == 0
        np.testing.assert_array_equal(candidates.dequantized(SPEC, parse_scheme("bf16")), SPEC.to_matrix(params["a"]))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_weight_that_is_not_finite_is_named(self, params, bad):
        params["stack"] = params["stack"].at[1, 2, 3].set(bad)
        candidates = Candidates(params, [SPEC, SLICE], RTN())
        candidates.qtensor(SPEC, parse_scheme("int4_g16"))
        with pytest.raises(MpqError, match=r"weight stack\[1\] holds NaN or infinity"):
            candidates.qtensor(SLICE, parse_scheme("int4_g16"))

    def test_a_gram_that_is_not_finite_is_named(self, params):
        gram = correlated_gram()
        gram[0, 0, 0] = np.inf
        with pytest.raises(MpqError, match="the gram of weight a holds NaN or infinity"):
            Candidates(params, [SPEC], RTN(), {"a": stats(gram)}).qtensor(SPEC, parse_scheme("int4_g16"))

    def test_a_gram_of_another_shape_is_named(self, params):
        with pytest.raises(MpqError, match=r"the gram of weight a is \[1, 8, 8\], not \[1, 40, 40\]"):
            Candidates(params, [SPEC], RTN(), {"a": stats(correlated_gram(0, 8))}).qtensor(
                SPEC, parse_scheme("int4_g16")
            )

    def test_a_weight_of_another_model_is_refused(self, params):
        candidates = Candidates(params, [SPEC], RTN())
        for other in (SLICE, dataclasses.replace(SPEC, group="elsewhere")):
            with pytest.raises(MpqError, match="is not one of the 1 of this model"):
                candidates.qtensor(other, parse_scheme("int4_g16"))


class TestApplyPlan:
    def test_quantized_weights_take_their_place_and_nothing_else_changes(self, params):
        quantize = lambda spec, text: RTN()(spec.to_matrix(params[spec.param]), parse_scheme(text))
        qtensors = {"a": quantize(SPEC, "int4_g16"), "stack[1]": quantize(SLICE, "int8_channel")}
        before = jax.tree.map(np.asarray, params)
        got = apply_plan(params, [SPEC, SLICE], qtensors)
        np.testing.assert_array_equal(got["a"], np.asarray(qtensors["a"].dequantize())[0].T)
        np.testing.assert_array_equal(got["stack"][1], qtensors["stack[1]"].dequantize()[0])
        np.testing.assert_array_equal(got["stack"][0], before["stack"][0])
        assert got["norm"] is params["norm"]
        for name, value in before.items():
            np.testing.assert_array_equal(params[name], value)

    def test_an_unknown_weight_is_refused(self, params):
        with pytest.raises(MpqError, match=r"quantized weight stack\[1\] is not one of the 1 of this model"):
            apply_plan(params, [SPEC], {"stack[1]": RTN()(SLICE.to_matrix(params["stack"]), parse_scheme("int4_g16"))})
