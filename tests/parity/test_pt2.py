"""Programs of torch.export in PyTorch against the dequantized model in JAX: every kind of family, any batch, length."""

import collections
import dataclasses
import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import torch

from mpq.activations import parse_activation_scheme
from mpq.activations.apply import RoundedActivation
from mpq.activations.plans import rows_of
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.models import Model, load
from mpq.pt2.activations import Activations
from mpq.pt2.export import load as load_codes
from mpq.pt2.export import save, size_bytes
from mpq.pt2.graph import Graph, require_torch
from mpq.pt2.weights import refusal
from mpq.quantize import RTN
from tests import runtime_cases, tiny
from tests.command import exit_code, finished_bars
from tests.runtime_cases import kl_and_agreement, made, message_of, noise, require_equal, rounded_rows, some_inputs

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # of torch.export's own
]

WHOLE = ("int4_g16", "int8_channel", "int2_g16_zp", "int8_g16_zp_sbfloat16", "int4_tensor_zp", "bf16")
ODD = (
    "lut3_g16",
    "tcq3_g16",
    "tcq5_channel_sfp8",
    "int3_g16",
    "int5_g12",
    "nf4_g16_sfp8",
    "int6_channel_zp_sfloat32",
    "int7_g16_zp",
    "fp4_g16_se8m0",
    "fp16",
)
FAMILIES = {
    "llama": ODD,
    "gemma2": WHOLE,
    "qwen2_moe": ODD,
    "mobilenet_v2": WHOLE,
    "vit": ODD,
}
CASES = {
    "llama of 4 bits in groups, by token, with zero points": ("llama", "int4_g16", "int4_token_asym"),
    "gemma2, smoothed, static with zero points": ("gemma2", "int4_channel_zp", "int8_tensor_static_asym"),
    "bert of 6 bits, static": ("bert", "int8_tensor_zp", "int6_tensor_static"),
    "resnet, static": ("resnet", "int8_channel", "int8_tensor_static"),
    "resnet by image": ("resnet_cifar", "int8_channel", "int8_tensor"),
}
WHOLE_CHANNELS = [case for case in CASES if "static" in case]
"""Cases whose products have integers on both sides."""


def exported(model: Model, schemes: tuple[str, ...], folder, rows=()) -> Exported:
    return runtime_cases.exported(model, schemes, folder, refusal, noise(model), rows)


def run(path, inputs: np.ndarray) -> np.ndarray:
    program = torch.export.load(path).module()
    return program(torch.from_numpy(inputs.astype(np.int64) if inputs.dtype == np.int32 else inputs)).numpy()


def require_bytes_of_the_plan(path, quantized: Exported) -> None:
    """What lies in the archive of every weight is what the plan counts."""
    with zipfile.ZipFile(path) as archive:
        (config,) = (name for name in archive.namelist() if name.endswith("model_weights_config.json"))
        sizes = collections.Counter[str]()
        for name, place in json.loads(archive.read(config))["config"].items():
            size = archive.getinfo(config.replace("model_weights_config.json", place["path_name"])).file_size
            sizes[name.rsplit(".", 1)[0]] += size
    for spec in quantized.weights:
        assert 8 * sizes[spec.path] == spec.size_bits(quantized.qtensors[spec.path].scheme), spec.path


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_family(name, tmp_path):
    model = made(name, tmp_path / "model")
    quantized = exported(model, FAMILIES[name], tmp_path / "orbax")
    path = tmp_path / "model.pt2"
    assert save(path, quantized, name) == path.stat().st_size
    inputs = some_inputs(model, 3, 10)
    want = np.asarray(jax.jit(model.apply)(quantized.dequantized(), inputs))
    # The same float32 weights, in sums of another order: 2^-24 of the largest value in each of a few dozen steps.
    close = lambda got, want: np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    close(run(path, inputs), want)
    # One program for every batch and length; what a decoder says of a token depends on no later one.
    decodes = inputs.ndim == 2
    part = (slice(0, 1), slice(0, 7)) if decodes else (slice(0, 1),)
    close(run(path, inputs[part]), want[part])
    require_equal(load_codes(path), quantized)
    require_bytes_of_the_plan(path, quantized)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_rounding(case, tmp_path):
    name, weights, activations = CASES[case]
    model = made(name, tmp_path / "model")
    quantized = exported(model, (weights, "fp16"), tmp_path / "q", rounded_rows(model, activations, "smoothed" in case))
    path = tmp_path / "model.pt2"
    size = save(path, quantized, name)
    assert size == path.stat().st_size
    if case == "resnet by image":  # what is predicted takes as long as the file: it is made for it
        assert size == size_bytes(quantized, name)
    require_equal(load_codes(path), quantized)
    inputs = some_inputs(model, 3, 10)
    want = np.asarray(jax.jit(load(str(tmp_path / "q")).apply)(quantized.dequantized(), inputs))
    # As without rounding; no value lies so close to the middle of two codes that sums of another order would decide.
    np.testing.assert_allclose(run(path, inputs), want, atol=2e-5 * np.abs(want).max())
    paired = collections.Counter(
        {"matmul": "linear", "conv": "conv2d"}[use.kind]
        for spec in quantized.weights
        for use in spec.uses
        if use.kind != "embedding" and case in WHOLE_CHANNELS and quantized.qtensors[spec.path].scheme.has_scale
    )
    assert collections.Counter(k for k, *of in operands(path) if of == ["tensor", "channel"]) == paired
    assert bool(paired) == (case in WHOLE_CHANNELS)


