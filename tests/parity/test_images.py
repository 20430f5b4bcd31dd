"""1,000 real images in every runtime, against the same plan in JAX: weights alone, dynamic and static W8A8."""

from pathlib import Path

import jax
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from numpy.lib.stride_tricks import sliding_window_view

from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.plans import calibrated, uniform_rows
from mpq.data.dataset import new_dataset
from mpq.export.targets import TARGETS
from mpq.inputs import Dataset
from mpq.litert.export import load as litert_codes
from mpq.litert.graph import require_litert
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

    params, apply = quantized.dequantized(), with_activations(model, traced, rows).apply
    plain, want = (np.asarray(jax.jit(f)(params, images)) for f in (model.apply, apply))
    got = run(path, images)
    kl, agreement = kl_and_agreement(want, got)
    assert kl < (1e-3 if rows else 1e-4)
    if runtime == "litert" and "static" in plan:
        # Biases of whole steps decide between classes that are all but equal, of which there may be more than one.
        first, second = np.sort(want, axis=-1)[:, [-1, -2]].T
        other = want.argmax(-1) != got.argmax(-1)
        assert ((first - second)[other] < 0.02 * np.median(first - second)).all()
        assert agreement >= 0.995
    else:
        assert agreement >= 0.999
    assert not rows or kl_and_agreement(plain, got)[0] > 1e-6  # inputs are rounded
    # Sums of another order: 2^-24 of the largest value in each of a few dozen steps.
    return float((np.abs(got - want).max(-1) <= 2e-5 * np.abs(want).max()).mean())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_digits(trained, runtime, plan, tmp_path, monkeypatch):
    """Where inputs are rounded, a value next to the middle of two codes goes either way with the order of a sum.

    That is so in one or two images of a hundred, in ONNX Runtime and PyTorch, whose rounding is the plan's own. LiteRT
    takes ranges of its own as inputs come, and of static ones it makes convolutions of integers.
    """
    monkeypatch.setattr("mpq.export.graphs.FAMILIES", digits.KNOWN)
    same = compared(trained, runtime, plan, tmp_path)
    if plan == "weights":
        assert same == 1
    elif runtime != "litert":
        assert same > 0.95


@pytest.mark.parametrize("plan", ["dynamic", "static"])
@pytest.mark.parametrize("runtime", ["onnx", "pt2"])
def test_resnet_20(resnet_20, runtime, plan, tmp_path):
    compared(resnet_20, runtime, plan, tmp_path)


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
def test_what_an_integer_convolution_of_litert_changes(tmp_path):
    """Its bias is of whole steps of its sums, by which one code in a thousand, or fewer, becomes a neighbour of itself.

    It is the first operation whose outputs are not the plan's: its input is rounded from floats, as the plan has it.
    Here it is computed in float64, from the codes that the runtime gave it; but for the bias that is the same.
    """
    model, (data, test), path = digits.trained("resnet"), digits.digits(3), tmp_path / "model.tflite"
    rows = rounded("litert", "int8_tensor_static", model, data)
    make = Candidates(model.params, model.trace(256).weights, RTN()).qtensor
    quantized = exported(model, ("int8_channel",), tmp_path / "q", TARGETS["litert"].refusal, make, rows, trace=(256,))
    TARGETS["litert"].save(path, quantized, "x")
    interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True, num_threads=1)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], (256, 8, 8, 3), strict=True)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], test.inputs[:256])
    interpreter.invoke()

    details = {d["index"]: d for d in interpreter.get_tensor_details()}
    graph = require_litert().ModelT.InitFromPackedBuf(path.read_bytes(), 0).subgraphs[0]
    bias_name = "layer1.0.conv1.kernel.bias"
    (op,) = (op for op in graph.operators if any(graph.tensors[i].name.decode() == bias_name for i in op.inputs))
    x, w, bias, out = (interpreter.get_tensor(i) for i in (*op.inputs, *op.outputs))
    (step, zero), (out_step, out_zero) = (details[i]["quantization"] for i in (op.inputs[0], op.outputs[0]))
    assert x.dtype == w.dtype == out.dtype == np.int8
    steps = step * details[op.inputs[1]]["quantization_parameters"]["scales"].astype(np.float64)
    padded = np.pad(x.astype(np.float64) - zero, ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = np.einsum("bhwcij,oijc->bhwo", sliding_window_view(padded, (3, 3), (1, 2)), w.astype(np.float64))
    scale, shift, mean, var = (np.float64(model.params[f"layer1.0.bn1.{k}"]) for k in ("scale", "bias", "mean", "var"))
    exact = shift - mean * scale / np.sqrt(var + 1e-5)
    codes = lambda y: np.clip(np.round(y / out_step) + out_zero, out_zero, 127)  # what is below is rectified
    whole, planned = codes((sums + bias) * steps), codes(sums * steps + exact)
    assert np.abs(bias - exact / steps).max() <= 0.5 * (1 + 1e-6)  # exact / steps is of float32 steps in the file
    assert (out != whole).mean() < 1e-4  # the runtime scales sums in float32
    assert 0 < (out != planned).mean() < 1e-3
    assert np.abs(out - planned).max() == 1
