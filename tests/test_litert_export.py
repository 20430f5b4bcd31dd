"""What of LiteRT needs none of its packages: what the runtime has, what weights take there, how codes are packed."""

import sys
import types

import numpy as np
import pytest

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import ActivationSpec
from mpq.activations.scheme import fake_quantize, parse_activation_scheme
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.litert.activations import Codes, pair_refusal
from mpq.litert.graph import require_litert
from mpq.litert.versions import version_of
from mpq.litert.weights import pack, unpack
from mpq.request import Request
from mpq.types import MpqError, SensitivityTable, Use, WeightSpec

MATMUL = WeightSpec("a.kernel", "a.kernel", (), (64, 48), (0, 1), 1, 64, 48, "a", (Use("matmul", "x", 1),))
CONV = WeightSpec("c", "c", (), (3, 3, 4, 8), (0, 1, 2, 3), 1, 36, 8, "c", (Use("conv", "x", 1),))
SLICE = WeightSpec("s[0]", "s", (0,), (64, 48), (0, 1), 1, 64, 48, "s", (Use("matmul", "x", 1),))


@pytest.mark.parametrize(
    ("spec", "scheme", "reason"),
    [
        (MATMUL, "int2_g32_zp", None),
        (MATMUL, "int4_channel_sfloat32", None),
        (CONV, "int8_g12", None),
        (CONV, "int2_channel", None),
        (CONV, "bf16", None),
        (MATMUL, "int3_g32", "it takes int2, int4 and int8"),
        (MATMUL, "nf4_g32", "it takes int2, int4 and int8"),
        (MATMUL, "q8_0", "it takes int2, int4 and int8"),
        (MATMUL, "int4_g32_sfp8", "its scales are float16, bfloat16 or float32"),
        (CONV, "int4_g16", "it takes whole groups, and the weight has 36 rows"),
        (SLICE, "bf16", "it is a slice of a parameter"),
    ],
)
def test_what_litert_has(spec, scheme, reason):
    assert TARGETS["litert"].refusal(spec, parse_scheme(scheme)) == reason


@pytest.mark.parametrize(
    ("spec", "scheme", "activation", "reason"),
    [
        (MATMUL, "int8_channel", "int8_token_asym", None),
        (MATMUL, "nf4_g32", "int8_tensor_static", None),
        (CONV, "int8_channel", "int8_tensor_asym", None),
        (CONV, "int8_channel", "int8_token_asym", "as they come inputs are rounded by int8_tensor_asym there"),
        (CONV, "int2_channel", "int8_tensor_asym", "it multiplies no codes of c at int2_channel"),
        (MATMUL, "bf16", "int8_token_asym", "it multiplies no codes of a.kernel at bf16"),
    ],
)
def test_which_pairs_litert_has(spec, scheme, activation, reason):
    weight, by = parse_scheme(scheme), parse_activation_scheme(activation)
    assert pair_refusal(by, spec, weight) == reason
    assert TARGETS["litert"].pairs(spec, weight, by) == (reason is None)
    assert TARGETS["litert"].pairs(spec, weight, None)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("int4_g32", 64 * 48 * 4 + 2 * 48 * 16),  # blocks as the plan has them
        ("int8_g16_zp", 64 * 48 * 8 + 4 * 48 * 24),
        ("int8_channel", 64 * 48 * 8 + 48 * 32),  # float32 scales; zero points of 0 are those of all such weights
        ("int4_channel_zp", 64 * 48 * 4 + 48 * (32 + 64)),  # an int64 zero point each
        ("int2_tensor_zp", 64 * 48 * 2 + 32 + 64),
        ("fp16", 64 * 48 * 16),
    ],
)
def test_plans_count_what_the_file_has(scheme, bits):
    assert TARGETS["litert"].stored_bits(MATMUL, parse_scheme(scheme)) == bits


