"""Our BERT against `transformers`, in float32, on random models and padded texts; the bound is 1e-4.

Measured: largest difference 4.9e-6, of outputs up to 2.9.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mpq.models import load

pytestmark = pytest.mark.parity

ATOL = 1e-4
PAD, WINDOW = 0, 16
LENGTHS = (16, 9, 1, 5)
NORMALIZE = {"idx": 2, "type": "sentence_transformers.models.Normalize"}
MODULES = [
    {"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(("Transformer", "Pooling"))
]

VARIANTS = {
    "as usual": {},
    "tanh gelu": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "large epsilon": {"layer_norm_eps": 1e-2},
    "one head": {"num_attention_heads": 1},
    "one token type": {"type_vocab_size": 1},
    "another pad": {"pad_token_id": 5},
}


def randomized(model):
    """Norms and biases away from the ones and zeros that would hide a missing or swapped one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(float("LayerNorm.weight" in name), 0.3)
    return model.eval()


def config(**options):
    torch.manual_seed(0)
    base = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "initializer_range": 0.3,
    }
    return transformers.BertConfig(**(base | options))


def texts(pad):
    rng = np.random.default_rng(0)
    tokens = rng.integers(pad + 1, 60, (len(LENGTHS), WINDOW))
    tokens[np.arange(WINDOW) >= np.array(LENGTHS)[:, None]] = pad
    return tokens


def ours(folder, tokens):
    model = load(str(folder))
    return np.asarray(model.apply(model.params, jnp.asarray(tokens, jnp.int32)))


def compare(got, want):
    assert got.shape == want.shape
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("mode", "normalized"), [("mean", True), ("mean", False), ("cls", False)])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_embeddings(tmp_path, variant, mode, normalized):
    model = randomized(transformers.BertModel(config(**variant)))
    model.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    flags = {"pooling_mode_cls_token": mode == "cls", "pooling_mode_mean_tokens": mode == "mean"}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    (tmp_path / "modules.json").write_text(json.dumps([*MODULES, NORMALIZE] if normalized else MODULES))
    tokens = texts(model.config.pad_token_id)
    mask = torch.tensor(tokens != model.config.pad_token_id)
    with torch.no_grad():
        x = model(torch.tensor(tokens), attention_mask=mask.long()).last_hidden_state
        want = x[:, 0] if mode == "cls" else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        want = torch.nn.functional.normalize(want, dim=-1) if normalized else want
    compare(ours(tmp_path, tokens), want.numpy())


@pytest.mark.parametrize("labels", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_classification_and_regression(tmp_path, variant, labels):
    model = randomized(transformers.BertForSequenceClassification(config(**variant, num_labels=labels)))
    model.save_pretrained(tmp_path)
    tokens = texts(model.config.pad_token_id)
    with torch.no_grad():
        want = model(torch.tensor(tokens), attention_mask=torch.tensor(tokens != model.config.pad_token_id).long())
    compare(ours(tmp_path, tokens), want.logits.numpy())
