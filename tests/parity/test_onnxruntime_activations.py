"""Rounded activations in ONNX Runtime against the same model in JAX, and which products are of integers."""

import jax
import numpy as np
import pytest

from mpq.activations import parse_activation_scheme
from mpq.activations.apply import RoundedActivation
from mpq.activations.plans import rows_of
from mpq.models import load
from mpq.onnx.activations import Activations
from mpq.onnx.export import load as load_codes
from mpq.onnx.export import save, size_bytes
from mpq.onnx.graph import Graph, Tensor, require_onnx
from tests import tiny
from tests.command import exit_code
from tests.parity.test_onnxruntime import exported, optimized, run
from tests.runtime_cases import (
    kl_and_agreement,
    made,
    message_of,
    noise,
    require_equal,
    rounded_rows,
    some_inputs,
    within_last_bits,
)

pytestmark = pytest.mark.parity

CASES = {
    "llama by token": ("llama", "int8_channel", "int8_token"),
    "llama of 4 bits in groups, by token, with zero points": ("llama", "int4_g16", "int4_token_asym"),
    "gemma2, smoothed, static with zero points": ("gemma2", "int4_channel_zp", "int8_tensor_static_asym"),
    "gpt_neox with biases, by token": ("gpt_neox", "int8_channel_zp", "int8_token"),
    "experts by token": ("qwen2_moe", "int8_channel", "int8_token"),
    "bert of 6 bits, static": ("bert", "int8_tensor_zp", "int6_tensor_static"),
    "resnet, static": ("resnet", "int8_channel", "int8_tensor_static"),
    "mobilenet_v2 by image": ("mobilenet_v2", "int8_channel", "int8_tensor"),
    "vit by image": ("vit", "int8_tensor", "int8_tensor"),
    "resnet by position": ("resnet_cifar", "int8_channel_zp", "int5_token"),
}
INTEGER = {
    "llama by token": {"MatMulInteger"},
    "gemma2, smoothed, static with zero points": {"MatMulIntegerToFloat"},
    "gpt_neox with biases, by token": {"MatMulInteger"},
    "experts by token": {"MatMulInteger"},
    "bert of 6 bits, static": {"MatMulIntegerToFloat"},
    "resnet, static": {"ConvInteger"},
    "mobilenet_v2 by image": {"ConvInteger", "MatMulInteger"},
    "vit by image": {"ConvInteger", "MatMulInteger"},
}
"""Operations on integers of the graph that ONNX Runtime makes of the file."""


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_rounding(case, tmp_path):
    name, weights, activations = CASES[case]
    model = made(name, tmp_path / "model")
    rows = rounded_rows(model, activations, "smoothed" in case)
    quantized = exported(model, (weights, "fp16"), tmp_path / "orbax", noise(model), rows)
    size = save(tmp_path / "model.onnx", quantized, name)
    assert size == (tmp_path / "model.onnx").stat().st_size == size_bytes(quantized, name)
    require_equal(load_codes(tmp_path / "model.onnx"), quantized)
    found = optimized(tmp_path / "model.onnx", tmp_path)
    assert {node.op_type for node in found if "Integer" in node.op_type} == INTEGER.get(case, set())
    inputs = some_inputs(model, 3, 10)
    want = np.asarray(jax.jit(load(str(tmp_path / "orbax")).apply)(quantized.dequantized(), inputs))
    got = run(tmp_path / "model.onnx", inputs)
    # As without rounding; no value lies so close to the middle of two codes that sums of another order would decide.
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_the_reference_model_at_w8a8_on_held_out_text(root, tmp_path):
    """4,032 tokens.

    A last bit decides between two codes now and then, and layer after layer turns that into another draw of the
    rounding errors: the model in JAX with its weights changed by half their last bit is that far from itself. The file
    must not be further than that, give or take the spread of such draws.
    """
    assert exit_code("quantize", "reference", "w8a8", "--method", "rtn", "-o", tmp_path / "q") == 0
    assert exit_code("export", tmp_path / "q", "--to", "onnx", "-o", tmp_path / "model.onnx") == 0
    model = load(str(tmp_path / "q"))
    text = (root / "mpq/assets/reference_lm/text/test.txt").read_text()
    tokens = np.asarray(model.tokenizer.encode(text[:40_000]).ids[: 8 * 504], np.int32).reshape(8, 504)
    apply = jax.jit(model.apply)
    want = np.asarray(apply(model.params, tokens))
    floor, same = kl_and_agreement(want, within_last_bits(apply, model.params, tokens))
    kl, agreement = kl_and_agreement(want, run(tmp_path / "model.onnx", tokens))
    assert kl < 1e-3
    assert kl < 2 * floor
    assert 1 - agreement < 2 * (1 - same)


class TestWhatCannotBeRounded:
    def message(self, folder, of: str, scheme: str) -> str:
        model = load(str(tiny.write_folder(folder / "model")))
        row = RoundedActivation(rows_of(of, model.trace(2, 16))[0], parse_activation_scheme(scheme))
        quantized = exported(model, ("fp16",), folder / "q", noise(model), (row,))
        message = message_of(lambda: save(folder / "x", quantized, "x"))
        assert not (folder / "x").exists()
        return message

    def test_the_cache(self, tmp_path):
        assert self.message(tmp_path, "kv", "int8_head") == (
            "layers.0.self_attn.k_proj.kernel at int8_head has no form in onnx: the graph keeps no KV cache; choose "
            "another plan"
        )

    def test_a_range_of_a_batch_of_texts(self, tmp_path):
        assert self.message(tmp_path, "activations", "int8_tensor") == (
            "layers.0.self_attn.{q,k,v}_proj.kernel at int8_tensor has no form in onnx: a range would be that of a "
            "whole batch of texts, padding too; choose another plan"
        )

    def test_windows_that_are_not_the_first_axis(self, tmp_path):
        model = load(str(tiny.write_folder(tmp_path / "model")))
        row = RoundedActivation(rows_of("activations", model.trace(2, 16))[0], parse_activation_scheme("int8_tensor"))
        activations = Activations(Graph(require_onnx()), [row], "batch")
        message = (
            "layers.0.self_attn.{q,k,v}_proj.kernel at int8_tensor has no form in onnx: windows are not its first "
            "axis; use int8_token, or int8_tensor_static"
        )
        assert message_of(lambda: activations.rounded(row, Tensor("x", (6, 32), "float32"), (1,))) == message
