"""Reading checkpoints: strict names, shapes and config keys, one sentence for each fault."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpq.models import load
from mpq.types import MpqError
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.write_folder(tmp_path / "model")


def rewrite(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))


def rewrite_tensors(folder, change):
    weights = tiny.tensors()
    change(weights)
    save_file(weights, folder / "model.safetensors")


def numpy_llama(weights, config, tokens):
    """Forward pass in float64 NumPy, from the paper alone: the oracle of the architecture and of the name map."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    heads, kv_heads, d = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    head_dim, time = d // heads, len(tokens)
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * g
    angle = np.arange(time)[:, None] * config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * angle)  # rotation of the pair (i, i + head_dim / 2) as a complex number

    def rope(x):
        z = (x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]) * turn[:, None]
        return np.concatenate([z.real, z.imag], -1)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        p = lambda name, layer=layer: w[f"model.layers.{layer}.{name}.weight"]
        h = norm(x, p("input_layernorm"))
        q = rope((h @ p("self_attn.q_proj").T).reshape(time, heads, head_dim))
        k = rope((h @ p("self_attn.k_proj").T).reshape(time, kv_heads, head_dim))
        v = (h @ p("self_attn.v_proj").T).reshape(time, kv_heads, head_dim)
        out = []
        for head in range(heads):
            s = q[:, head] @ k[:, head * kv_heads // heads].T / np.sqrt(head_dim)
            s = np.where(np.tril(np.ones((time, time))) > 0, s, -np.inf)
            a = np.exp(s - s.max(-1, keepdims=True))
            out.append(a / a.sum(-1, keepdims=True) @ v[:, head * kv_heads // heads])
        x = x + np.concatenate(out, -1) @ p("self_attn.o_proj").T
        h = norm(x, p("post_attention_layernorm"))
        gate = h @ p("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_an_independent_float64_forward_pass(tmp_path, tied):
    config = {**tiny.CONFIG, "tie_word_embeddings": tied, "rope_theta": 500.0}
    weights = tiny.tensors(config, seed=3)
    model = load(str(tiny.write_folder(tmp_path / "m", config, weights)))
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], 24)
    got = np.asarray(model.apply(model.params, jnp.asarray(tokens[None])))[0]
    want = numpy_llama(weights, config, tokens)
    # float32 rounding through 2 blocks, relative to the size of the logits
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_parameters_by_path_and_stored_dtypes(folder):
    rewrite_tensors(folder, lambda w: w.update({k: v.astype(ml_dtypes.bfloat16) for k, v in w.items() if v.ndim == 2}))
    model = load(str(folder))
    assert model.params["layers.0.mlp.down_proj.kernel"].shape == (64, 32)
    assert model.params["layers.0.mlp.down_proj.kernel"].dtype == jnp.float32
    assert model.stored["layers.0.mlp.down_proj.kernel"] == "bfloat16"
    assert model.stored["norm.scale"] == "float32"
    values = sum(p.size for p in model.params.values())
    vectors = sum(p.size for p in model.params.values() if p.ndim == 1)
    assert model.num_parameters == values
    assert model.size_bytes == 2 * (values - vectors) + 4 * vectors


def test_a_sharded_checkpoint_equals_the_single_file(folder, tmp_path):
    names = sorted(tiny.tensors())
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / "model.safetensors").unlink()
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in ("model-0.safetensors", "model-1.safetensors"):
        save_file({n: v for n, v in tiny.tensors().items() if where[n] == shard}, sharded / shard)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert load(str(sharded)).digest == load(str(folder)).digest
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(MpqError, match=r"lacks the shard 'model-1\.safetensors'"):
        load(str(sharded))


def test_transformers_5_rope_parameters_are_read(folder):
    digest = load(str(folder)).apply
    rewrite(folder, rope_theta="DROP", rope_parameters={"rope_theta": 77.0, "rope_type": "default"})
    assert load(str(folder)).apply is not digest
    rewrite(folder, rope_parameters={"rope_theta": 77.0, "rope_type": "llama3"})
    with pytest.raises(MpqError, match="'rope_parameters' lacks 'factor'"):
        load(str(folder))
    rewrite(folder, rope_parameters={"rope_theta": 77.0, "factor": 8.0})
    with pytest.raises(MpqError, match=r"'rope_parameters' has \['factor'\]"):
        load(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
            "MambaForCausalLM.*supported is LlamaForCausalLM",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*supported is"),
        ({"hidden_act": "softmax"}, "'hidden_act' is 'softmax': supported is .*'silu'"),
        ({"attention_bias": True}, r"lacks the tensor 'model\.layers\.0\.self_attn\.k_proj\.bias'"),
        ({"rope_scaling": {"factor": 2}}, "'rope_scaling'"),
        ({"sliding_window": 128}, "'sliding_window' .value 128. is unknown"),
        ({"hidden_size": "DROP"}, "'hidden_size' is missing"),
        ({"vocab_size": "DROP"}, "'vocab_size' is missing"),
        ({"intermediate_size": 128}, "has shape .*config calls for"),
        ({"num_hidden_layers": 3}, "lacks the tensor 'model.layers.2"),
        ({"num_hidden_layers": 1}, "holds the tensor 'model.layers.1.*does not call for"),
        ({"tie_word_embeddings": False}, r"lacks the tensor 'lm_head\.weight'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(MpqError, match=message):
        load(str(folder))


def test_a_missing_tensor_is_named(folder):
    rewrite_tensors(folder, lambda w: w.pop("model.norm.weight"))
    with pytest.raises(MpqError, match=r"lacks the tensor 'model\.norm\.weight'"):
        load(str(folder))


def test_a_tensor_that_is_not_finite_is_named(folder):
    def poison(w):
        w["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan

    rewrite_tensors(folder, poison)
    with pytest.raises(MpqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight' holds NaN"):
        load(str(folder))


def test_an_integer_tensor_is_refused(folder):
    rewrite_tensors(folder, lambda w: w.update({"model.norm.weight": np.ones(32, np.int32)}))
    with pytest.raises(MpqError, match=r"'model\.norm\.weight' is I32: supported are float32, float16 and bfloat16"):
        load(str(folder))


def test_a_pickle_is_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MpqError, match=r"pickle and unsafe.*save_pretrained"):
        load(str(folder))


def test_a_folder_without_config_or_weights_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MpqError, match=r"config\.json"):
        load(str(tmp_path / "empty"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(MpqError, match=r"holds no model\.safetensors"):
        load(str(folder))


def test_a_damaged_tokenizer_is_refused_and_a_missing_one_is_not(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(MpqError, match="no tokenizer"):
        load(str(folder))
    (folder / "tokenizer.json").unlink()
    assert load(str(folder)).tokenizer is None


@pytest.mark.parametrize("name", ["stories260k", "tiny1m"])
def test_real_models_load(shared_data, name):
    model = load(str(shared_data / "models" / name))
    assert model.num_parameters == {"stories260k": 260_032, "tiny1m": 935_040}[name]
    assert model.inputs.bos == 1
