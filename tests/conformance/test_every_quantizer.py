"""Laws of every rounding algorithm: registering one is enough to have it tested."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.export.packing import pack
from mpq.formats import parse_scheme
from mpq.quantize import QUANTIZERS
from mpq.quantize.rtn import RTN
from mpq.types import QTensor, Scheme
from tests.quantize_cases import assert_equal

BATCH, K, N = 2, 40, 6
# k is no multiple of 16 or 24: the last group is shorter. One shape throughout, so each pair is compiled once.
TEXTS = ("int2_g16", "int3_g24_zp", "int4_channel", "nf4_g16", "fp8_e4m3_channel", "bf16")
TEXTS += ("fp4_g16_sfp8", "fp4_g32_se8m0", "int3_tensor_zp")  # NVFP4, MXFP4, and one scale for all
TEXTS += ("lut2_g16",)
SCHEMES = {text: parse_scheme(text) for text in TEXTS}
# What compiles long is asked for few, those that it treats differently.
FEW = dict.fromkeys(("best", "gptq_act_order"), ("int2_g16", "fp4_g16_sfp8", "int3_tensor_zp"))
FEW["adaround"] = FEW["signround"] = (
    "int2_g16",
    "int3_g24_zp",
    "nf4_g16",
    "fp4_g16_sfp8",
    "int3_tensor_zp",
    "lut2_g16",
)
PAIRS = [(q, s) for q in QUANTIZERS for s in FEW.get(q, SCHEMES)]
GRAMS = pytest.mark.parametrize("with_gram", [True, False], ids=["gram", "no gram"])
# What fits scales of its own: a diagonal gram does not make it RTN.
OWN_SCALES = {"hqq", "signround", "best"}
EVERY = pytest.mark.parametrize(("quantizer", "text"), PAIRS, ids=[f"{q}-{s}" for q, s in PAIRS])


@functools.cache
def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random weights, and a gram of strongly correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((BATCH, K, N)).astype(np.float32)
    mix = rng.standard_normal((BATCH, K, K)) * 0.3 + np.eye(K)
    x = rng.standard_normal((BATCH, 200, K)) @ mix * np.exp(0.5 * rng.standard_normal(K))
    return w, (np.swapaxes(x, 1, 2) @ x / 200).astype(np.float32)


def run(quantizer: str, text: str, w: np.ndarray, gram: np.ndarray | None) -> QTensor:
    return QUANTIZERS[quantizer](jnp.asarray(w), SCHEMES[text], None if gram is None else jnp.asarray(gram))


def layer_loss(w: np.ndarray, qtensor: QTensor, gram: np.ndarray) -> np.ndarray:
    """`float64[batch, n]`: eT gram e."""
    error = w.astype(np.float64) - np.asarray(qtensor.dequantize(), np.float64)
    return np.einsum("bkn,bkl,bln->bn", error, gram.astype(np.float64), error)


def representable(scheme: Scheme, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Weights that the scheme holds exactly, with codes at both ends of every group, and those codes."""
    rng = np.random.default_rng(seed)
    grid = scheme.format
    if not scheme.has_scale:
        values = grid.encode(jnp.asarray(rng.standard_normal((BATCH, K, N)), jnp.float32))
        return np.asarray(grid.decode(values)), np.asarray(values)
    lowest = grid.min_qvalue if scheme.zero_point or not grid.uniform else -grid.max_qvalue
    codes = rng.integers(lowest, grid.max_qvalue + 1, (BATCH, K, N)).astype(np.int8)
    size = scheme.group_size or K
    codes[:, ::size], codes[:, 1::size] = lowest, grid.max_qvalue
    shape = (BATCH, *scheme.scale_shape(K, N))
    scale, tensor_scale = jnp.asarray(rng.uniform(0.01, 0.02, shape), scheme.scale_dtype), None
    if scheme.has_tensor_scale:  # every matrix has a group at the largest scale
        scale = jnp.asarray(rng.uniform(2, 448, shape), scheme.scale_dtype).at[:, 0, 0].set(448)
        tensor_scale = jnp.full((BATCH, 1, 1), 1.25e-4).astype(jnp.bfloat16).astype(jnp.float32)
    zero = (
        jnp.asarray(rng.integers(grid.min_qvalue, grid.max_qvalue + 1, shape), jnp.int8) if scheme.zero_point else None
    )
    levels = None
    if scheme.has_codebook:
        inner = np.linspace(-0.4, 0.8, grid.max_qvalue)[:, None] + rng.uniform(-0.1, 0.1, (BATCH, grid.max_qvalue, 1))
        levels = jnp.asarray(np.pad(inner, ((0, 0), (1, 0), (0, 0)), constant_values=-1), jnp.float16)
    qtensor = QTensor(jnp.asarray(codes), scale, zero, scheme, tensor_scale, codebook=levels)
    return np.asarray(qtensor.dequantize()), codes


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_table_s_key_is_the_quantizer_s_name(name):
    assert QUANTIZERS[name].name == name
    assert hash(QUANTIZERS[name]) is not None


