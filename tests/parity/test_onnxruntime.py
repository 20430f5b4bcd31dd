"""Exported graphs in ONNX Runtime against the dequantized model in JAX: every kind of family, any batch and length."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from mpq.equalize import rotate
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models import Model, load
from mpq.onnx.convert import traced
from mpq.onnx.export import load as load_codes
from mpq.onnx.export import save, size_bytes
from mpq.onnx.weights import refusal
from mpq.quantize import RTN, Candidates
from tests import decoder_cases, runtime_cases, tiny, vision_cases
from tests.command import exit_code, finished_bars
from tests.runtime_cases import made, message_of, noise, require_equal, some_inputs

pytestmark = pytest.mark.parity

SCHEMES = ("int4_g16", "int8_channel", "int4_g8_zp", "int2_g16_zp", "int8_g16_zp_sbfloat16", "int4_tensor_zp", "bf16")
DECODERS = ("llama", "gemma2", "opt, post-norm, projected", "gpt_neox", "qwen2_moe")


def exported(model: Model, schemes: tuple[str, ...], folder, make=None, rows=()) -> Exported:
    """The model with its weights at these schemes in turn, each at the next one that the runtime has for it.

    `rows` are activations, rounded.
    """
    make = make or Candidates(model.params, model.trace(1, 16).weights, RTN()).qtensor
    return runtime_cases.exported(model, schemes, folder, refusal, make, rows)


def run(path, inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return session.run(None, {given.name: inputs.astype(np.int64) if given.name == "input_ids" else inputs})[0]


def optimized(path, folder) -> list[onnx.NodeProto]:
    """Nodes of the graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(onnx.load(folder / "optimized.onnx").graph.node)


