"""Scales, GPTQ against an independent oracle, and the cache of candidates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import QUANTIZERS, Candidates, apply_plan, gptq, scales
from mpq.quantize.gptq import GPTQ
from mpq.quantize.rtn import RTN
from mpq.types import LayerStats, MpqError, QTensor, Use, WeightSpec

K, N = 40, 6


def weights(seed: int = 0, k: int = K, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, k, n)).astype(np.float32)


def correlated_gram(seed: int = 0, k: int = K) -> np.ndarray:
    """Inputs of unequal size that are strongly correlated."""
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((300, k))
        @ (0.3 * rng.standard_normal((k, k)) + np.eye(k))
        * np.exp(0.5 * rng.standard_normal(k))
    )
    return (x.T @ x / 300)[None].astype(np.float32)


def layer_loss(w, qtensor, gram) -> np.ndarray:
    """`float64[n]`."""
    error = np.asarray(w, np.float64)[0] - np.asarray(qtensor.dequantize(), np.float64)[0]
    return np.einsum("kn,kl,ln->n", error, np.asarray(gram, np.float64)[0], error)


def assert_equal(a: QTensor, b: QTensor) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


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
            a.size for a in _intermediates(jax.make_jaxpr(quantize)(jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr)
        )
        assert largest <= shape[1] * shape[2]


def _intermediates(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _intermediates(inner)


def count_equations(jaxpr) -> int:
    """All equations, those of loop bodies included."""
    return sum(1 for _ in _intermediates(jaxpr))


def obq(w, gram, scheme, order=None, damping=0.01):
    """GPTQ as in the paper, in float64: explicit inverse, one elimination after each row, one column of `w` at a time.

    absmax scales, chosen at the start of a group from the updated weights (with `order`: from the original ones).

    Returns:
      codes `[k, n]`, what they stand for, and per column the smallest distance of any rounded value to a tie, in steps.
    """
    k, n = w.shape
    grid = scheme.format
    codes, values, margin = np.zeros((k, n), int), np.zeros((k, n)), np.full(n, np.inf)
    levels = np.asarray(grid.decode(jnp.arange(grid.min_qvalue, grid.max_qvalue + 1, dtype=jnp.int8)), np.float64)
    size = scheme.group_size or k
    damped = gram.astype(np.float64) + damping * np.mean(np.diag(gram)) * np.eye(k)
    for column in range(n):
        inverse, current = np.linalg.inv(damped), w[:, column].astype(np.float64)
        fits = {}
        for row in range(k) if order is None else order:
            start = row // size * size
            if start not in fits:
                part = (w[:, column].astype(np.float64) if order is not None else current)[start : start + size]
                if scheme.zero_point:
                    low, high = min(part.min(), 0), max(part.max(), 0)
                    scale = (high - low) / (len(levels) - 1)
                    exact = levels[0] - low / scale
                    margin[column] = min(margin[column], abs(abs(exact - np.round(exact)) - 0.5))
                    fits[start] = scale, np.round(exact)
                else:
                    fits[start] = np.abs(part).max() / grid.max_magnitude, 0.0
            scale, zero = fits[start]
            distance = np.abs(current[row] / scale + zero - levels)
            nearest, second = np.sort(distance)[:2]
            margin[column] = min(margin[column], second - nearest)
            best = np.argmin(distance)
            codes[row, column] = best + grid.min_qvalue
            values[row, column] = (levels[best] - zero) * scale
            error = (current[row] - values[row, column]) / inverse[row, row]
            current = current - error * inverse[:, row]
            inverse = inverse - np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
            inverse[row, row] = 1.0  # eliminated: never read again, kept off zero
    return codes, values, margin


def every(function, *arguments):
    """Number of equations that `function` traces to."""
    return count_equations(jax.make_jaxpr(function)(*arguments).jaxpr)


class TestGptq:
    @pytest.mark.parametrize("text", ["int3_g16", "int4_channel", "int3_g16_zp", "nf4_g16", "fp4_g16"])
    @pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
    def test_codes_are_those_of_the_paper_s_algorithm(self, text, act_order):
        """Columns with a near tie are left out: there, rounding of the arithmetic decides."""
        scheme, damping = parse_scheme(f"{text}_sfloat32"), 0.1
        w, gram = weights(4, K, 24), correlated_gram(4)
        order = np.argsort(-gram[0].diagonal(), kind="stable") if act_order else None
        codes, values, margin = obq(w[0], gram[0], scheme, order, damping)
        nearest, nearest_values, nearest_margin = obq(w[0], np.eye(K), scheme)
        loss = lambda q: np.einsum("kn,kl,ln->n", w[0] - q, gram[0].astype(np.float64), w[0] - q)
        ratio = loss(values) / loss(nearest_values)
        options = GPTQ(scale="absmax", act_order=act_order, damping=damping)
        got = options(jnp.asarray(w), scheme, jnp.asarray(gram))
        # The factor of a gram of condition c, and with it a target, is off by about k * eps / 2 * c of its size: at
        # most of the largest level. A margin is the difference of two distances. Losses are sums of k * k such terms.
        condition = np.linalg.cond(gram[0] + damping * gram[0].diagonal().mean() * np.eye(K))
        off = K * np.finfo(np.float32).eps / 2 * condition
        assert off < 1e-3
        largest = scheme.format.max_magnitude + scheme.format.uniform  # integers reach one further below zero
        clear = np.minimum(margin, nearest_margin) > 2 * off * largest
        clear &= np.abs(ratio - 1) > off
        assert clear.mean() > 0.4
        assert (ratio < 1).mean() > 0.7
        expected = np.where(ratio < 1, codes, nearest)
        np.testing.assert_array_equal(np.asarray(got.qvalue)[0][:, clear], expected[:, clear])

    @pytest.mark.parametrize(
        ("text", "act_order", "block_sizes"),
        [
            ("int3_g16", False, (1, 7)),
            ("int2_g24_zp", False, (7,)),
            ("int4_channel", True, (7,)),
            ("fp4_g16_sfp8", False, (7,)),
        ],
    )
    def test_the_block_size_changes_nothing(self, text, act_order, block_sizes):
        """Blocks only change the order of float32 sums, by some 40 eps of a step: codes flip in one of 1e5 weights."""
        w, gram, scheme = jnp.asarray(weights(5)), jnp.asarray(correlated_gram(5)), parse_scheme(text)
        expected = GPTQ(act_order=act_order)(w, scheme, gram)
        for block_size in block_sizes:  # 7 divides no group: every group ends in a block that is not full
            got = GPTQ(block_size=block_size, act_order=act_order)(w, scheme, gram)
            np.testing.assert_array_equal(got.qvalue, expected.qvalue)
            np.testing.assert_array_equal(got.scale, expected.scale)

    @pytest.mark.parametrize("text", ["int3_g16", "fp4_g16_sfp8", "int3_tensor_zp"])
    def test_columns_computed_at_once_change_nothing(self, text):
        w, gram, scheme = jnp.asarray(weights(6, K, 21)), jnp.asarray(correlated_gram(6)), parse_scheme(text)
        expected = GPTQ()(w, scheme, gram)
        assert_equal(GPTQ(columns=4)(w, scheme, gram), expected)

    @pytest.mark.parametrize("text", ["fp4_g16_sfp8", "int4_tensor"])
    def test_what_a_matrix_shares_is_that_of_rounding_to_nearest_in_any_order_of_rows(self, text):
        w, gram, scheme = jnp.asarray(weights(12)), jnp.asarray(correlated_gram(12)), parse_scheme(text)
        nearest = RTN("mse")(w, scheme, gram)
        for act_order in (False, True):
            got = GPTQ(act_order=act_order)(w, scheme, gram)
            np.testing.assert_array_equal(got.tensor_scale, nearest.tensor_scale)
            if scheme.per_tensor or act_order:
                np.testing.assert_array_equal(got.scale, nearest.scale)
            assert layer_loss(w, got, gram).sum() < 0.9 * layer_loss(w, nearest, gram).sum()

    @pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
    def test_every_column_is_at_least_as_good_as_rounding_to_nearest_and_most_are_better(self, act_order):
        for seed in range(4):
            w, gram, scheme = weights(seed, K, 32), correlated_gram(seed), parse_scheme("int2_g16")
            got = layer_loss(w, GPTQ(act_order=act_order)(jnp.asarray(w), scheme, jnp.asarray(gram)), gram)
            nearest = layer_loss(w, RTN("mse")(jnp.asarray(w), scheme, jnp.asarray(gram)), gram)
            # The float32 choice between two sums of k * k terms, each within 2 k eps of its size.
            assert (got <= nearest * (1 + 4 * K * np.finfo(np.float32).eps)).all()
            assert (got < 0.9 * nearest).mean() > 0.5

    def test_inputs_that_were_never_seen_are_rounded_to_nearest(self):
        w, gram, scheme = weights(7), correlated_gram(7), parse_scheme("int4_channel")
        dead = np.arange(0, K, 5)
        gram[:, dead], gram[:, :, dead] = 0, 0
        got = GPTQ(scale="absmax")(jnp.asarray(w), scheme, jnp.asarray(gram))
        nearest = RTN("absmax")(jnp.asarray(w), scheme)
        np.testing.assert_array_equal(got.scale, nearest.scale)
        np.testing.assert_array_equal(got.qvalue[:, dead], nearest.qvalue[:, dead])
        assert (got.qvalue != nearest.qvalue).any()

    @pytest.mark.parametrize("damping", [0.0, 0.01])
    def test_a_gram_without_full_rank_is_damped_until_it_can_be_factored(self, damping):
        w, scheme = jnp.asarray(weights(8)), parse_scheme("int3_g16")
        x = np.random.default_rng(8).standard_normal((3, K)).astype(np.float32)
        gram = jnp.asarray((x.T @ x)[None])
        got = GPTQ(damping=damping)(w, scheme, gram)
        assert np.isfinite(np.asarray(got.dequantize())).all()
        assert layer_loss(w, got, gram).sum() < 0.5 * layer_loss(w, RTN("mse")(w, scheme, gram), gram).sum()

    def test_a_gram_of_zeros_gives_rounding_to_nearest(self):
        w, scheme = jnp.asarray(weights(9)), parse_scheme("int3_g16")
        assert_equal(GPTQ()(w, scheme, jnp.zeros((1, K, K))), RTN("mse")(w, scheme))

    def test_a_gram_that_no_damping_mends_gives_rounding_to_nearest(self):
        w, scheme = jnp.asarray(weights(10)), parse_scheme("int3_g16")
        gram = correlated_gram(10)
        gram[0, 3, 4] = gram[0, 4, 3] = np.nan
        assert_equal(GPTQ()(w, scheme, jnp.asarray(gram)), RTN("mse")(w, scheme, jnp.asarray(gram)))

    def test_without_a_gram_it_is_rounding_to_nearest_with_the_same_scales(self):
        w = jnp.asarray(weights(11))
        for scale in scales.METHODS:
            assert_equal(GPTQ(scale=scale)(w, parse_scheme("int3_g16")), RTN(scale)(w, parse_scheme("int3_g16")))

    def test_weights_of_equal_k_share_one_compilation_whatever_their_n(self):
        quantizer, scheme, gram = GPTQ(columns=8), parse_scheme("int3_g8"), jnp.eye(24)[None]
        quantizer(jnp.ones((1, 24, 8)), scheme, gram)
        before = gptq._quantize._cache_size(), gptq._factor._cache_size()
        for n in (1, 5, 8, 9, 31):
            quantizer(jnp.asarray(weights(n, 24, n)), scheme, 2 * gram)
        assert (gptq._quantize._cache_size(), gptq._factor._cache_size()) == before

    @pytest.mark.parametrize("text", ["int4_g16", "int4_channel", "nf4_g16", "int2_g16_zp", "nvfp4", "int4_tensor"])
    @pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
    def test_what_is_compiled_does_not_grow_with_k(self, text, act_order):
        scheme = parse_scheme(text)

        def size(k: int) -> int:
            shapes = [jax.ShapeDtypeStruct((1, k, n), jnp.float32) for n in (8, k)]
            return every(lambda w, gram: GPTQ(columns=8, act_order=act_order)(w, scheme, gram), *shapes)

        assert size(256) == size(1024)  # both beyond one block, which needs a loop less

    @pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
    def test_a_damping_that_is_none_is_refused(self, damping):
        with pytest.raises(MpqError, match="it must be a finite fraction of at least 0"):
            GPTQ(damping=damping)

    @pytest.mark.parametrize("wrong", [{"block_size": 0}, {"columns": 0}])
    def test_empty_blocks_are_refused(self, wrong):
        with pytest.raises(MpqError, match="must be at least 1"):
            GPTQ(**wrong)

    @pytest.mark.parametrize("quantizer", [RTN, GPTQ])
    def test_an_unknown_way_to_choose_scales_is_refused(self, quantizer):
        with pytest.raises(MpqError, match="unknown scale method 'median': allowed is absmax or mse"):
            quantizer(scale="median")


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
