"""GPTQ against an independent oracle, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import chain, gptq, scales
from mpq.quantize.gptq import GPTQ
from mpq.quantize.rtn import RTN
from mpq.quantize.tiles import width
from mpq.types import MpqError
from tests.quantize_cases import K, assert_equal, correlated_gram, count_equations, layer_loss, weights


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

    def test_wide_weights_are_cut_evenly_and_come_out_as_narrow_ones(self):
        widths = {1: 256, 2047: 256, 2048: 2048, 2049: 2304, 4096: 4096, 4097: 2304, 11008: 3840}
        assert {n: width(n, 256) for n in widths} == widths
        w, gram, scheme = weights(6, 16, 2050), jnp.asarray(correlated_gram(6, 16)), parse_scheme("int3_g8")
        narrow = [GPTQ()(jnp.asarray(part), scheme, gram) for part in np.split(w, 2, axis=-1)]
        joined = jax.tree.map(lambda *a: jnp.concatenate(a, axis=-1), *narrow)
        assert_equal(GPTQ()(jnp.asarray(w), scheme, gram), joined)

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
        before = gptq._quantize._cache_size(), chain.factor._cache_size()
        for n in (1, 5, 8, 9, 31):
            quantizer(jnp.asarray(weights(n, 24, n)), scheme, 2 * gram)
        assert (gptq._quantize._cache_size(), chain.factor._cache_size()) == before

    @pytest.mark.parametrize("text", ["int4_g16", "int4_channel", "nf4_g16", "int2_g16_zp", "nvfp4", "int4_tensor"])
    @pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
    def test_what_is_compiled_does_not_grow_with_k(self, text, act_order):
        scheme = parse_scheme(text)

        def size(k: int) -> int:
            shapes = [jax.ShapeDtypeStruct((1, k, n), jnp.float32) for n in (8, k)]
            return every(lambda w, gram: GPTQ(columns=8, act_order=act_order)(w, scheme, gram), *shapes)

        assert size(1024) == size(2048)  # both beyond one slab, which needs a loop less

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
