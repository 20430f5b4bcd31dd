"""What of torch.export needs no PyTorch: what a program has, how weights lie in it, what a missing one is called."""

import operator
import sys
import types
import zipfile

import numpy as np
import pytest

from mpq.export.jaxprs import arithmetic
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.models import load as load_model
from mpq.pt2.export import load
from mpq.pt2.graph import require_torch
from mpq.pt2.weights import read_codes, stored
from mpq.types import Use, WeightSpec
from tests import tiny
from tests.runtime_cases import message_of, noise, require_equal

MATMUL = WeightSpec("a.kernel", "a.kernel", (), (64, 48), (0, 1), 1, 64, 48, "a", (Use("matmul", "x", 1),))
SLICE = WeightSpec("s[0]", "s", (0,), (64, 48), (0, 1), 1, 64, 48, "s", (Use("matmul", "x", 1),))
SCHEMES = ("int8_channel", "int3_g32_zp", "int5_g40_sbfloat16", "int8_g16_zp_sfloat32", "nf4_g32_sfp8")
SCHEMES = (*SCHEMES, "fp4_g32_se8m0", "fp8_e4m3_channel", "int7_tensor", "bf16", "fp32", "lut3_g16", "tcq3_g16")


@pytest.mark.parametrize(
    ("spec", "scheme", "reason"),
    [
        *((MATMUL, scheme, None) for scheme in SCHEMES),
        (MATMUL, "q4_0", "blocks of ggml are for gguf"),
        (SLICE, "bf16", "it is a slice of a parameter"),
    ],
)
def test_what_a_program_has(spec, scheme, reason):
    assert TARGETS["pt2"].refusal(spec, parse_scheme(scheme)) == reason


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(tiny.write_folder(tmp_path_factory.mktemp("pt2") / "model")))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_takes_the_bytes_of_the_plan_and_comes_back(scheme, model):
    spec = model.trace(1, 16).weights[-1]
    q = noise(model)(spec, parse_scheme(scheme))
    arrays = stored(q)
    assert 8 * sum(array.nbytes for array in arrays.values()) == TARGETS["pt2"].stored_bits(spec, q.scheme)
    back = read_codes(
        {n: a.reshape(-1).view(np.uint8) for n, a in arrays.items()}, q.scheme, spec.k, spec.n, spec.batch
    )
    require_equal({"w": back}, types.SimpleNamespace(qtensors={"w": q}))


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    message = "programs of torch.export are written by the package torch: pip install 'mpq[torch]'"
    assert message_of(require_torch) == message


def test_a_torch_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.8.1+cpu"))
    monkeypatch.setitem(sys.modules, "torch.ao.quantization.fx._decomposed", types.SimpleNamespace())
    message = "torch 2.8.1+cpu writes other files than torch 2.9 and later: pip install --upgrade 'mpq[torch]'"
    assert message_of(require_torch) == message


@pytest.mark.parametrize("content", ["nothing", "an archive", "another program", "no such file"])
def test_a_file_that_is_none(content, tmp_path):
    path = tmp_path / "x.pt2"
    if content == "nothing":
        path.write_bytes(b"nothing")
    elif content != "no such file":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data/weights/model_weights_config.json" if "program" in content else "a", "{}")
    reason = {"nothing": "BadZipFile", "no such file": "FileNotFoundError"}.get(content, "ValueError")
    assert message_of(lambda: load(path)) == f"{path} is no file that `mpq export --to pt2` wrote: {reason}"


def test_open_dimensions_are_sums_and_products():
    kinds = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Neg": operator.neg}
    value = lambda dim: arithmetic(dim, {"a": 5, "b": 7}, int, lambda kind, *x: kinds[kind](*x), "X")
    assert value("2*a*b - b + 1") == 64
    assert value("-1*a + -3") == -8
    message = "a dimension floordiv(a, 2) has no form in X here: sums and products have"
    assert message_of(lambda: value("1 + floordiv(a, 2)")) == message
