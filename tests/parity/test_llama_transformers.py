"""Our Llama against `transformers`: logits, token ids and greedy text, on random models and on every real one at hand.

We compute in float32; the bound on the logits is 1e-4. Real models are held against float64: their float32 is off by as
much as ours, mostly by the rounding of rotary angles. Measured on random tokens over the whole context, largest
difference from float64, ours and theirs: reference 3.6e-5 and 2.1e-5, stories260k 2.8e-5 and 2.4e-5, tiny1m 7.3e-5 and
9.0e-5.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mpq.models import load
from tests import tiny

pytestmark = pytest.mark.parity

REFERENCE = Path(__file__).resolve().parents[2] / "mpq" / "assets" / "reference_lm"
LOGITS_ATOL = 1e-4
TEXTS = (
    "def main():\n    return 1",
    "Once upon a time, there was a little girl named Lily.",
    "  leading spaces,\ttabs\n\n\nblank lines ",
    "naïve façade – 東京 🙂",
    "",
)

VARIANTS = {
    "grouped queries, tied": {},
    "untied": {"tie_word_embeddings": False},
    "one head each": {"num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "large epsilon": {"rms_norm_eps": 1e-2},
    "wide heads": {"head_dim": 24},
    "three layers": {"num_hidden_layers": 3},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def random_folder(request, tmp_path):
    """A random Llama of `transformers`, saved by it."""
    options = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        # far from the usual 0.02, with which random logits are so flat that a wrong model would pass
        "initializer_range": 0.3,
    } | request.param
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they begin as ones, which would hide a missing or swapped norm
                parameter.normal_(1.0, 0.3)
    model.save_pretrained(tmp_path)
    return tmp_path


def real_folder(name: str, request: pytest.FixtureRequest) -> Path:
    """The reference model, or one from the folder of shared models; skips where it is absent."""
    folder = REFERENCE if name == "reference" else request.getfixturevalue("shared_data") / "models" / name
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder.name} is not here")
    return folder


@pytest.fixture(params=["reference", "stories260k", "tiny1m"])
def folder(request):
    return real_folder(request.param, request)


def theirs(folder: Path, dtype: torch.dtype = torch.float32):
    """The model as `transformers` loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def random_tokens(vocab: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, shape, np.int32)


def test_random_models_give_the_same_logits(random_folder):
    model = load(str(random_folder))
    tokens = random_tokens(96, (2, 48))
    want = their_logits(theirs(random_folder), tokens)
    assert want.std() > 0.5  # not flat
    np.testing.assert_allclose(model.apply(model.params, tokens), want, atol=LOGITS_ATOL, rtol=0)


def test_a_sharded_checkpoint_gives_the_same_logits(random_folder, tmp_path):
    reference = theirs(random_folder)
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model = load(str(tmp_path / "sharded"))
    tokens = random_tokens(96, (1, 16))
    np.testing.assert_allclose(
        model.apply(model.params, tokens), their_logits(reference, tokens), atol=LOGITS_ATOL, rtol=0
    )


def test_a_folder_as_our_tests_write_it_is_read_alike(tmp_path):
    """Ties the hand-written folders of `tests.tiny` to `transformers`."""
    folder = tiny.write_folder(tmp_path / "model")
    model = load(str(folder))
    tokens = random_tokens(tiny.CONFIG["vocab_size"], (1, 32))
    np.testing.assert_allclose(
        model.apply(model.params, tokens), their_logits(theirs(folder), tokens), atol=LOGITS_ATOL, rtol=0
    )


def test_real_models_give_the_same_logits(folder):
    model = load(str(folder))
    tokens = random_tokens(model.config["vocab_size"], (2, model.inputs.context))
    if model.inputs.bos is not None:
        tokens[:, 0] = model.inputs.bos
    want = their_logits(theirs(folder, torch.float64), tokens)
    assert want.std() > 0.5
    np.testing.assert_allclose(model.apply(model.params, tokens), want, atol=LOGITS_ATOL, rtol=0)


def test_real_models_read_text_alike(folder):
    model = load(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.tokenizer is not None
    for text in TEXTS:
        assert tokenizer(text).input_ids == model.tokenizer.encode(text).ids
    assert tokenizer(TEXTS[0]).input_ids[0] == model.inputs.bos


def test_real_models_continue_text_alike(folder):
    """Greedy, token by token; they keep a cache of keys and values, we recompute."""
    model = load(str(folder))
    ids = model.tokenizer.encode("def" if folder == REFERENCE else "Once upon a time").ids
    steps, start = 40, len(ids)
    prompt = torch.tensor([ids])
    generated = theirs(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else a BOS with the id of padding is taken for padding
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
    )
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    tokens = np.zeros((1, start + steps), np.int32)
    tokens[0, :start] = ids
    for position in range(start, start + steps):
        logits = np.array(model.apply(model.params, tokens)[0, position - 1])
        logits[eos] = -np.inf  # as `min_new_tokens` has it
        tokens[0, position] = logits.argmax()
    assert tokens[0].tolist() == generated[0].tolist()
