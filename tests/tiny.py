"""A tiny random Llama in the Hugging Face layout, with a tokenizer and text: what command-line tests run on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mpq.config import RunConfig
from mpq.data import make_dataset
from mpq.inputs import Dataset
from mpq.models import Model, load

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
}


def tensors(config: dict = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors with the names and shapes that the config calls for."""
    rng = np.random.default_rng(seed)
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    scale = lambda shape: 1.0 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
    return {
        name: (rng.normal(size=shape) * scale(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def text(documents: int = 60, seed: int = 0) -> str:
    """Documents of random words, separated as a text file is."""
    rng = np.random.default_rng(seed)
    words = ["def", "return", "if", "else", "for", "in", "range", "x", "y", "z", "=", "+", "(", ")", ":", "\n"]
    return "<|endoftext|>".join(" ".join(rng.choice(words, size=120)) for _ in range(documents))


def tokenizer(vocab_size: int = 96) -> Tokenizer:
    """Byte-pair tokenizer over characters, ids 0 and 1 are BOS and EOS."""
    result = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|bos|>", "<|endoftext|>"], show_progress=False
    )
    result.train_from_iterator([text()], trainer)
    return result


def loaded(path: Path, max_windows: int) -> tuple[Model, Dataset]:
    """A model from a folder made at `path`, and windows of 16 tokens of its text."""
    model, documents = load(str(write_folder(path))), text(documents=20).split("<|endoftext|>")
    return model, make_dataset(
        documents, model.tokenizer, bos=model.inputs.bos, window=16, max_windows=max_windows, source="noise"
    )


def write_folder(path: Path, config: dict = CONFIG, weights: dict[str, np.ndarray] | None = None) -> Path:
    """A complete checkpoint folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, path / "model.safetensors")
    tokenizer(config["vocab_size"]).save(str(path / "tokenizer.json"))
    return path


def model_and_texts(root: Path) -> dict[str, Any]:
    """A model, text to calibrate on and text to judge by, as options of an experiment."""
    write_folder(root / "model")
    texts = {"data": root / "calibration.txt", "test": root / "test.txt"}
    for path in texts.values():
        path.write_text(text(documents=30))
    return {"model": str(root / "model"), **texts}


def run_config(root: Path, **options: Any) -> RunConfig:
    """A run of a few windows of the tiny model, which is written below `root` with its text."""
    write_folder(root / "model")
    (root / "text.txt").write_text(text(documents=200))
    few = {"window": 32, "batch_size": 4, "calibration_windows": 24, "selection_windows": 12, "test_windows": 24}
    return RunConfig(name="tiny", model=str(root / "model"), data=str(root / "text.txt"), **{**few, **options})
