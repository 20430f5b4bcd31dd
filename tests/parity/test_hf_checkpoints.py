"""Exported folders in stock transformers, and their tensors against compressed-tensors and bitsandbytes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpq import artifacts
from mpq.activations import activation_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.plans import calibrated, uniform_rows
from mpq.data.dataset import new_dataset
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.hf.containers import CONTAINERS
from mpq.hf.export import save
from mpq.models import Model, load
from mpq.quantize import RTN, Candidates
from tests.runtime_cases import within_last_bits

pytestmark = pytest.mark.parity

WINDOW, WINDOWS = 504, 8


@pytest.fixture(scope="module")
def reference() -> Model:
    return load("reference")


@pytest.fixture(scope="module")
def tokens(reference, root) -> np.ndarray:
    """Held-out text, `int32[windows, time]`: 4,032 tokens."""
    text = (root / "mpq/assets/reference_lm/text/test.txt").read_text()
    ids = reference.tokenizer.encode(text[:40_000]).ids[: WINDOW * WINDOWS]
    return np.asarray(ids, np.int32).reshape(WINDOWS, WINDOW)


@pytest.fixture(scope="module")
def apply(reference):
    return jax.jit(reference.apply)


def exported(model: Model, schemes: tuple[str, ...], folder, embedding: str) -> Exported:
    """The model with its linear layers at these schemes in turn."""
    weights = model.trace(1, 16).weights
    choice = {w.path: parse_scheme(schemes[i % len(schemes)]) for i, w in enumerate(weights)}
    choice["embed_tokens.embedding"] = parse_scheme(embedding)
    plan = artifacts.make_plan("mix", choice, None, weights, 0, model.digest)
    orbax.save(
        folder, **export_arguments(model, weights, Candidates(model.params, weights, RTN()).choose(choice), plan)
    )
    return orbax.load(folder)


def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens).long()).logits.float().numpy()


def compare(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Mean KL in nats a token, and how often the first choice is the same."""
    p, q = (jax.nn.log_softmax(jnp.asarray(z, jnp.float32)) for z in (ours, theirs))
    kl = float((jnp.exp(p) * (p - q)).sum(-1).mean())
    return kl, float((ours.argmax(-1) == theirs.argmax(-1)).mean())


def test_a_mixed_plan_in_stock_transformers(reference, tokens, apply, tmp_path):
    schemes = ("int4_g32", "int8_channel", "int3_g64", "int2_g16", "int6_g128", "bf16", "int5_tensor")
    model = exported(reference, schemes, tmp_path / "orbax", "bf16")
    save(tmp_path / "hf", model, CONTAINERS["hf"])
    want = np.asarray(apply(model.dequantized(), tokens))
    # The same float32 weights: only the order of sums differs.
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32), tokens)
    kl, agreement = compare(want, got)
    assert kl < 1e-7
    assert agreement >= 0.999
    # As the config says: float16 throughout.
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert stock.dtype == torch.float16
    kl, _ = compare(want[:2], logits(stock, tokens[:2]))
    assert kl < 1e-4
    text = "def f(x):\n    return x + 1\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids == reference.tokenizer.encode(text).ids