def operands(path) -> list[tuple[str, str, str]]:
    """Every product of a program, and by which granularity its operands are dequantized right before it."""
    graph, found = torch.export.load(path).graph, []
    for node in graph.nodes:
        kind = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
        if kind in ("linear", "conv2d"):
            names = [str(getattr(arg, "target", "")) for arg in node.args[:2]]
            found.append((kind, *(n.removeprefix("quantized_decomposed.dequantize_per_").split(".")[0] for n in names)))
    return found


def test_the_reference_model_on_held_out_text(root, tmp_path, capsys):
    """4,032 tokens, by the commands; and that PyTorch alone loads the file."""
    plan = "int4_g32"
    assert exit_code("quantize", "reference", plan, "--method", "rtn", "-o", tmp_path / "q") == 0
    path = tmp_path / "model.pt2"
    assert exit_code("export", tmp_path / "q", "--to", "pt2", "-o", path) == 0
    assert finished_bars(capsys.readouterr().err)["export pt2"] == 3
    model = load(str(tmp_path / "q"))
    text = (root / "mpq/assets/reference_lm/text/test.txt").read_text()
    tokens = np.asarray(model.tokenizer.encode(text[:40_000]).ids[: 8 * 504], np.int32).reshape(8, 504)
    np.save(tmp_path / "tokens.npy", tokens.astype(np.int64))
    program = (
        "import sys, numpy, torch\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "numpy.save(sys.argv[3], model(torch.from_numpy(numpy.load(sys.argv[2]))).numpy())\n"
        "assert not {'mpq', 'jax'} & set(sys.modules)\n"
    )
    files = [str(path), str(tmp_path / "tokens.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-c", program, *files], check=True, cwd=tmp_path)
    got = np.load(tmp_path / "logits.npy")
    kl, agreement = kl_and_agreement(np.asarray(jax.jit(model.apply)(model.params, tokens)), got)
    assert abs(kl) < 1e-7
    assert agreement >= 0.999


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    model = load(str(tiny.write_folder(folder / "model")))
    return model, exported(model, ("int4_g16", "int8_channel"), folder / "orbax")


def test_sizes_are_known_and_equal_models_give_equal_bytes(small, tmp_path):
    _, quantized = small
    assert save(tmp_path / "a", quantized, "x") == size_bytes(quantized, "x")
    save(tmp_path / "b", quantized, "x")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert not any(b"mpq/pt2" in archive.read(name) for name in archive.namelist())


class TestWhatCannotBeWritten:
    def test_a_scheme(self, small, tmp_path):
        model, quantized = small
        path = "layers.0.mlp.up_proj.kernel"
        blocks = RTN()(model.params[path][None], parse_scheme("q8_0"))
        plan = dataclasses.replace(quantized, qtensors=quantized.qtensors | {path: blocks})
        message = f"weight {path} at q8_0 has no form in pt2: blocks of ggml are for gguf; choose another plan"
        assert message_of(lambda: save(tmp_path / "x", plan, "x")) == message
        assert not list(tmp_path.iterdir())

    def test_an_operation(self, small, tmp_path, monkeypatch):
        monkeypatch.setattr("mpq.pt2.convert.OPS", {})
        message = message_of(lambda: save(tmp_path / "x", small[1], "x"))
        assert message.endswith("has no form in PyTorch here: export this model to another runtime")
        assert not list(tmp_path.iterdir())

    def test_the_cache(self, tmp_path):
        model = load(str(tiny.write_folder(tmp_path / "model")))
        row = RoundedActivation(rows_of("kv", model.trace(2, 16))[0], parse_activation_scheme("int8_head"))
        quantized = exported(model, ("fp16",), tmp_path / "q", (row,))
        assert message_of(lambda: save(tmp_path / "x", quantized, "x")) == (
            "layers.0.self_attn.k_proj.kernel at int8_head has no form in pt2: the program keeps no KV cache; choose "
            "another plan"
        )
        assert not (tmp_path / "x").exists()

    def test_windows_that_are_not_the_first_axis(self, small):
        row = RoundedActivation(
            rows_of("activations", small[0].trace(2, 16))[0], parse_activation_scheme("int8_tensor")
        )
        activations = Activations(Graph(require_torch()), [row], "batch")
        message = (
            "layers.0.self_attn.{q,k,v}_proj.kernel at int8_tensor has no form in pt2: windows are not its first axis; "
            "use int8_token, or int8_tensor_static"
        )
        assert message_of(lambda: activations.rounded(row, "x", (6, 32), (1,))) == message
