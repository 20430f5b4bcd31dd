"""What of ONNX needs none of its packages: what the runtime has, and what a missing package is called."""

import sys
import types

import numpy as np
import pytest

from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.models import load
from mpq.onnx.graph import require_onnx
from mpq.onnx.weights import nibbles
from mpq.types import Use, WeightSpec
from tests import tiny
from tests.command import exit_code
from tests.runtime_cases import exported, message_of

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
    assert message_of(require_onnx) == "ONNX files are written by the package onnx: pip install 'mpq[onnx]'"


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        (("1.18.0", None), "onnx 1.18.0 does not read weights of 4 bits back, 1.19 and later do"),
        (("1.19.0", "1.26.0"), "onnxruntime 1.26.0 does not compute all models as they are, 1.27 and later do"),
        (("1.19.0", None), None),
        (("1.100.0rc1", "1.27.0"), None),
    ],
)
def test_packages_too_old(versions, message, monkeypatch, tmp_path, capsys):
    for name, version in zip(("onnx", "onnxruntime"), versions, strict=True):
        monkeypatch.setitem(sys.modules, name, version and types.SimpleNamespace(__version__=version))
    if message is None:
        assert require_onnx().__version__ == versions[0]
        return
    message += ": pip install --upgrade 'mpq[onnx]'"
    assert message_of(require_onnx) == message
    model = load(str(tiny.write_folder(tmp_path / "model")))
    exported(model, ("int8_channel",), tmp_path / "q", TARGETS["onnx"].refusal)
    assert exit_code("export", tmp_path / "q", "--to", "onnx", "-o", tmp_path / "x") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()
