"""Exported files in LiteRT's interpreter against the dequantized model in JAX: every kind of family, any batch."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.rows import activation_rows, kv_rows
from mpq.activations.scheme import parse_activation_scheme
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.litert import graph
from mpq.litert.convert import traced
from mpq.litert.export import load as load_codes
from mpq.litert.export import save, size_bytes, with_whole_biases
from mpq.litert.weights import refusal
from mpq.models import Model, load
from mpq.quantize import RTN, Candidates
from tests import tiny
from tests.command import exit_code, finished_bars
from tests.runtime_cases import (
    exported,
    kl_and_agreement,
    made,
    message_of,
    noise,
    require_equal,
    some_inputs,
    within_last_bits,
)

pytestmark = pytest.mark.parity

SCHEMES = ("int4_g16", "int8_channel", "int4_g8_zp", "int2_g16_zp", "int8_g16_zp_sbfloat16", "int4_tensor_zp", "bf16")
DECODERS = ("llama", "gpt2", "gemma2", "opt, post-norm, projected", "qwen2_moe")
VISION = ("resnet", "vit")


def run(path, inputs: np.ndarray, kernels: OpResolverType = OpResolverType.BUILTIN) -> np.ndarray:
    interpreter = Interpreter(model_path=str(path), experimental_op_resolver_type=kernels, num_threads=1)
    (given,), (out,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], inputs.shape, strict=True)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], inputs)
    interpreter.invoke()
    return interpreter.get_tensor(out["index"]).copy()


def require_bits_of_the_plan(path, quantized: Exported) -> None:
    """The type of every stored weight, as the runtime itself tells it."""
    interpreter = Interpreter(model_path=str(path))
    schema = graph.require_litert()
    model = schema.ModelT.InitFromPackedBuf(Path(path).read_bytes(), 0)
    kinds = {t.name.decode(): (t.type, t.buffer) for t in model.subgraphs[0].tensors}
    names = {number: name for name, number in vars(schema.TensorType).items() if name.isupper()}
    of = {"bf16": "BFLOAT16", "fp16": "FLOAT16", "fp32": "FLOAT32"}
    for spec in quantized.weights:
        scheme = quantized.qtensors[spec.path].scheme
        kind, buffer = kinds[spec.path]
        assert names[kind] == of.get(scheme.format.name, scheme.format.name.upper()), spec.path
        assert len(model.buffers[buffer].data) == -(-spec.size * scheme.format.bits // 8), spec.path
    assert {d["name"] for d in interpreter.get_tensor_details()} >= {spec.path for spec in quantized.weights}


@pytest.mark.parametrize("name", [*DECODERS, "bert", *VISION])
def test_every_kind_of_family(name, tmp_path):
    model = made(name, tmp_path / "model")
    quantized = exported(model, SCHEMES, tmp_path / "orbax", refusal)
    size = save(tmp_path / "model.tflite", quantized, name, window=None if name in VISION else 10)
    assert size == (tmp_path / "model.tflite").stat().st_size
    assert size == size_bytes(quantized, name, window=None if name in VISION else 10)
    inputs = some_inputs(model, 3, 10)
    want = np.asarray(jax.jit(model.apply)(quantized.dequantized(), inputs))
    # The same float32 weights, in sums of another order and with functions of a few ulp: 2^-22 of the largest value in
    # each of about two hundred steps.
    close = lambda got, want: np.testing.assert_allclose(got, want, atol=200 * 2.0**-22 * np.abs(want).max())
    close(run(tmp_path / "model.tflite", inputs), want)
    close(run(tmp_path / "model.tflite", inputs[:1], OpResolverType.BUILTIN_REF), want[:1])
    require_equal(load_codes(tmp_path / "model.tflite"), quantized)
    require_bits_of_the_plan(tmp_path / "model.tflite", quantized)


def test_the_reference_model_on_held_out_text(root, tmp_path, capsys):
    model = load("reference")
    schemes = ("int4_g32", "int8_channel", "int2_g16", "int8_g64_zp", "int4_channel_zp")
    quantized = exported(
        model, schemes, tmp_path / "q", refusal, Candidates(model.params, model.trace(1, 16).weights, RTN()).qtensor
    )
    arguments = ("--to", "litert", "--window", 504, "-o", tmp_path / "model.tflite", "--json")
    assert exit_code("export", tmp_path / "q", *arguments) == 0
    assert finished_bars(capsys.readouterr().err)["export litert"] > len(quantized.weights)
    text = (root / "mpq/assets/reference_lm/text/test.txt").read_text()
    tokens = np.asarray(model.tokenizer.encode(text[:40_000]).ids[: 8 * 504], np.int32).reshape(8, 504)
    want = np.asarray(jax.jit(model.apply)(quantized.dequantized(), tokens))
    got = run(tmp_path / "model.tflite", tokens)
    assert kl_and_agreement(want, got)[0] < 1e-7
    assert (want.argmax(-1) == got.argmax(-1)).mean() >= 0.999
    require_bits_of_the_plan(tmp_path / "model.tflite", quantized)


def rounded(model: Model, scheme: str, inputs: np.ndarray, trace=(1, 16)) -> list[RoundedActivation]:
    """Every input of a weight, its static range that of the largest values seen."""
    of, rows = parse_activation_scheme(scheme), activation_rows(model.trace(*trace))
    if of.static is None:
        return [RoundedActivation(row, of) for row in rows]
    seen: dict[str, tuple[float, float]] = {}
    by = {row.at: row.path for row in rows}

    def look(site, x, w, default):
        if site.use.input in by:
            seen[by[site.use.input]] = float(x.min()), float(x.max())
        return default(x, w)

    model.trace(*trace).evaluate(model.params, jnp.asarray(inputs), look)
    return [RoundedActivation(row, of, (seen[row.path][0],), (seen[row.path][1],)) for row in rows]


def test_inputs_that_are_rounded_as_they_come(root, tmp_path):
    """4,032 tokens.

    As in ONNX Runtime, last bits decide between codes: the model in JAX with its weights changed by half their last bit
    names another token about as often, so that 99.9 % of the first choices is out of reach of any runtime.
    """
    model = load("reference")
    rows = rounded(model, "int8_token_asym", np.zeros(0))
    rtn = Candidates(model.params, model.trace(1, 16).weights, RTN())
    schemes = ("int8_channel", "int4_g32")
    quantized = exported(model, schemes, tmp_path / "orbax", refusal, rtn.qtensor, rows)
    size = save(tmp_path / "model.tflite", quantized, "x", window=504)
    assert size == (tmp_path / "model.tflite").stat().st_size == size_bytes(quantized, "x", window=504)
    text = (root / "mpq/assets/reference_lm/text/test.txt").read_text()
    tokens = np.asarray(model.tokenizer.encode(text[:40_000]).ids[: 8 * 504], np.int32).reshape(8, 504)
    apply = jax.jit(with_activations(model, model.trace(1, 16), rows).apply)
    params = quantized.dequantized()
    want, plain = np.asarray(apply(params, tokens)), np.asarray(jax.jit(model.apply)(params, tokens))
    got = run(tmp_path / "model.tflite", tokens)
    kl, agreement = kl_and_agreement(want, got)
    floor, same = kl_and_agreement(want, within_last_bits(apply, params, tokens))
    assert kl < 1e-3
    assert kl < 2 * floor
    assert 1 - agreement < 2 * (1 - same)
    assert kl_and_agreement(plain, got)[0] > 1e-4  # inputs are rounded
    require_equal(load_codes(tmp_path / "model.tflite"), quantized)


def turned(quantized: Exported) -> Exported:
    """Every other channel with a scale and codes of the opposite sign: the same weights, but for lowest codes."""
    made = {}
    for path, q in quantized.qtensors.items():
        sign = jnp.where(jnp.arange(q.qvalue.shape[-1]) % 2, -1, 1).astype(jnp.int8)
        codes = jnp.maximum(q.qvalue, q.scheme.format.min_qvalue + 1) * sign
        made[path] = dataclasses.replace(q, qvalue=codes, scale=q.scale * sign.astype(q.scale.dtype))
    return dataclasses.replace(quantized, qtensors=made)


def test_scales_of_either_sign(tmp_path):
    model = load(str(tiny.write_folder(tmp_path / "model", tiny.CONFIG | {"tie_word_embeddings": False})))
    rows = rounded(model, "int8_token_asym", np.zeros(0))
    quantized = turned(exported(model, ("int8_channel", "int4_g32"), tmp_path / "orbax", refusal, activations=rows))
    save(tmp_path / "model.tflite", quantized, "x")
    inputs = some_inputs(model, 4, 64)
    want = np.asarray(jax.jit(model.apply)(quantized.dequantized(), inputs))
    kl, _ = kl_and_agreement(want, run(tmp_path / "model.tflite", inputs))
    assert 1e-4 < kl < 1e-2  # inputs of 8 bits, and nothing worse
    require_equal(load_codes(tmp_path / "model.tflite"), quantized)
    require_bits_of_the_plan(tmp_path / "model.tflite", quantized)


@pytest.mark.parametrize("name", ["resnet_cifar", "mobilenet_v2"])
def test_static_ranges(name, tmp_path):
    """1,000 images of noise, random networks, codes and scales of either sign; `test_images` has real ones.

    Random models name one class for all images: the mean of each class is taken off before first choices are compared.
    """
    model = made(name, tmp_path / "model")
    inputs = some_inputs(model, 1000, 0)
    # Pixels of -1 to 1, in 255 steps of that, would each be in the middle of two codes.
    widened = lambda ends: tuple(1.01 * end for end in ends)
    rows = rounded(model, "int8_tensor_static_asym", inputs[:256], trace=(256,))
    rows = [dataclasses.replace(row, low=widened(row.low), high=widened(row.high)) for row in rows]
    make = noise(model)
    quantized = exported(model, ("int8_channel", "int4_channel"), tmp_path / "orbax", refusal, make, rows, trace=(256,))
    quantized = turned(quantized)
    assert save(tmp_path / "model.tflite", quantized, name) == size_bytes(quantized, name)
    params = with_whole_biases(quantized, name).dequantized()
    want = np.asarray(jax.jit(with_activations(model, model.trace(256), rows).apply)(params, inputs))
    plain = np.asarray(jax.jit(model.apply)(params, inputs))
    got, mean = run(tmp_path / "model.tflite", inputs), want.mean(0)
    assert kl_and_agreement(want, got)[0] < 1e-3
    assert (want.argmax(-1) == got.argmax(-1)).mean() >= 0.999
    kl, agreement = kl_and_agreement(want - mean, got - mean)
    plan_kl, plan_agreement = kl_and_agreement(want - mean, plain - mean)
    assert kl < 0.05 * plan_kl  # last bits that decide between codes, of what the rounding of the plan changes
    assert 1 - agreement < 0.05 * (1 - plan_agreement)
    require_equal(load_codes(tmp_path / "model.tflite"), quantized)
    require_bits_of_the_plan(tmp_path / "model.tflite", quantized)
    size = save(tmp_path / "integer.tflite", quantized, name, integer=True)
    assert size == (tmp_path / "integer.tflite").stat().st_size == size_bytes(quantized, name, integer=True)
    require_equal(load_codes(tmp_path / "integer.tflite"), quantized)
    assert kl_and_agreement(want, run(tmp_path / "integer.tflite", inputs))[0] < 1e-2


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    model = load(str(tiny.write_folder(folder / "model")))
    return model, exported(model, ("int4_g16", "int8_channel"), folder / "orbax", refusal)


def test_sizes_are_known_for_random_plans_and_equal_models_give_equal_bytes(small, tmp_path):
    model, quantized = small
    rng, make = np.random.default_rng(0), noise(model)
    schemes = [parse_scheme(s) for s in ("int4_g16", "int8_channel", "bf16", "fp32", "int2_g8_zp")]
    for trial in range(5):
        qtensors = {w.path: make(w, schemes[rng.integers(len(schemes))]) for w in quantized.weights}
        plan = dataclasses.replace(quantized, qtensors=qtensors)
        assert save(tmp_path / "a", plan, "n" * 50 * trial) == size_bytes(plan, "n" * 50 * trial)
    save(tmp_path / "b", plan, "n" * 50 * trial)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_zero_points_of_rows_are_written_once_for_all_weights_of_so_many_rows(small, tmp_path):
    model, quantized = small
    make, scheme = noise(model), parse_scheme("int8_channel")
    plan = dataclasses.replace(quantized, qtensors={w.path: make(w, scheme) for w in quantized.weights})
    save(tmp_path / "a", plan, "x")
    root = graph.require_litert().Model.GetRootAs((tmp_path / "a").read_bytes(), 0)
    lies, weights = {}, {w.path: w for w in plan.weights}
    for number in range(root.Subgraphs(0).TensorsLength()):
        tensor = root.Subgraphs(0).Tensors(number)
        if (path := tensor.Name().decode()) in weights:
            vectors = tensor.Quantization().ZeroPointAsNumpy(), tensor.Quantization().ScaleAsNumpy()
            np.testing.assert_array_equal(vectors[0], np.zeros(weights[path].n))
            np.testing.assert_array_equal(vectors[1], np.asarray(plan.qtensors[path].scale, np.float32).reshape(-1))
            lies[path] = tuple(vector.__array_interface__["data"][0] for vector in vectors)
    assert lies.keys() == weights.keys()
    assert len({zeros for zeros, _ in lies.values()}) == len({w.n for w in weights.values()}) < len(weights)
    assert len({scales for _, scales in lies.values()}) == len(weights)


class TestWhatCannotBeWritten:
    def test_a_scheme(self, small, tmp_path):
        model, quantized = small
        path = "layers.0.mlp.up_proj.kernel"
        three = RTN()(model.params[path][None], parse_scheme("int3_g16"))
        plan = dataclasses.replace(quantized, qtensors=quantized.qtensors | {path: three})
        message = f"weight {path} at int3_g16 has no form in litert: it takes int2, int4 and int8; choose another plan"
        assert message_of(lambda: save(tmp_path / "x", plan, "x")) == message
        assert not list(tmp_path.iterdir())

    def test_an_operation(self, small, tmp_path, monkeypatch):
        monkeypatch.setattr("mpq.litert.convert.OPS", {})
        message = message_of(lambda: save(tmp_path / "x", small[1], "x"))
        assert message.endswith("has no form in LiteRT here: export this model to another runtime")
        assert not list(tmp_path.iterdir())

    def test_more_than_one_file_holds(self, small, monkeypatch, tmp_path):
        monkeypatch.setattr(graph, "LIMIT", 1000)
        size = size_bytes(small[1], "x")
        message = f"the LiteRT file would have {size} bytes, and one holds 1000: choose a smaller plan"
        assert message_of(lambda: save(tmp_path / "x", small[1], "x")) == message
        assert not list(tmp_path.iterdir())

    def test_a_window_that_the_model_does_not_read(self, small, tmp_path):
        message = "a window of 65 tokens: the model reads 2 to 64"
        assert message_of(lambda: save(tmp_path / "x", small[1], "x", window=65)) == message

    def test_what_depends_on_the_batch_otherwise(self, small):
        model = dataclasses.replace(small[0], apply=lambda params, x: x.reshape(-1, 3))
        message = (
            "the model computes otherwise for other batches, which one graph cannot: Cannot divide evenly the sizes of "
            "shapes (batch, 64) and (-1, 3)"
        )
        assert message_of(lambda: traced(model, None)) == message

    @pytest.mark.parametrize(
        ("scheme", "weights", "reason"),
        [
            (
                "int8_token",
                "int8_channel",
                "as they come inputs are rounded by int8_token_asym there, those of convolutions by int8_tensor_asym",
            ),
            ("int8_token_asym", "int8_g16", "it multiplies no codes of {first} at int8_g16"),
            ("int4_tensor_static", "int8_channel", "static ranges are of whole tensors in 8 bits"),
        ],
    )
    def test_an_activation(self, small, tmp_path, scheme, weights, reason):
        model = small[0]
        rows = rounded(model, scheme, some_inputs(model, 1, 16))[:1]
        plan = exported(model, (weights,), tmp_path / "orbax", refusal, activations=rows)
        message = (
            f"activation {rows[0].spec.path} at {scheme} has no form in litert: "
            f"{reason.format(first=rows[0].spec.weights[0])}; quantize with the plan of the weights alone, or another"
        )
        assert message_of(lambda: save(tmp_path / "x", plan, "x")) == message
        assert not (tmp_path / "x").exists()

    def test_a_tensor_of_many_tokens_that_is_rounded_as_it_comes(self, small, tmp_path):
        rows = rounded(small[0], "int8_tensor_asym", np.zeros(0))[:1]
        plan = exported(small[0], ("int8_channel",), tmp_path / "orbax", refusal, activations=rows)
        message = (
            f"the input of {rows[0].spec.weights[0]} is rounded token by token in LiteRT: quantize with int8_token_asym"
        )
        assert message_of(lambda: save(tmp_path / "x", plan, "x")) == message

    def test_a_cache_and_factors(self, small, tmp_path):
        model = small[0]
        (row, *_) = kv_rows(model.trace(1, 16))
        cache = RoundedActivation(row, parse_activation_scheme("int8_head"))
        (first, *_) = activation_rows(model.trace(1, 16))
        divided = RoundedActivation(first, parse_activation_scheme("int8_token_asym"), smooth=(1.0,) * first.width)
        for i, (one, reason) in enumerate(
            ((cache, "it keeps no KV cache"), (divided, "it divides inputs by no factors"))
        ):
            plan = exported(model, ("int8_channel",), tmp_path / f"orbax{i}", refusal, activations=[one])
            message = (
                f"activation {one.spec.path} at {one.scheme} has no form in litert: {reason}; quantize with the plan "
                "of the weights alone, or another"
            )
            assert message_of(lambda plan=plan: save(tmp_path / "x", plan, "x")) == message

    def test_an_option_of_another_format(self, small, tmp_path, capsys):
        exported(small[0], ("int8_channel",), tmp_path / "orbax", refusal)
        assert exit_code("export", tmp_path / "orbax", "--to", "onnx", "--window", 64, "-o", tmp_path / "x") == 2
        assert "format onnx has no option --window: leave it out" in " ".join(capsys.readouterr().err.split())

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "x").write_bytes(b"nothing at all")
        message = f"{tmp_path / 'x'} is no LiteRT file that `mpq export --to litert` wrote: ValueError"
        assert message_of(lambda: load_codes(tmp_path / "x")) == message