def test_a_plan_for_litert_is_solved_with_the_sizes_of_its_file():
    schemes = tuple(map(parse_scheme, ("int4_channel", "int4_g32")))
    narrow = WeightSpec("n", "n", (), (32, 64), (0, 1), 1, 32, 64, "n", (Use("matmul", "x", 1),))
    table = SensitivityTable((narrow,), schemes, np.array([[1.0, 1.0]]), np.zeros((1, 2)), *"abcd")
    for runtime, smallest in ((None, 32 * 64 * 4 + 64 * 16), ("litert", 32 * 64 * 4 + 64 * 16)):
        problem = Request(bpw=9.0, runtime=runtime).problem(table, 0)
        assert problem.min_bits == smallest
        assert problem.max_bits == (smallest if runtime is None else 32 * 64 * 4 + 64 * 32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_lie_low_bits_first(bits):
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8)
    codes = np.concatenate([codes, codes[:3]])
    stream = sum(int(c) % 2**bits << bits * i for i, c in enumerate(codes))
    data = pack(codes, bits)
    assert data == stream.to_bytes(-(-len(codes) * bits // 8), "little")
    np.testing.assert_array_equal(unpack(np.frombuffer(data, np.uint8), len(codes), bits), codes)


@pytest.mark.parametrize("scheme", ["int8_tensor_static", "int8_tensor_static_asym"])
def test_codes_of_a_static_range_are_those_of_the_plan(scheme):
    row = ActivationSpec("a", "activation", "x", ("w",), 1, 64, 0)
    one = RoundedActivation(row, parse_activation_scheme(scheme), (-0.7,), (2.6,))
    x = np.random.default_rng(0).normal(size=(1, 32, 64)).astype(np.float32)
    codes = Codes.of(one)
    got = (np.clip(np.round(x / np.float32(codes.scale)) + codes.zero, -128, 127) - codes.zero) * codes.scale
    want = fake_quantize(x, one.scheme.kind, one.scheme.top, heads=0, real=np.ones(1, bool), limits=one.limits)
    # Symmetric codes end at -127 in the plan and at -128 here: only values beyond the range differ.
    inside = x > -127.4 * codes.scale if scheme == "int8_tensor_static" else np.ones_like(x, bool)
    np.testing.assert_allclose(got[inside], np.asarray(want)[inside], rtol=1e-6)


@pytest.mark.parametrize("rectified", [True, False])
def test_a_summand_is_clipped_only_where_the_sum_is(rectified):
    rng = np.random.default_rng(1)
    other, total = Codes(0.02, -100), Codes(0.03, -128 if rectified else -50)
    inner = Codes.beside(other, total, rectified)
    finish = lambda y: np.clip(np.maximum(y, 0) if rectified else y, *total.ends)
    a, b = rng.uniform(*other.ends, 10_000), rng.uniform(-20, 20, 10_000)
    # The ends are rounded to whole codes: half a step of the summand's.
    np.testing.assert_allclose(finish(a + np.clip(b, *inner.ends)), finish(a + b), atol=0.51 * inner.scale)


def test_versions_are_the_least_that_has_what_is_asked():
    assert version_of("DEQUANTIZE", ["int2"], 2, "float32") == 7
    assert version_of("FULLY_CONNECTED", ["float32", "int2", ""], 2, "float32") == 14
    assert version_of("CONV_2D", ["int8", "int4", "int32"], 4, "int8") == 7
    assert version_of("SUB", ["float32", "float32"], 4, "float32") == 1
    assert version_of("SUB", ["float32", "float32"], 5, "float32") == 3
    assert version_of("TRANSPOSE", ["bool"], 2, "bool") == 3


def message_of(call) -> str:
    with pytest.raises(MpqError) as caught:
        call()
    return str(caught.value)


def test_without_the_package_and_with_an_old_one(monkeypatch):
    name = "ai_edge_litert.schema_py_generated"
    monkeypatch.setitem(sys.modules, name, None)
    message = "LiteRT files are written by the package ai-edge-litert: pip install 'mpq[litert]'"
    assert message_of(require_litert) == message
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(TensorType=types.SimpleNamespace(INT4=17)))
    message = "this ai-edge-litert knows no int2 and is too old: pip install --upgrade 'mpq[litert]'"
    assert message_of(require_litert) == message
