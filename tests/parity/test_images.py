"""1,000 real images in every runtime, against the same plan in JAX: weights alone, dynamic and static W8A8."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import jax
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from numpy.lib.stride_tricks import sliding_window_view

from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.plans import calibrated, uniform_rows
from mpq.data.dataset import new_dataset
from mpq.export.orbax import Exported
from mpq.export.targets import TARGETS
from mpq.inputs import Dataset
from mpq.litert.export import load as litert_codes
from mpq.litert.export import with_whole_biases
from mpq.litert.graph import require_litert
from mpq.litert.weights import unpack
from mpq.models import Model, load
from mpq.onnx.export import load as onnx_codes
from mpq.pt2.export import load as pt2_codes
from mpq.quantize import RTN, Candidates
from tests import checkpoint_folders as folders
from tests import digits
from tests.parity import test_litert, test_onnxruntime, test_pt2
from tests.runtime_cases import exported, kl_and_agreement, require_equal
from tests.vision_cases import CIFAR

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # of torch.export's own
]

RUNTIMES = {
    "onnx": (onnx_codes, test_onnxruntime.run),
    "pt2": (pt2_codes, test_pt2.run),
    "litert": (litert_codes, test_litert.run),
}
"""Format -> what reads a file's codes, and what runs it."""

MIXED = ("int4_channel", "int8_channel", "int8_g8_zp")
PLANS = {
    "weights": (MIXED, None),
    "dynamic": (("int8_channel",), "int8_tensor"),
    "static": (("int8_channel",), "int8_tensor_static"),
    "static with zero points": (("int8_channel",), "int8_tensor_static_asym"),
}
"""Name -> schemes of the weights in turn, and that of their inputs."""


Case = tuple[Model, Dataset, np.ndarray]
"""A trained network, images to calibrate on, and 1,000 others."""


@pytest.fixture(scope="module", params=digits.CONFIGS)
def trained(request) -> Case:
    model = digits.trained(request.param)
    data, test = digits.digits(model.inputs.channels)
    return model, data, test.inputs