def bits_of_matmuls(nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    """Stored codes that `MatMulNBits` reads, and its bits."""
    read = [node for node in nodes if (node.op_type, node.domain) == ("MatMulNBits", "com.microsoft")]
    return {node.input[1]: next(a.i for a in node.attribute if a.name == "bits") for node in read}


def require_matmuls_of_codes(path, folder, quantized: Exported) -> set[int]:
    """Every matrix in blocks of 16 rows is multiplied as it is stored, in the file and in what runs; the widths."""
    bits = {}
    for spec in quantized.weights:
        scheme = quantized.qtensors[spec.path].scheme
        if scheme.group_size == 16 and len(spec.shape) == 2 and {use.kind for use in spec.uses} == {"matmul"}:
            bits[f"{spec.path}.qvalue"] = scheme.format.bits
    assert bits_of_matmuls(onnx.load(path).graph.node) == bits
    assert bits_of_matmuls(optimized(path, folder)) == bits
    return set(bits.values())


@pytest.mark.parametrize("name", [*decoder_cases.CASES, "bert", *vision_cases.CASES])
def test_every_kind_of_family(name, tmp_path):
    model = made(name, tmp_path / "model")
    quantized = exported(model, SCHEMES, tmp_path / "orbax", noise(model))
    size = save(tmp_path / "model.onnx", quantized, name)
    assert size == (tmp_path / "model.onnx").stat().st_size == size_bytes(quantized, name)
    inputs = some_inputs(model, 3, 10)
    want = np.asarray(jax.jit(model.apply)(quantized.dequantized(), inputs))
    # The same float32 weights, in sums of another order: 2^-24 of the largest value in each of a few dozen steps.
    close = lambda got, want: np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    close(run(tmp_path / "model.onnx", inputs), want)
    # One file for every batch and length; what a decoder says of a token depends on no later one.
    part = (slice(0, 1), slice(0, 7)) if name in decoder_cases.CASES else (slice(0, 1),)
    close(run(tmp_path / "model.onnx", inputs[part]), want[part])
    require_equal(load_codes(tmp_path / "model.onnx"), quantized)
    widths = require_matmuls_of_codes(tmp_path / "model.onnx", tmp_path, quantized)
    assert widths == {2, 4, 8} or name not in (*DECODERS, "bert")


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2"])
def test_a_rotated_model(name, tmp_path):
    """The file computes what the original does, not only what the rotated model does; two of three have a new head."""
    model = made(name, tmp_path / "model")
    tokens = some_inputs(model, 2, 12)
    data = Dataset(tokens, np.ones(tokens.shape, bool), np.arange(2, dtype=np.int32), "noise", "0")
    found = rotate(model, model.trace(1, 12), data, jax.random.key(0))
    save(tmp_path / "model.onnx", exported(found.model, ("fp32",), tmp_path / "orbax"), name)
    want = np.asarray(jax.jit(model.apply)(model.params, tokens))
    # Rotation rounds the weights once more, and changes outputs by about as much as the order of sums does.
    np.testing.assert_allclose(run(tmp_path / "model.onnx", tokens), want, atol=4e-5 * np.abs(want).max())


def test_the_reference_model_on_held_out_text(root, tmp_path, capsys):
    model = load("reference")
    quantized = exported(model, ("int4_g32", "int8_g64_zp", "int2_g16", "int8_channel", "int4_g64_zp"), tmp_path / "q")
    assert exit_code("export", tmp_path / "q", "--to", "onnx", "-o", tmp_path / "model.onnx", "--json") == 0
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert finished_bars(capsys.readouterr().err)["export onnx"] == len(stored)
    text = (root / "mpq/assets/reference_lm/text/test.txt").read_text()
    tokens = np.asarray(model.tokenizer.encode(text[:40_000]).ids[: 8 * 504], np.int32).reshape(8, 504)
    want = np.asarray(jax.jit(model.apply)(quantized.dequantized(), tokens))
    got = run(tmp_path / "model.onnx", tokens)
    p, q = jax.nn.log_softmax(want), jax.nn.log_softmax(got)
    assert float((jnp.exp(p) * (p - q)).sum(-1).mean()) < 1e-7
    assert (want.argmax(-1) == got.argmax(-1)).mean() >= 0.999


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    model = load(str(tiny.write_folder(folder / "model")))
    return model, exported(model, ("int4_g16", "int8_channel"), folder / "orbax")


def test_sizes_are_known_for_random_plans_and_equal_models_give_equal_bytes(small, tmp_path):
    model, quantized = small
    rng, weights = np.random.default_rng(0), quantized.weights
    candidates = Candidates(model.params, weights, RTN())
    schemes = [parse_scheme(s) for s in ("int4_g16", "int8_channel", "bf16", "fp32")]
    for trial in range(5):
        choice = {w.path: schemes[rng.integers(len(schemes))] for w in weights}
        plan = dataclasses.replace(quantized, qtensors=candidates.choose(choice))
        assert save(tmp_path / "a", plan, "n" * 50 * trial) == size_bytes(plan, "n" * 50 * trial)
    save(tmp_path / "b", plan, "n" * 50 * trial)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_one_file_cannot_hold_lies_in_two(small, tmp_path):
    model, quantized = small
    size = save(tmp_path / "one", quantized, "x")
    assert (tmp_path / "one").is_file()
    assert size_bytes(quantized, "x", limit=size) == size
    two = save(tmp_path / "two", quantized, "x", limit=size - 1)
    assert two == size_bytes(quantized, "x", limit=size - 1)
    files = {file.name: file.stat().st_size for file in (tmp_path / "two").iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert sum(files.values()) == two
    assert files["model.onnx.data"] > size / 4
    inputs = some_inputs(model, 2, 9)
    np.testing.assert_array_equal(run(tmp_path / "two" / "model.onnx", inputs), run(tmp_path / "one", inputs))
    require_equal(load_codes(tmp_path / "two"), quantized)


class TestWhatCannotBeWritten:
    def test_a_scheme(self, small, tmp_path):
        model, quantized = small
        path = "layers.0.mlp.up_proj.kernel"
        three = RTN()(model.params[path][None], parse_scheme("int3_g16"))
        plan = dataclasses.replace(quantized, qtensors=quantized.qtensors | {path: three})
        message = f"weight {path} at int3_g16 has no form in onnx: it takes int2, int4 and int8; choose another plan"
        assert message_of(lambda: save(tmp_path / "x", plan, "x")) == message
        assert not list(tmp_path.iterdir())

    def test_an_operation(self, small, tmp_path, monkeypatch):
        monkeypatch.setattr("mpq.onnx.convert.OPS", {})
        message = message_of(lambda: save(tmp_path / "x", small[1], "x"))
        assert message.endswith("has no form in ONNX here: export this model to another runtime")
        assert not list(tmp_path.iterdir())

    def test_what_depends_on_the_length_otherwise(self, small):
        model = dataclasses.replace(small[0], apply=lambda params, x: x.reshape(-1, 2, 3))
        message = (
            "the model computes otherwise for other batches or lengths, which one ONNX graph cannot: Cannot divide "
            "evenly the sizes of shapes (batch, time) and (-1, 2, 3)"
        )
        assert message_of(lambda: traced(model)) == message

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "x").write_bytes(b"nothing")
        message = f"{tmp_path / 'x'} is no ONNX file that `mpq export --to onnx` wrote: DecodeError"
        assert message_of(lambda: load_codes(tmp_path / "x")) == message
