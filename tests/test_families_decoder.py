"""Decoder families: logits against float64 NumPy, what the trace finds in them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.inputs import Tokens
from mpq.models import FAMILIES, load
from mpq.models.decoders import ExpertsConfig, rope
from mpq.models.decoders.rope import Rope
from mpq.types import MpqError
from tests import checkpoint_folders as folders
from tests.decoder_cases import CASES, CONTEXT, EXPERTS, LAYERS, VOCAB, config_of, write
from tests.decoder_configs import PUBLISHED
from tests.decoder_oracle import numpy_logits

ATOL = 5e-5  # float32 against float64: measured up to 1.4e-5 with logits up to 11


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Name, model and tensors of a random checkpoint."""
    tensors = folders.random_tensors(CASES[request.param].shapes)
    return request.param, load(write(tmp_path / "model", request.param, tensors=tensors)), tensors


def test_logits_are_those_of_the_papers(case):
    name, model, tensors = case
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, CONTEXT), np.int32)
    got = np.asarray(jax.jit(model.apply)(model.params, tokens))
    want = np.stack([numpy_logits(config_of(name), tensors, row) for row in tokens])
    assert want.std() > 0.5
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)


def test_a_model_says_what_it_reads_and_means(case):
    _, model, _ = case
    assert model.inputs == Tokens(CONTEXT, bos=3)
    assert model.task.name == "causal_lm"


def test_the_trace_finds_every_matrix(case):
    """Nothing with two axes is left out but tables of positions, which are sliced, and groups are as expected."""
    name, model, _ = case
    expected = {}
    for i in range(LAYERS):
        for path, (batch, k, n, group) in CASES[name].weights.items():
            path = f"layers.{i}.{path}"
            members = "{" + group.replace("I", str(i)) + "}" if "," in group and "I" in group else f"layers.{i}.{group}"
            expected[path] = (batch, k, n, members if group else path)
    found = model.trace(window=8)
    weights = {w.path: (w.batch, w.k, w.n, w.group) for w in found.weights if w.path.startswith("layers.")}
    assert weights == expected
    ends = {w.path: w.kind for w in found.weights if not w.path.startswith("layers.")}
    assert set(ends) == set(CASES[name].ends)
    tied = "lm_head.kernel" not in CASES[name].ends
    assert ends["embed_tokens.embedding"] == ("embedding+matmul" if tied else "embedding")
    left = {s.path: s.reason for s in found.skipped if len(model.params[s.path].shape) > 1}
    assert left == dict.fromkeys(CASES[name].unquantized, "read in parts (`slice`)")


