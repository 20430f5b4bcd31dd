"""What of ONNX needs none of its packages: what the runtime has, and what a missing package is called."""

import sys

import numpy as np
import pytest

from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.onnx.graph import require_onnx
from mpq.onnx.weights import nibbles
from mpq.types import MpqError, Use, WeightSpec

MATMUL = WeightSpec("a.kernel", "a.kernel", (), (64, 48), (0, 1), 1, 64, 48, "a", (Use("matmul", "x", 1),))
CONV = WeightSpec("c", "c", (), (3, 3, 4, 8), (0, 1, 2, 3), 1, 36, 8, "c", (Use("conv", "x", 1),))
SLICE = WeightSpec("s[0]", "s", (0,), (64, 48), (0, 1), 1, 64, 48, "s", (Use("matmul", "x", 1),))


@pytest.mark.parametrize(
    ("spec", "scheme", "reason"),
    [
        (MATMUL, "int2_g32_zp", None),
        (MATMUL, "int4_channel_sfloat32", None),
        (CONV, "int8_g12", None),
        (CONV, "bf16", None),
        (MATMUL, "int3_g32", "it takes int2, int4 and int8"),
        (MATMUL, "nf4_g32", "it takes int2, int4 and int8"),
        (MATMUL, "q8_0", "it takes int2, int4 and int8"),
        (MATMUL, "int4_g32_sfp8", "its scales are float16, bfloat16 or float32"),
        (CONV, "int2_channel", "it has 2 bits in matmuls with groups of 16, 32, 64, 128 or 256 only"),
        (CONV, "int4_g16", "it takes whole groups here, and the weight has 36 rows"),
        (MATMUL, "int8_g48", "it takes whole groups here, and the weight has 64 rows"),
        (SLICE, "bf16", "it is a slice of a parameter"),
    ],
)
def test_what_onnx_runtime_has(spec, scheme, reason):
    assert TARGETS["onnx"].refusal(spec, parse_scheme(scheme)) == reason


def test_codes_of_4_bits_lie_low_nibble_first():
    assert nibbles(np.array([[-8, 7, 1]], np.int8)) == bytes([0x78, 0x01])


def test_without_the_onnx_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MpqError) as caught:
        require_onnx()
    assert str(caught.value) == "ONNX files are written by the package onnx: pip install 'mpq[onnx]'"