def test_zero_points_in_stock_transformers(reference, tokens, apply, tmp_path):
    """Of one scheme for all: then the config has them dequantized as they are loaded."""
    model = exported(reference, ("int4_g32_zp_sfloat32",), tmp_path / "orbax", "fp32")
    save(tmp_path / "hf", model, CONTAINERS["hf"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    kl, agreement = compare(np.asarray(apply(model.dequantized(), tokens)), logits(stock, tokens))
    assert kl < 1e-7
    assert agreement >= 0.999


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory):
    """Container -> exported folder, and the model that it is of."""
    plans = {
        "hf": (("int4_g32_zp", "int8_channel_zp", "int3_g16_zp", "int5_g64", "int7_tensor", "int2_g16_zp"), "fp16"),
        "awq": (("int4_g32_zp",), "fp16"),
        "bnb": (("nf4_g64_sfloat32",), "fp32"),
    }
    made = {}
    for name, (schemes, embedding) in plans.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder / "out", exported(reference, schemes, folder / "orbax", embedding)
        save(*made[name], CONTAINERS[name])
    return made


def modules_of(folder, model: Exported):
    """Module name, its tensors and its quantized weight."""
    tensors = load_file(folder / "model.safetensors")
    for path, q in model.qtensors.items():
        if q.scheme.has_scale:
            module = "model." + path.removesuffix(".kernel")
            yield module, {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}, q


def test_compressed_tensors_decompresses_and_compresses_to_the_same_bits(folders):
    folder, model = folders["hf"]
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    found = {(g["weights"]["num_bits"], g["weights"].get("group_size"), g["weights"]["symmetric"]): g for g in groups}
    for module, tensors, q in modules_of(folder, model):
        group = found[q.scheme.format.bits, q.scheme.group_size, not q.scheme.zero_point]
        scheme = QuantizationScheme(**group)
        single = dict(tensors, weight_scale=tensors["weight_scale"].float())
        plain = PackedQuantizationCompressor.decompress(single, scheme)
        np.testing.assert_array_equal(plain["weight"].numpy().T, np.asarray(q.dequantize())[0], err_msg=module)
        again = PackedQuantizationCompressor.compress(plain, scheme)
        for name in ("weight_packed", "weight_zero_point"):
            assert name not in tensors or torch.equal(again[name], tensors[name]), (module, name)


def test_awq_is_unpacked_alike(folders):
    folder, model = folders["awq"]
    for module, tensors, q in modules_of(folder, model):
        codes, zeros = AutoAWQConverter.unpack_awq(tensors["qweight"], tensors["qzeros"], 4)
        codes, zeros = AutoAWQConverter.reverse_awq_order(codes, zeros, 4)
        np.testing.assert_array_equal((codes & 15).numpy() - 8, np.asarray(q.qvalue)[0], err_msg=module)
        np.testing.assert_array_equal((zeros & 15).numpy() - 8, np.asarray(q.zero_point)[0], err_msg=module)
        np.testing.assert_array_equal(tensors["scales"].numpy(), np.asarray(q.scale)[0], err_msg=module)


def test_nf4_is_that_of_bitsandbytes(reference, folders, tokens, apply):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder, model = folders["bnb"]
    for module, tensors, q in modules_of(folder, model):
        path = module.removeprefix("model.") + ".kernel"
        w = torch.from_numpy(np.asarray(reference.params[path]).T.copy())
        packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
        theirs = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
        assert theirs.keys() == tensors.keys()
        for name in theirs:
            assert torch.equal(theirs[name], tensors[name]), (module, name)
        same = torch.from_numpy(np.asarray(q.dequantize())[0].T.copy())
        assert torch.equal(bnb.functional.dequantize_4bit(tensors["weight"], state), same)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    # On processors with bfloat16 of their own bitsandbytes multiplies in it: inputs keep 8 bits.
    kl, _ = compare(np.asarray(apply(model.dequantized(), tokens)), logits(stock, tokens))
    assert kl < 1e-4


def rounded(model: Exported, reference: Model, scheme: str) -> Exported:
    """The same with the inputs of its int8 layers rounded."""
    int8 = lambda path: model.qtensors[path].scheme.format.name == "int8"
    rows = [row for row in activation_rows(reference.trace(1, 16)) if all(map(int8, row.weights))]
    chosen = [RoundedActivation(row, parse_activation_scheme(scheme)) for row in rows]
    plan = model.plan | {"activations": {one.spec.path: one.to_json() for one in chosen}}
    return dataclasses.replace(model, plan=plan)


def in_jax(reference: Model, model: Exported, tokens: np.ndarray) -> np.ndarray:
    """Logits with the activations that its plan rounds."""
    chosen = [RoundedActivation.from_json(row) for row in model.plan["activations"].values()]
    simulated = with_activations(reference, reference.trace(*tokens.shape), chosen)
    return np.asarray(jax.jit(simulated.apply)(model.dequantized(), tokens))


def test_w8a8_and_w4a16_in_stock_transformers(reference, tokens, apply, tmp_path):
    """Groups that read one input have one scheme: attention at int8, the rest at 4 bits."""
    weights = reference.trace(1, 16).weights
    at = lambda path: "int8_channel" if "self_attn" in path else "bf16" if "embed" in path else "int4_g32"
    choice = {w.path: parse_scheme(at(w.path)) for w in weights}
    plan = artifacts.make_plan("mix", choice, None, weights, 0, reference.digest)
    qtensors = Candidates(reference.params, weights, RTN()).choose(choice)
    orbax.save(tmp_path / "orbax", **export_arguments(reference, weights, qtensors, plan))
    model = rounded(orbax.load(tmp_path / "orbax"), reference, "int8_token")
    TARGETS["hf"].save(tmp_path / "hf", model, "x")
    body = json.loads((tmp_path / "hf/config.json").read_text())["quantization_config"]
    assert body["format"] == "mixed-precision"
    (scheme,) = (g for g in body["config_groups"].values() if g["format"] == "int-quantized")
    integers = 0
    for _, tensors, q in modules_of(tmp_path / "hf", model):
        if q.scheme.format.bits == 8:
            plain = IntQuantizationCompressor.decompress(tensors, QuantizationScheme(**scheme))["weight"]
            np.testing.assert_array_equal(plain.float().numpy().T, np.asarray(q.dequantize())[0].astype(np.float16))
            integers += 1
    assert integers == 24
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs, ours = logits(stock, tokens), in_jax(reference, model, tokens)
    # Steps are the largest value over 127.5 there and over 127 here, so codes differ: what rounding costs does not.
    plain = np.asarray(apply(model.dequantized(), tokens))
    cost = compare(plain, ours)[0]
    assert cost > 1e-5
    assert abs(compare(plain, theirs)[0] - cost) < 0.1 * cost


def require_steps(stock: torch.nn.Module, chosen) -> None:
    """Scales, zero points and what they make of values within the range, layer by layer."""
    x = np.random.default_rng(0).normal(size=(1, 500, 256)).astype(np.float32)
    for one in chosen:
        for path in one.spec.weights:
            layer = stock.get_submodule("model." + path.removesuffix(".kernel"))
            zero = getattr(layer, "input_zero_point", None)
            assert (float(layer.input_scale.detach()), 0 if zero is None else int(zero) + 128) == one.step
            how = layer.quantization_scheme.input_activations
            inside = np.clip(x, -1, 1) * np.float32(min(one.high[0], max(-one.low[0], 0.01)))
            theirs = fake_quantize(torch.from_numpy(inside), layer.input_scale, zero, how).numpy()
            ours = np.asarray(dataclasses.replace(one, spec=dataclasses.replace(one.spec, width=256))(inside, 1))
            # x / step is rounded before the zero point is added there, and after that here: a tie may go either way.
            np.testing.assert_allclose(theirs, ours, atol=1.001 * one.step[0])
            assert (np.abs(theirs - ours) > 0.5 * one.step[0]).mean() < 1e-4


@pytest.mark.parametrize("scheme", ["int8_tensor_static_absmax", "int8_tensor_static_absmax_asym"])
def test_static_w8a8_in_stock_transformers(reference, tokens, apply, tmp_path, scheme):
    """Ranges of these very tokens, so that nothing is clipped, and -128 is no code, as it is none of ours."""
    traced = reference.trace(*tokens.shape)
    choice = {w.path: parse_scheme("bf16" if "embed" in w.path else "int8_channel") for w in traced.weights}
    rows = uniform_rows(traced, scheme, None)
    rows = {path: row for path, row in rows.items() if not any("embed" in weight for weight in row["weights"])}
    data = new_dataset(tokens, np.ones(tokens.shape, bool), np.arange(len(tokens)), "text")
    chosen, _ = calibrated(rows, reference, traced, data, None, len(tokens))
    activations = {one.spec.path: one.to_json() for one in chosen}
    plan = artifacts.make_plan("static", choice, None, traced.weights, 0, reference.digest, activations)
    qtensors = Candidates(reference.params, traced.weights, RTN()).choose(choice)
    orbax.save(tmp_path / "orbax", **export_arguments(reference, traced.weights, qtensors, plan, chosen))
    model = orbax.load(tmp_path / "orbax")
    TARGETS["hf"].save(tmp_path / "hf", model, "x")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)

    require_steps(stock, chosen)
    theirs, simulated = logits(stock, tokens), jax.jit(with_activations(reference, traced, chosen).apply)
    params = model.dequantized()
    ours, plain = np.asarray(simulated(params, tokens)), np.asarray(apply(params, tokens))
    # A last bit decides between two codes now and then: the model in JAX is about as far from itself.
    floor, same = compare(ours, within_last_bits(simulated, params, tokens))
    kl, agreement = compare(ours, theirs)
    assert kl < 2 * floor
    assert 1 - agreement < 2 * (1 - same)
    cost = compare(plain, ours)[0]
    assert cost > 2 * floor
    assert abs(compare(plain, theirs)[0] - cost) < 0.1 * cost


