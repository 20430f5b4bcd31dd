"""Blocks of ggml bit by bit: against the decoders of the `gguf` package, on every byte that a block can hold."""

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from mpq.formats import parse_scheme
from mpq.formats.ggml import GGML_SCHEMES
from mpq.gguf.layouts import LAYOUTS, pack, row_bytes, unpack
from mpq.types import MpqError, QTensor, Scheme

K, N = 512, 32
EVERY = pytest.mark.parametrize("name", GGML_SCHEMES)
HALVES = ("scale", "minimum")
# The largest and smallest finite halves of either sign, a subnormal, and zeros.
EXTREME = np.array([65504, -65504, 2**-24, -(2**-24), 2**-20, 0.0, -0.0, 1.0], np.float16)


def qtensor(parts: dict[str, np.ndarray], scheme: Scheme) -> QTensor:
    arrays = {name: jnp.asarray(array)[None] for name, array in parts.items()}
    return QTensor(**{"scale": None, "zero_point": None, **arrays}, scheme=scheme)


def random_bytes(scheme: Scheme, rng: np.random.Generator) -> np.ndarray:
    """Every byte that a block can hold; TQ2_0 has no fourth code, MXFP4 one zero, no NaN and normal numbers."""
    raw = rng.integers(0, 256, (N, row_bytes(scheme, K)), np.uint8)
    parts = unpack(raw, scheme, K)
    if str(scheme) == "tq2_0":
        parts["qvalue"] %= 3
    if str(scheme) == "mxfp4":
        parts["scale"] = (2.0 ** rng.integers(-125, 125, parts["scale"].shape)).astype(parts["scale"].dtype)
    return pack(parts, scheme)


def random_rows(scheme: Scheme, seed: int) -> np.ndarray:
    """Random bytes, with finite halves in their places, many of them extreme."""
    rng = np.random.default_rng(seed)
    parts = unpack(random_bytes(scheme, rng), scheme, K)
    for half in HALVES:
        if half in parts and parts[half].dtype == np.float16:
            drawn = rng.standard_normal(parts[half].shape).astype(np.float16)
            parts[half] = np.where(rng.random(drawn.shape) < 0.3, rng.choice(EXTREME, drawn.shape), drawn)
    return pack(parts, scheme)


@EVERY
class TestEveryType:
    def test_decodes_as_the_gguf_package_does_to_the_bit(self, name):
        scheme = GGML_SCHEMES[name]
        rows = random_rows(scheme, 0)
        want = dequantize(rows, GGMLQuantizationType[name.upper()])
        got = np.asarray(qtensor(unpack(rows, scheme, K), scheme).dequantize())[0].T
        np.testing.assert_array_equal(got, want)  # of zeros the sign may differ

    def test_every_byte_survives_the_way_to_parts_and_back(self, name):
        scheme = GGML_SCHEMES[name]
        raw = random_bytes(scheme, np.random.default_rng(1))
        parts = unpack(raw, scheme, K)
        np.testing.assert_array_equal(pack(parts, scheme), raw)
        assert parts["qvalue"].min() >= scheme.format.min_qvalue
        assert parts["qvalue"].max() <= scheme.format.max_qvalue

    def test_its_size_is_that_of_ggml(self, name):
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
        scheme = GGML_SCHEMES[name]
        assert scheme.blocks.rows == block
        assert scheme.size_bits(K, N) == 8 * size * N * (K // block)
        assert parse_scheme(name) == scheme
        assert str(scheme) == name

    def test_rows_that_do_not_fill_blocks_are_refused(self, name):
        scheme = GGML_SCHEMES[name]
        k = scheme.blocks.rows + 16
        with pytest.raises(MpqError, match=f"rows of {k}, no multiple of the {scheme.blocks.rows}"):
            unpack(np.zeros((1, 8), np.uint8), scheme, k)


def test_the_table_of_layouts_is_that_of_schemes():
    assert set(LAYOUTS) == set(GGML_SCHEMES)


@pytest.mark.parametrize(("text", "kind"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
def test_plain_floats_decode_as_the_gguf_package_does(text, kind):
    scheme = parse_scheme(text)
    values = scheme.format.encode(jnp.asarray(np.random.default_rng(2).standard_normal((K, N)), jnp.float32))
    rows = pack({"qvalue": np.asarray(values)}, scheme)
    np.testing.assert_array_equal(dequantize(rows, GGMLQuantizationType[kind]).T, np.asarray(values, np.float32))
    np.testing.assert_array_equal(unpack(rows, scheme, K)["qvalue"], values)


def test_a_scheme_of_other_tools_is_refused():
    with pytest.raises(MpqError, match="int4_g64 is no type of ggml"):
        pack({"qvalue": np.zeros((64, 1), np.int8)}, parse_scheme("int4_g64"))
