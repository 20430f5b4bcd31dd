"""Codes along a trellis: the filter against a state machine, the search against all sequences, and every stage."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.distill import latent
from mpq.export.targets import TARGETS
from mpq.formats import TRELLISES, parse_scheme
from mpq.formats.trellis import CHOICES, SPAN, STATE_BITS, levels
from mpq.packed import pack_weights
from mpq.quantize import GPTQ, HQQ, RTN
from mpq.quantize.adaround import AdaRound
from mpq.quantize.best import Best
from mpq.quantize.loss import by_span, layer_loss
from mpq.quantize.signround import SignRound
from mpq.sensitivity.errors import StoredErrors, packed
from mpq.types import MpqError, Use, WeightSpec
from tests.quantize_cases import assert_equal

LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
"""Least mean squared error of so many levels for normal values (Max 1960, "Quantizing for minimum distortion")."""

GRIDS = pytest.mark.parametrize("grid", TRELLISES.values(), ids=TRELLISES.keys())


def spec(batch: int, k: int, n: int) -> WeightSpec:
    """A weight that one matmul reads."""
    return WeightSpec("w", "w", (), (k, n), (0, 1), batch, k, n, "x", (Use("matmul", "x", k * n),))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def walked(codes: np.ndarray, bits: int) -> np.ndarray:
    """Values `[n]` of one row, state by state."""
    choice, states, table = CHOICES[bits], 2**STATE_BITS, levels(CHOICES[bits].gain)
    values, state = [], 0
    for column, code in enumerate(map(int, codes)):
        if column % SPAN == 0:
            state = 0
            for _ in range(STATE_BITS):
                state = (state << bits | choice.start) % states
        state = (state << bits | code) % states
        values.append(table[choice.multiplier * state % states])
    return np.array(values, np.float32)


@pytest.mark.parametrize("name", TRELLISES)
def test_the_table_s_key_is_the_format_s_name(name):
    assert TRELLISES[name].name == name
    assert str(parse_scheme(f"{name}_g64_sfp8")) == f"{name}_g64_sfp8"


@GRIDS
class TestEveryTrellis:
    def test_levels_ascend_are_symmetric_and_fit_half_precision(self, grid):
        table = levels(grid.choice.gain)
        assert (np.diff(table) >= 0).all()
        np.testing.assert_array_equal(table, -table[::-1])
        np.testing.assert_array_equal(table, table.astype(np.float16))
        assert table[-1] == grid.max_magnitude

    @pytest.mark.parametrize("n", [1, 7, SPAN, 2 * SPAN + 30])
    def test_decoding_walks_through_the_states(self, grid, n):
        codes = np.random.default_rng(n).integers(0, 2**grid.bits, (2, 3, n)).astype(np.int8)
        want = np.apply_along_axis(walked, -1, codes, grid.bits)
        np.testing.assert_array_equal(grid.decode(jnp.asarray(codes)), want)
        np.testing.assert_array_equal(jax.jit(grid.decode)(codes), want)

    def test_the_first_columns_do_not_need_the_others(self, grid):
        codes = np.random.default_rng(0).integers(0, 2**grid.bits, (2, SPAN + 9)).astype(np.int8)
        for n in (3, SPAN, SPAN + 4):
            np.testing.assert_array_equal(grid.decode(codes[:, :n]), grid.decode(codes)[:, :n])

    @pytest.mark.parametrize("weighted", [False, True])
    def test_no_sequence_of_codes_is_better(self, grid, weighted):
        n = {2: 4, 3: 3, 4: 2, 5: 2}[grid.bits]
        x, weight = normal(8, n, seed=1), normal(8, n, seed=2) ** 2 if weighted else np.ones((8, n), np.float32)
        every = np.array(list(itertools.product(range(2**grid.bits), repeat=n)), np.int8)
        values = np.apply_along_axis(walked, -1, every, grid.bits).astype(np.float64)
        error = (weight[:, None] * (x[:, None] - values).astype(np.float64) ** 2).sum(axis=-1)
        got = grid.encode(jnp.asarray(x), jnp.asarray(weight)) if weighted else grid.encode(jnp.asarray(x))
        reached = (weight * (x - np.asarray(grid.decode(got), np.float64)) ** 2).sum(axis=-1)
        np.testing.assert_allclose(reached, error.min(axis=-1), rtol=1e-5)

    def test_what_codes_stand_for_is_kept_exactly(self, grid):
        codes = np.random.default_rng(3).integers(0, 2**grid.bits, (3, SPAN + 50)).astype(np.int8)
        values = grid.decode(jnp.asarray(codes))
        got = grid.encode(values, jnp.asarray(np.abs(normal(3, SPAN + 50)) + 0.1))
        assert got.dtype == jnp.int8
        np.testing.assert_array_equal(grid.decode(got), values)

    def test_of_normal_values_it_leaves_less_than_any_grid_and_more_than_the_bound(self, grid):
        x = normal(64, 2 * SPAN, seed=4)
        error = float(np.mean((x - np.asarray(grid.decode(grid.encode(jnp.asarray(x))))) ** 2))
        assert 4.0**-grid.bits < error < 0.65 * LLOYD_MAX[grid.bits]

    def test_spans_do_not_depend_on_each_other(self, grid):
        x = normal(2, 2 * SPAN + 20, seed=5)
        other = x.copy()
        other[:, SPAN : 2 * SPAN] = normal(2, SPAN, seed=6)
        weight = np.exp(normal(2, 2 * SPAN + 20, seed=14))
        weights = weight, np.where((other == x).all(axis=0), weight, 100 * weight)
        first, second = (
            np.asarray(grid.encode(*map(jnp.asarray, pair))) for pair in zip((x, other), weights, strict=True)
        )
        np.testing.assert_array_equal(first[:, :SPAN], second[:, :SPAN])
        np.testing.assert_array_equal(first[:, 2 * SPAN :], second[:, 2 * SPAN :])

    def test_compiled_and_batched_it_is_the_same(self, grid):
        x = jnp.asarray(normal(2, 3, 20, seed=7))
        np.testing.assert_array_equal(jax.jit(grid.encode)(x), grid.encode(x))
        np.testing.assert_array_equal(jax.vmap(grid.encode)(x), grid.encode(x))

    @pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
    def test_far_values_take_codes_too(self, grid, value):
        assert np.isfinite(np.asarray(grid.decode(grid.encode(jnp.full((2, 5), value))))).all()


K, N = 96, SPAN + 44


def problem(seed: int = 0, batch: int = 1) -> tuple[jax.Array, jax.Array]:
    """Weights, and a gram of correlated inputs."""
    x = normal(batch, 400, K, seed=seed + 1) @ (0.2 * normal(batch, K, K, seed=seed + 2) + np.eye(K, dtype=np.float32))
    return jnp.asarray(normal(batch, K, N, seed=seed)), jnp.asarray(np.swapaxes(x, 1, 2) @ x / 400)


@pytest.mark.parametrize("text", ["tcq2_g32", "tcq3_channel", "tcq4_g40_sfp8", "tcq5_tensor"])
def test_the_scale_is_the_root_of_the_mean_square(text):
    w, scheme = problem()[0], parse_scheme(text)
    got = RTN()(w, scheme)
    size = K if scheme.group_size is None else scheme.group_size
    parts = [np.asarray(w[0, at : at + size], np.float64) for at in range(0, K, size)]
    axis = (0, 1) if scheme.per_tensor else (0,)
    want = np.stack([np.sqrt((part**2).mean(axis=axis, keepdims=True))[0] for part in parts])
    np.testing.assert_allclose(got.effective_scale[0], want, rtol=0.07 if scheme.has_tensor_scale else 1e-3)


@pytest.mark.parametrize("text", ["tcq3_channel", "tcq4_g40_sfp8"])
class TestRounding:
    def test_gptq_leaves_less_than_rtn_in_every_span(self, text):
        (w, gram), scheme = problem(3), parse_scheme(text)
        loss = lambda q: np.asarray(by_span(layer_loss(w, q, gram), SPAN), np.float64)
        nearest, got = loss(RTN("mse")(w, scheme, gram)), loss(GPTQ()(w, scheme, gram))
        assert (got <= nearest * (1 + 1e-5)).all()
        assert got.sum() < 0.8 * nearest.sum()

    def test_gptq_depends_on_no_block_and_no_tile(self, text):
        (w, gram), scheme = problem(4), parse_scheme(text)
        got = GPTQ()(w, scheme, gram)
        assert_equal(GPTQ(columns=512)(w, scheme, gram), got)
        assert_equal(GPTQ(columns=100)(w, scheme, gram), got)
        loss = [float(layer_loss(w, GPTQ(block_size=size)(w, scheme, gram), gram).sum()) for size in (8, 128)]
        assert abs(loss[0] - loss[1]) < 0.02 * loss[1]  # float32 rounding may take another path through the trellis

    def test_a_batch_is_its_entries(self, text):
        (w, gram), scheme = problem(5, batch=2), parse_scheme(text)
        both = GPTQ()(w, scheme, gram)
        for entry in range(2):
            alone = GPTQ()(w[entry : entry + 1], scheme, gram[entry : entry + 1])
            assert_equal(jax.tree.map(lambda a, at=entry: a[at : at + 1], both), alone)

    @pytest.mark.parametrize("size", [1e-30, 1e6, 1e30])
    def test_any_magnitude_stays_finite_and_zeros_nearly_zero(self, text, size):
        (w, gram), scheme = problem(6), parse_scheme(text)
        w = jnp.asarray(np.asarray(w) * np.float32(size)).at[:, :, 3].set(0.0)
        got = GPTQ()(w, scheme, gram)
        assert np.isfinite(np.asarray(got.dequantize())).all()
        if not scheme.per_tensor:  # no more is left of zeros than the outermost level under the smallest scale
            least = float(jnp.finfo(scheme.scale_dtype).smallest_subnormal)
            least *= float(got.tensor_scale.max()) if scheme.has_tensor_scale else 1.0
            assert (
                float(jnp.abs(got.dequantize()[:, :, 3]).max()) <= max(least, 2.0**-126) * scheme.format.max_magnitude
            )


def test_output_columns_far_above_others_get_more_of_the_bits():
    """The sum of squared errors is what is least: rows of unequal columns leave less of it than each column would."""
    w = normal(1, 64, SPAN, seed=8) * np.exp(normal(1, 1, SPAN, seed=9))
    got = np.asarray(RTN()(jnp.asarray(w), parse_scheme("tcq3_channel")).dequantize())
    alike = np.asarray(RTN()(jnp.asarray(w / w.std(axis=1, keepdims=True)), parse_scheme("tcq3_channel")).dequantize())
    alike = alike * w.std(axis=1, keepdims=True)
    assert ((got - w) ** 2).sum() < 0.9 * ((alike - w) ** 2).sum()


@pytest.mark.parametrize("quantizer", [HQQ(), SignRound(start=RTN("mse")), AdaRound(start=RTN("mse"))])
def test_what_learns_codes_one_by_one_keeps_those_it_starts_from(quantizer):
    (w, gram), scheme = problem(10), parse_scheme("tcq3_g32")
    start = RTN()(w, scheme) if isinstance(quantizer, HQQ) else RTN("mse")(w, scheme, gram)
    assert_equal(quantizer(w, scheme, gram), start)


def test_of_several_algorithms_a_span_takes_one():
    (w, gram), scheme = problem(11), parse_scheme("tcq3_g32")
    members = RTN("mse"), GPTQ()
    got, others = Best(members)(w, scheme, gram), [member(w, scheme, gram) for member in members]
    for at in (slice(0, SPAN), slice(SPAN, N)):
        assert any(np.array_equal(got.qvalue[..., at], q.qvalue[..., at]) for q in others)


def test_training_keeps_codes_and_learns_scales():
    (w, gram), scheme = problem(12), parse_scheme("tcq4_g32")
    qtensor = GPTQ()(w, scheme, gram)
    begin = latent.start(w, qtensor)
    assert begin.value is None
    assert begin.log_scale is not None
    assert_equal(latent.freeze(begin, qtensor), qtensor)
    moved = dataclasses.replace(begin, log_scale=begin.log_scale + 0.1)
    np.testing.assert_array_equal(latent.freeze(moved, qtensor).qvalue, qtensor.qvalue)
    error = lambda one: jnp.sum((w - latent.reconstruct(one, qtensor)) ** 2)
    assert float(jnp.abs(jax.grad(error)(begin).log_scale).max()) > 0


@pytest.mark.parametrize("text", ["tcq3_g32", "tcq4_channel_sfp8", "tcq2_tensor"])
def test_metrics_that_take_columns_get_what_all_columns_decode_to(text):
    w, one = problem(13)[0], spec(1, K, N)
    qtensors = RTN()(w, parse_scheme(text)), RTN()(w, parse_scheme("int4_g32"))
    stored = StoredErrors(w[0], tuple(map(packed, qtensors)), one, 10**6)
    chosen = jnp.asarray([N - 1, 3, SPAN + 1, 3])
    want = jnp.stack([q.dequantize() - w for q in qtensors])
    np.testing.assert_array_equal(stored.matrices(lambda a: jnp.take(a, chosen, axis=-1)), want[..., chosen])
    np.testing.assert_array_equal(stored.matrices(), want)


def test_kernels_refuse_it_by_name():
    w, _ = problem()
    one = spec(1, K, N)
    with pytest.raises(MpqError, match=r"weight .* is tcq4_g32: integers and tables of at most 16 levels"):
        pack_weights([one], {one.path: RTN()(w, parse_scheme("tcq4_g32"))})


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("orbax", "pt2")])
def test_no_runtime_is_promised_it(target):
    assert TARGETS[target].refusal(spec(1, 64, 256), parse_scheme("tcq4_g32"))