def test_llm_int8_is_that_of_bitsandbytes(reference, tokens, apply, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = exported(reference, ("int8_channel",), tmp_path / "orbax", "fp32")
    want, original = (np.asarray(apply(params, tokens)) for params in (model.dequantized(), reference.params))
    # Where nearly all features are outliers the layers multiply floats by the weights as they are dequantized.
    TARGETS["llm_int8"].save(tmp_path / "float", rounded(model, reference, "int8_token_outlier0.0001"), "x")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    count = 0
    for module, tensors, q in modules_of(tmp_path / "float", model):
        layer = stock.get_submodule(module)
        theirs = layer.state_dict()
        assert isinstance(layer, bnb.nn.Linear8bitLt)
        assert theirs.keys() == tensors.keys()
        for name in theirs:
            assert theirs[name].dtype == tensors[name].dtype
            assert torch.equal(theirs[name], tensors[name]), (module, name)
        plain = bnb.functional.int8_vectorwise_dequant(theirs["weight"], theirs["SCB"]).numpy().T
        np.testing.assert_allclose(plain, np.asarray(q.dequantize())[0], rtol=3e-7)  # roundings of float32
        count += 1
    assert count == 42
    kl, agreement = compare(want, logits(stock, tokens))
    assert kl < 1e-7
    assert agreement >= 0.999
    # With outliers from 6 on, inputs are rounded by scales that differ in the last bits, and codes next to a half with
    # them: the same loss, not the same logits.
    inside = rounded(model, reference, "int8_token_outlier6")
    TARGETS["llm_int8"].save(tmp_path / "integer", inside, "x")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "integer")
    theirs, _ = compare(original, np.concatenate([logits(stock, window[None]) for window in tokens]))
    ours, _ = compare(original, in_jax(reference, inside, tokens))
    weights_alone, _ = compare(original, want)
    assert 2 * weights_alone < ours
    assert abs(theirs - ours) < 0.1 * ours


def test_layers_that_bitsandbytes_rounds_are_read_as_they_are(reference, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    w = torch.from_numpy(np.asarray(reference.params["layers.0.mlp.up_proj.kernel"]).T.copy())
    layer = bnb.nn.Linear8bitLt(*w.shape[::-1], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": w})
    parts = {name: part.numpy() for name, part in layer.to("cpu").state_dict().items()}
    q = CONTAINERS["bnb"].reader({"load_in_8bit": True}).unpack("up_proj", parts)
    plain = bnb.functional.int8_vectorwise_dequant(*(torch.from_numpy(parts[name]) for name in ("weight", "SCB")))
    np.testing.assert_array_equal(np.asarray(q.qvalue)[0].T, parts["weight"])
    np.testing.assert_allclose(np.asarray(q.dequantize())[0].T, plain.numpy(), rtol=3e-7)  # roundings of float32