@pytest.mark.parametrize("name", CASES)
def test_missing_left_over_and_misshapen_tensors_are_named(name, tmp_path):
    tensors = folders.random_tensors(CASES[name].shapes)
    victim = sorted(n for n in tensors if ".0." in n and tensors[n].ndim == 2)[0]
    without = {n: t for n, t in tensors.items() if n != victim}
    with pytest.raises(MpqError, match=f"lacks the tensor '{victim}'"):
        load(write(tmp_path / "a", name, tensors=without))
    with pytest.raises(MpqError, match=r"holds the tensor 'model\.extra\.weight'"):
        load(write(tmp_path / "b", name, tensors=tensors | {"model.extra.weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(MpqError, match=f"tensor '{victim}' has shape"):
        load(write(tmp_path / "c", name, tensors=without | {victim: tensors[victim][:-1]}))


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_checkpoints_of_the_bare_model_are_read(name, prefix, tmp_path):
    tensors = folders.random_tensors(CASES[name].shapes)
    bare = {n.removeprefix(prefix): tensor for n, tensor in tensors.items()}
    assert not set(bare) & set(tensors)
    whole = load(write(tmp_path / "whole", name, tensors=tensors))
    assert load(write(tmp_path / "bare", name, tensors=bare)).digest == whole.digest


STALE = {
    "llama": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "gpt2": "transformer.h.0.attn.bias",
    "gpt_neox": "gpt_neox.layers.1.attention.masked_bias",
    "qwen2": "lm_head.weight",
}


@pytest.mark.parametrize("name", STALE)
def test_masks_constants_and_tied_heads_of_old_checkpoints_are_ignored(name, tmp_path):
    tensors = folders.random_tensors(CASES[name].shapes)
    whole = load(write(tmp_path / "whole", name, tensors=tensors))
    more = tensors | {STALE[name]: np.ones((1, 1), np.float32)}
    assert load(write(tmp_path / "more", name, tensors=more)).digest == whole.digest


@pytest.mark.parametrize("name", CASES)
def test_unknown_and_missing_keys_are_named(name):
    parse, config = FAMILIES[config_of(name)["model_type"]].parse, config_of(name)
    with pytest.raises(MpqError, match=r"config key 'multiplier' .* is unknown"):
        parse(config | {"multiplier": 2})
    with pytest.raises(MpqError, match="config key 'vocab_size' is missing"):
        parse({key: value for key, value in config.items() if key != "vocab_size"})
    (key,) = {"hidden_act", "hidden_activation", "activation_function"} & set(config) - (
        {"hidden_act"} if "hidden_activation" in config else set()
    )
    with pytest.raises(MpqError, match=f"config key '{key}' is 'tanhshrink': supported is"):
        parse(config | {key: "tanhshrink"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"rope_interleaved": True}, "'rope_interleaved' is True"),
        ("qwen2", {"use_mrope": True}, "'use_mrope' is True"),
        ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types' names 1 layers: the model has 2"),
        ("qwen2", {"layer_types": ["full_attention", "chunked"]}, "'layer_types' has 'chunked'"),
        ("qwen2_moe", {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, "'layer_types' is"),
        ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
        ("phi3", {"attention_bias": True}, "'attention_bias' is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        ("gpt2", {"scale_attn_weights": False}, "'scale_attn_weights' is False"),
        ("opt", {"layer_norm_elementwise_affine": False}, "'layer_norm_elementwise_affine' is False"),
    ],
)
def test_values_that_the_decoder_would_get_wrong_are_refused(name, change, message):
    with pytest.raises(MpqError, match=message):
        FAMILIES[name].parse(config_of(name) | change)


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_configs_are_read(published):
    family = FAMILIES[published["model_type"]]
    config = family.parse(published)
    assert config.vocab_size == published["vocab_size"]
    context = published.get("max_position_embeddings") or published["n_positions"]
    assert family.inputs(config) == Tokens(context, bos=published["bos_token_id"])


PARSED = {
    "llama 7b": {"num_key_value_heads": 32, "head_dim": 128, "tie_word_embeddings": False, "windows": ()},
    "llama 3.1 8b": {"rope": Rope(500000.0, 1.0, rope.Llama3(8.0, 1.0, 4.0, 8192))},
    "mistral 7b v0.1": {"windows": (4096,) * 32},
    "mistral 7b v0.3": {"windows": (None,) * 32},
    "qwen2.5 0.5b": {"windows": (None,) * 24, "qkv_bias": True, "o_bias": False, "rope": Rope(1e6)},
    "qwen3 0.6b": {"qk_norm": True, "head_dim": 128},
    "gemma 2 2b": {
        "windows": (4096, None) * 13,
        "attention_scale": 1 / 16,
        "embedding_scale": 48.0,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "tie_word_embeddings": True,
    },
    "gemma 3 1b": {
        "windows": ((512,) * 5 + (None,)) * 4 + (512, 512),
        "rope": Rope(1e6),
        "local_rope": Rope(1e4),
        "attention_softcap": None,
    },
    "phi-3 mini 4k": {"windows": (2047,) * 32, "qkv": "fused", "mlp": "gated_fused"},
    "phi-3 mini 128k, of 8 features a head": {
        "rope": Rope(1e4, 1.0, rope.LongRope((1.0, 1.02, 1.05, 2.5), (1.08, 1.1, 4.2, 64.1), 4096, 32.0))
    },
    "gpt-2": {"intermediate_size": 3072, "learned_positions": 0, "rope": None, "tie_word_embeddings": True},
    "opt 350m": {"residual": "post", "final_norm": False, "embedding_size": 512, "learned_positions": 2},
    "opt 125m": {"residual": "pre", "final_norm": True, "embedding_size": None},
    "pythia 70m": {"rope": Rope(1e4, 0.25), "residual": "parallel", "qkv": "interleaved"},
    "mixtral 8x7b": {"experts": ExpertsConfig(8, 2, 14336, True, (True,) * 32)},
    "qwen1.5 moe a2.7b": {"experts": ExpertsConfig(60, 4, 1408, False, (True,) * 24, 5632)},
    "qwen3 30b a3b": {"experts": ExpertsConfig(128, 8, 768, True, (True,) * 48)},
}


@pytest.mark.parametrize("name", PARSED)
def test_published_configs_mean_what_their_papers_say(name):
    config = FAMILIES[PUBLISHED[name]["model_type"]].parse(PUBLISHED[name])
    assert {key: getattr(config, key) for key in PARSED[name]} == PARSED[name]


def test_defaults_are_those_of_transformers():
    """Keys that a config may leave out, where one family differs from another."""
    bare = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 16, "max_position_embeddings": 8}  # fmt: skip
    parse = lambda kind: FAMILIES[kind].parse(bare)
    assert parse("mistral").num_key_value_heads == 8
    assert parse("mistral").windows == (4096,)
    assert (parse("llama").norm_eps, parse("phi3").norm_eps, parse("mixtral").norm_eps) == (1e-6, 1e-5, 1e-5)
    assert (parse("qwen3").head_dim, parse("gemma2").head_dim, parse("llama").head_dim) == (128, 256, 1)
    assert parse("mixtral").rope == Rope(1e6)
    assert FAMILIES["llama"].inputs(parse("llama")) == Tokens(8, bos=None)


def test_a_null_window_is_no_window_and_null_heads_are_counted():
    config = config_of("mistral") | {"sliding_window": None, "num_key_value_heads": None, "head_dim": None}
    parsed = FAMILIES["mistral"].parse(config)
    assert parsed.windows == (None, None)
    assert (parsed.num_key_value_heads, parsed.head_dim) == (4, 4)


def test_transformers_5_nests_what_version_4_keeps_apart():
    parse, old = FAMILIES["llama"].parse, config_of("llama")
    scaling = {"rope_type": "linear", "factor": 4.0}
    new = {key: value for key, value in old.items() if key != "rope_theta"}
    nested = parse(new | {"rope_parameters": scaling | {"rope_theta": 100.0}})
    assert nested == parse(old | {"rope_scaling": scaling})
    assert nested == parse(old | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    neox = {key: value for key, value in config_of("gpt_neox").items() if not key.startswith("rot")}
    parameters = {"rope_theta": 100, "partial_rotary_factor": 0.5, "rope_type": "default"}
    assert FAMILIES["gpt_neox"].parse(neox | {"rope_parameters": parameters}) == FAMILIES["gpt_neox"].parse(
        config_of("gpt_neox")
    )
    gemma = {key: value for key, value in config_of("gemma3_text").items() if not key.startswith("rope")}
    both = {"full_attention": {"rope_theta": 100.0}, "sliding_attention": {"rope_theta": 7.0}}
    assert FAMILIES["gemma3_text"].parse(gemma | {"rope_parameters": both}) == FAMILIES["gemma3_text"].parse(
        config_of("gemma3_text")
    )


def test_a_window_beyond_the_learned_positions_is_refused(tmp_path):
    model = load(write(tmp_path / "model", "opt"))
    with pytest.raises(MpqError, match="a window of 17 tokens was given to a model with 16 learned positions"):
        model.trace(window=17)


def test_an_expert_sees_only_its_own_tokens(tmp_path):
    """The statistics of an expert are those of the tokens that are routed to it: the others reach it as zeros."""
    model = load(write(tmp_path / "model", "mixtral"))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, CONTEXT), np.int32)
    found = model.trace(window=CONTEXT)

    def update(site, x, seen):
        if not site.spec.path.startswith("layers.0.mlp.experts"):
            return seen
        rows = jnp.any(site.inputs_matrix(x) != 0, axis=-1)  # [experts, tokens]
        return {**seen, site.spec.path: rows}

    paths = [f"layers.0.mlp.experts.{name}_proj.kernel" for name in ("gate", "up", "down")]
    start = {path: jnp.zeros((EXPERTS, CONTEXT), bool) for path in paths}
    _, seen = jax.jit(lambda params: found.accumulate(params, tokens, start, update))(model.params)
    for path in paths:
        np.testing.assert_array_equal(np.asarray(seen[path]).sum(0), np.full(CONTEXT, 2))