@EVERY
class TestEveryQuantizer:
    @GRAMS
    def test_shapes_dtypes_and_ranges(self, quantizer, text, with_gram):
        w, gram = problem()
        scheme, got = SCHEMES[text], run(quantizer, text, w, gram if with_gram else None)
        assert got.scheme == scheme
        assert got.qvalue.shape == w.shape
        assert np.isfinite(np.asarray(got.dequantize())).all()
        assert (got.scale is None) == (not scheme.has_scale)
        assert (got.zero_point is None) == (not scheme.zero_point)
        assert (got.tensor_scale is None) == (not scheme.has_tensor_scale)
        assert (got.codebook is None) == (not scheme.has_codebook)
        if got.tensor_scale is not None:
            assert (got.tensor_scale.shape, got.tensor_scale.dtype) == ((BATCH, 1, 1), jnp.float32)
            assert (got.tensor_scale > 0).all()
        groups = (BATCH, *scheme.scale_shape(K, N))
        codes = [got.qvalue, got.zero_point] if scheme.zero_point else [got.qvalue]
        if scheme.has_scale:
            assert got.scale.shape == groups
            assert got.scale.dtype == scheme.scale_dtype
            assert (np.asarray(got.effective_scale) != 0).all()
            if scheme.zero_point:
                assert got.zero_point.shape == groups
            for code in codes:
                assert code.dtype == jnp.int8
                assert code.min() >= scheme.format.min_qvalue
                assert code.max() <= scheme.format.max_qvalue

    @GRAMS
    def test_scaling_by_a_power_of_two_scales_only_the_scale(self, quantizer, text, with_gram):
        w, gram = problem()
        gram = gram if with_gram else None
        got, scaled = run(quantizer, text, w, gram), run(quantizer, text, 8 * w, gram)
        if not SCHEMES[text].has_scale:
            np.testing.assert_array_equal(scaled.qvalue, 8 * got.qvalue)
            return
        np.testing.assert_array_equal(scaled.qvalue, got.qvalue)
        np.testing.assert_array_equal(scaled.effective_scale, 8 * got.effective_scale)

    def test_scaling_the_gram_changes_nothing(self, quantizer, text):
        w, gram = problem()
        assert_equal(run(quantizer, text, w, gram), run(quantizer, text, w, 1024 * gram))

    @GRAMS
    def test_permuting_the_output_columns_permutes_the_result(self, quantizer, text, with_gram):
        w, gram = problem()
        gram, order = gram if with_gram else None, np.random.default_rng(2).permutation(N)
        got = run(quantizer, text, w, gram)
        permuted = jax.tree.map(lambda a: a[..., order] if a.shape[-1] == N else a, got)
        assert_equal(run(quantizer, text, w[..., order], gram), permuted)

    @GRAMS
    def test_batch_entries_are_independent(self, quantizer, text, with_gram):
        w, gram = problem()
        got = run(quantizer, text, w, gram if with_gram else None)
        swapped = run(quantizer, text, w[::-1], gram[::-1] if with_gram else None)
        assert_equal(jax.tree.map(lambda a: a[::-1], swapped), got)

    @GRAMS
    def test_representable_weights_are_kept_exactly(self, quantizer, text, with_gram):
        w, codes = representable(SCHEMES[text])
        got = run(quantizer, text, w, problem()[1] if with_gram else None)
        np.testing.assert_array_equal(got.dequantize(), w)
        np.testing.assert_array_equal(got.qvalue, codes)

    @GRAMS
    def test_zeros_stay_zeros(self, quantizer, text, with_gram):
        w, gram = problem()
        w = w.copy()
        w[0], w[1, :, 2] = 0, 0
        got = np.asarray(run(quantizer, text, w, gram if with_gram else None).dequantize())
        assert (got[0] == 0).all()
        # Learned levels need not have a 0: under the smallest float16 scale, no more than that is left.
        assert (np.abs(got[1, :, 2]) <= (2.0**-24 if SCHEMES[text].has_codebook else 0)).all()

    @GRAMS
    @pytest.mark.parametrize("size", [1e-30, 1e-7, 1e6, 1e30])
    def test_any_magnitude_stays_finite(self, quantizer, text, with_gram, size):
        w, gram = problem()
        w = (w * np.float32(size)).astype(np.float32)
        got = run(quantizer, text, w, gram if with_gram else None)
        assert np.isfinite(np.asarray(got.dequantize())).all()
        if SCHEMES[text].has_scale:
            assert np.isfinite(np.asarray(got.effective_scale)).all()
        worst = np.abs(np.asarray(got.dequantize(), np.float64) - w).max()
        assert (
            worst <= 4 * np.abs(w).max() + 128 * 2.0**-24
        )  # at most the smallest float16 scale times the largest code

    def test_stored_bytes_are_what_the_scheme_says(self, quantizer, text):
        scheme, (w, gram) = SCHEMES[text], problem()
        got = run(quantizer, text, w, gram)
        parts = {"qvalue": got.qvalue, "scale": got.scale, "zero_point": got.zero_point}
        parts |= {"tensor_scale": got.tensor_scale, "codebook": got.codebook}
        for entry in range(BATCH):
            arrays = {name: np.asarray(array[entry]) for name, array in parts.items() if array is not None}
            packed = {
                name: pack(a, scheme.format.bits, scheme.format.min_qvalue) if a.dtype == np.int8 else a
                for name, a in arrays.items()
            }
            assert {name: 8 * a.nbytes for name, a in packed.items()} == scheme.part_bits(K, N)

    def test_the_layer_loss_is_never_above_that_of_rtn_with_the_same_scales(self, quantizer, text):
        """Of what sees no gram: the loss of inputs that are independent and of equal size."""
        method = getattr(QUANTIZERS[quantizer], "scale", "absmax")
        for seed in range(3):
            w, gram = problem(seed)
            if not QUANTIZERS[quantizer].data_aware:
                gram = np.broadcast_to(np.eye(K, dtype=np.float32), gram.shape)
            got = layer_loss(w, run(quantizer, text, w, gram), gram)
            nearest = layer_loss(w, RTN(method)(jnp.asarray(w), SCHEMES[text], jnp.asarray(gram)), gram)
            # The choice between the two is made in float32: two sums of k * k terms, each within 2 k eps of its size.
            assert (got <= nearest * (1 + 4 * K * np.finfo(np.float32).eps)).all()

    def test_a_diagonal_gram_gives_rtn_with_the_same_scales_or_better_ones(self, quantizer, text):
        w, gram = problem()
        gram = gram * np.eye(K, dtype=np.float32)
        method = getattr(QUANTIZERS[quantizer], "scale", "absmax")
        got = run(quantizer, text, w, gram)
        nearest = RTN(method)(jnp.asarray(w), SCHEMES[text], jnp.asarray(gram))
        if quantizer not in OWN_SCALES:
            assert_equal(got, nearest)
        elif QUANTIZERS[quantizer].data_aware:
            bound = layer_loss(w, nearest, gram) * (1 + 4 * K * np.finfo(np.float32).eps)
            assert (layer_loss(w, got, gram) <= bound).all()

    def test_only_what_is_aware_of_data_reads_the_gram(self, quantizer, text):
        if not QUANTIZERS[quantizer].data_aware:
            w, gram = problem()
            assert_equal(run(quantizer, text, w, gram), run(quantizer, text, w, None))


@EVERY
def test_quantizing_again_changes_nothing(quantizer, text):
    """With absmax scales, for every symmetric scheme; affine ones reach both ends only by chance, else lose a code."""
    scheme, (w, _) = SCHEMES[text], problem()
    if scheme.zero_point:
        w, _ = representable(scheme)
    once = RTN("absmax")(jnp.asarray(w), scheme, None)
    assert_equal(RTN("absmax")(once.dequantize(), scheme, None), once)
    np.testing.assert_array_equal(
        run(quantizer, text, np.asarray(once.dequantize()), None).dequantize(), once.dequantize()
    )