@pytest.fixture(scope="module")
def resnet_20(shared_data, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("model")
    folders.write(folder, {**CIFAR, "depth": 20, "width": 16, "num_labels": 10, "image_size": 32}, {})
    (folder / "model.safetensors").write_bytes((shared_data / "vision/resnet20_cifar10.safetensors").read_bytes())
    with np.load(shared_data / "vision/cifar10_lossless_head.npz") as found:
        rest, images = found["train_x"], np.concatenate([found["test_x"], found["train_x"][-68:]])
    return load(str(folder)), new_dataset(rest[:128], np.ones(128, bool), np.arange(128), "cifar10"), images


def rounded(runtime: str, scheme: str, model: Model, data: Dataset) -> tuple[RoundedActivation, ...]:
    """The inputs of all weights; as they come, LiteRT rounds none of depthwise convolutions, and with zero points."""
    traced, hybrid = model.trace(len(data.inputs)), (runtime, scheme) == ("litert", "int8_tensor")
    rows = uniform_rows(traced, f"{scheme}_asym" if hybrid else scheme, None)
    deep = {spec.path for spec in traced.weights if spec.batch > 1}
    rows = {path: row for path, row in rows.items() if not (hybrid and deep & set(row["weights"]))}
    return calibrated(rows, model, traced, data, None, 64)[0]


def compared(case: Case, runtime: str, plan: str, folder: Path) -> float:
    """Require of a file what it must be; the share of images whose outputs differ from the plan's by last bits only."""
    (model, data, images), (schemes, activations), target = case, PLANS[plan], TARGETS[runtime]
    assert len(images) == 1000
    rows = () if activations is None else rounded(runtime, activations, model, data)
    traced = model.trace(len(images))
    make = Candidates(model.params, traced.weights, RTN()).qtensor
    quantized = exported(model, schemes, folder / "q", target.refusal, make, rows, trace=(len(images),))
    path, (codes, run) = folder / f"model.{runtime}", RUNTIMES[runtime]
    assert target.save(path, quantized, "x") == path.stat().st_size == target.size_bytes(quantized, "x")
    require_equal(codes(path), quantized)

    if runtime == "litert" and "static" in plan:
        # What integer convolutions add is of whole steps, in the model as in the file: that file is also its own.
        quantized, data = with_whole_biases(quantized, "x"), path.read_bytes()
        target.save(path, quantized, "x")
        assert path.read_bytes() == data
    params, apply = quantized.dequantized(), with_activations(model, traced, rows).apply
    plain, want = (np.asarray(jax.jit(f)(params, images)) for f in (model.apply, apply))
    got = run(path, images)
    kl, agreement = kl_and_agreement(want, got)
    assert kl < (1e-3 if rows else 1e-4)
    assert agreement >= 0.999
    assert not rows or kl_and_agreement(plain, got)[0] > 1e-6  # inputs are rounded
    # Sums of another order: 2^-24 of the largest value in each of a few dozen steps.
    return float((np.abs(got - want).max(-1) <= 2e-5 * np.abs(want).max()).mean())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_digits(trained, runtime, plan, tmp_path, monkeypatch):
    """Where inputs are rounded, a value next to the middle of two codes goes either way with the order of a sum.

    That is so in one or two images of a hundred, where rounding is the plan's own: LiteRT takes ranges of its own as
    inputs come.
    """
    monkeypatch.setattr("mpq.export.graphs.FAMILIES", digits.KNOWN)
    same = compared(trained, runtime, plan, tmp_path)
    if plan == "weights":
        assert same == 1
    elif runtime != "litert" or "static" in plan:
        assert same > 0.95


@pytest.mark.parametrize(
    ("runtime", "plan"),
    [("onnx", "dynamic"), ("onnx", "static"), ("pt2", "dynamic"), ("pt2", "static"), ("litert", "static")],
)
def test_resnet_20(resnet_20, runtime, plan, tmp_path):
    """20 roundings after another: what is next to the middle of two codes shows in more images than of digits."""
    assert compared(resnet_20, runtime, plan, tmp_path) > 0.5


@dataclasses.dataclass(frozen=True)
class Operation:
    """The first integer convolution of a file, as the runtime ran it: codes in float64.

    Attributes:
      sums: of codes, without what is added.
      bias: that.
      out: the codes that it gave, `int8`.
      steps: of the sums.
      codes: scale and zero point of the output.
    """

    sums: np.ndarray
    bias: np.ndarray
    out: np.ndarray
    steps: np.ndarray
    codes: tuple[float, int]

    @classmethod
    def ran(cls, path: Path, images: np.ndarray, weight: str) -> Self:
        """Run the file, and look at the 3x3 convolution by this weight."""
        interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True, num_threads=1)
        given = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(given, images.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given, images)
        interpreter.invoke()
        details = {d["index"]: d for d in interpreter.get_tensor_details()}
        model = require_litert().ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        graph = model.subgraphs[0]
        (op,) = (
            op for op in graph.operators if any(graph.tensors[i].name.decode() == f"{weight}.bias" for i in op.inputs)
        )
        (x, bias, out), kernel = map(interpreter.get_tensor, (op.inputs[0], op.inputs[2], op.outputs[0])), op.inputs[1]
        raw, shape = model.buffers[graph.tensors[kernel].buffer].data, graph.tensors[kernel].shape
        w = unpack(raw, int(np.prod(shape)), 8 * raw.size // int(np.prod(shape))).reshape(shape)
        (step, zero), codes = (details[i]["quantization"] for i in (op.inputs[0], op.outputs[0]))
        assert x.dtype == out.dtype == np.int8
        padded = np.pad(x.astype(np.float64) - zero, ((0, 0), (1, 1), (1, 1), (0, 0)))
        sums = np.einsum("bhwcij,oijc->bhwo", sliding_window_view(padded, (3, 3), (1, 2)), w.astype(np.float64))
        steps = step * details[kernel]["quantization_parameters"]["scales"].astype(np.float64)
        return cls(sums, bias, out, steps, codes)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """Codes of the output, in units of its scale; what is below zero is rectified."""
        return np.clip(np.round(values) + self.codes[1], self.codes[1], 127)


def in_fixed_point(sums: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Integers times factors below 1 as gemmlowp rounds them, twice.

    B. Jacob et al. 2018 (arXiv:1712.05877, section 2.2): a factor is `m 2^-e`, `m` of 31 bits in `[0.5, 1)`. The
    product by `m` is rounded to an integer, then that shifted by `e` bits; halves go away from zero.
    """
    mantissa, exponent = np.frexp(factors)
    away = lambda x: np.trunc(x + np.copysign(0.5, x))
    return away(away(sums * np.round(mantissa * 2.0**31) * 2.0**-31) * 2.0**exponent)


def first_convolution(scheme: str, folder: Path, **options: bool) -> tuple[Exported, Operation]:
    """The digits' ResNet under one scheme, static ranges, and what LiteRT made of its first integer convolution."""
    model, (data, test), path = digits.trained("resnet"), digits.digits(3), folder / "model.tflite"
    rows = rounded("litert", "int8_tensor_static", model, data)
    make = Candidates(model.params, model.trace(256).weights, RTN()).qtensor
    quantized = exported(model, (scheme,), folder / "q", TARGETS["litert"].refusal, make, rows, trace=(256,))
    TARGETS["litert"].save(path, quantized, "x", **options)
    return quantized, Operation.ran(path, test.inputs[:256], "layer1.0.conv1.kernel")


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
def test_what_an_integer_convolution_of_litert_changes(tmp_path):
    """Its bias is of whole steps of its sums, by which one code in a thousand, or fewer, becomes a neighbour of itself.

    Here it is computed in float64, from the codes that the runtime gave it; but for the bias that is the same.
    """
    quantized, op = first_convolution("int8_channel", tmp_path)
    steps, scale = op.steps, op.codes[0]
    assert (op.out != op.rounded((op.sums + op.bias) * steps / scale)).mean() < 1e-4  # it scales sums in float32

    def added(params: Mapping[str, np.ndarray]) -> np.ndarray:
        scale, shift, mean, var = (np.float64(params[f"layer1.0.bn1.{k}"]) for k in ("scale", "bias", "mean", "var"))
        return shift - mean * scale / np.sqrt(var + 1e-5)

    given, whole = added(quantized.params), added(with_whole_biases(quantized, "x").params)
    assert 0.25 < np.abs(op.bias - given / steps).max() <= 0.5 * (1 + 1e-6)  # steps are products of float32 in the file
    # The norm computes what it adds, and the runtime steps, from float32: roundings by 2^-24 of a thousand steps.
    assert np.abs(op.bias - whole / steps).max() < 1e-3
    planned = op.rounded((op.sums * steps + given) / scale)
    assert (op.out != planned).mean() > 10 * (op.out != op.rounded((op.sums * steps + whole) / scale)).mean()
    assert np.abs(op.out - planned).max() == 1


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
def test_what_litert_makes_of_codes_of_four_bits(tmp_path):
    """Its own kernel for them works in fixed point and rounds twice; no file has them so but where that is asked."""
    quantized, op = first_convolution("int4_channel", tmp_path, integer=True)
    sums, factors = op.sums + op.bias, op.steps / op.codes[0]
    np.testing.assert_array_equal(op.out, op.rounded(in_fixed_point(sums, factors)))
    assert (op.out != op.rounded(sums * factors)).mean() > 1e-3
    TARGETS["litert"].save(tmp_path / "exact.tflite", quantized, "x")
    graph = require_litert().ModelT.InitFromPackedBuf((tmp_path / "exact.tflite").read_bytes(), 0).subgraphs[0]
    assert not any(tensor.name.decode().endswith(".bias") for tensor in graph.tensors)
