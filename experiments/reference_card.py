"""Write the reference model as a Hugging Face folder, with its texts, its training record and its model card.

Everything in the card is computed here from the exported (bfloat16) weights, in float32; nothing is typed in by hand.
The same inputs give the same bytes.
"""

import dataclasses
import hashlib
import platform
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save
from tokenizers import Tokenizer

from experiments.reference_card_text import card
from experiments.stdlib_corpus import Corpus
from mpq.data.text import SEPARATOR
from mpq.files import write_bytes, write_json, write_text, writing
from mpq.models.llama import Llama, LlamaConfig, tensor_name
from mpq.progress import track

Document = tuple[str, str]
TEXT_BYTES = 300_000
"""Each of the three texts takes whole documents up to this size."""

SAMPLE_TOKENS = 64
PROMPTS = ("def main(", "class Reader:\n    def __init__(", "import os\nimport sys\n", "    def test_")


@dataclasses.dataclass(frozen=True)
class Score:
    """Loss on some documents: total nats over all predicted tokens, their number, and the size of the text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log likelihood of a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Independent of the vocabulary: total bits over the bytes of UTF-8 text."""
        return self.nats / np.log(2.0) / self.bytes


def export(
    out: Path,
    graph: Any,
    params: nnx.State,
    tokenizer: Tokenizer,
    corpus: Corpus,
    config: LlamaConfig,
    training: Any,
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write the folder `out`, whole or not at all; what was there before is replaced.

    Args:
      out: becomes a folder that `mpq.models.load` and `transformers` read.
      graph: `GraphDef` of the trained module; unused, since the export computes in float32 whatever it was trained in.
      params: `nnx.State` of all parameters.
      tokenizer: puts BOS in front of every text.
      corpus: the training text and the held-out splits.
      config: shape of the model.
      training: dataclass of hyperparameters with the fields `steps`, `batch` and `window`.
      history: rows of `step`, `train_loss` and `held_out_nll` (nats per token), and the `device` that made the step.
    """
    del graph
    tensors = checkpoint_tensors(params)
    logits = float32_logits(config, params)
    texts = {
        "calibration": choose(corpus.train, TEXT_BYTES),
        "selection": choose(corpus.selection, TEXT_BYTES),
        "test": choose(corpus.test, TEXT_BYTES),
    }
    record = {
        "model": dataclasses.asdict(config) | {"parameters": sum(t.size for t in tensors.values())},
        "training": dataclasses.asdict(training) | {"tokens_seen": training.steps * training.batch * training.window},
        "command": command(training),
        "corpus": describe(corpus, tokenizer),
        "held_out": {
            "whole test split": _row(score(logits, tokenizer, corpus.test, training.window)),
            "text/test.txt": _row(score(logits, tokenizer, texts["test"], training.window)),
        },
        "history": [dict(row) for row in history],
        "samples": {
            prompt: tokenizer.decode(greedy(logits, tokenizer.encode(prompt).ids, SAMPLE_TOKENS)) for prompt in PROMPTS
        },
        "documents": {name: [path for path, _ in documents] for name, documents in texts.items()},
    }
    with writing(out) as folder:
        folder.mkdir()
        write_json(folder / "config.json", hugging_face_config(config))
        # transformers refuses a file whose metadata does not say that the layout is PyTorch's
        write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, config))
        for name, documents in texts.items():
            write_text(folder / "text" / f"{name}.txt", join(documents))
        write_text(folder / "text" / "LICENSE.txt", library_license())
        write_json(folder / "training.json", record)
        write_text(folder / "README.md", card(record))


def checkpoint_tensors(params: nnx.State) -> dict[str, np.ndarray]:
    """All parameters in bfloat16 under their Hugging Face names; linear weights transposed to `[n, k]`."""
    tensors = {}
    for path, variable in nnx.to_flat_state(params):
        name, transposed = tensor_name(".".join(map(str, path)))
        value = np.asarray(variable.get_value()).astype(jnp.bfloat16)
        tensors[name] = np.ascontiguousarray(value.T if transposed else value)
    return dict(sorted(tensors.items()))


def hugging_face_config(config: LlamaConfig) -> dict[str, Any]:
    """The `config.json` that `transformers` and `mpq` read."""
    return dataclasses.asdict(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_scaling": None,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def tokenizer_config(tokenizer: Tokenizer, config: LlamaConfig) -> dict[str, Any]:
    """The `tokenizer_config.json` with which `AutoTokenizer` gives the same ids as `tokenizer`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(config.bos_token_id),
        "eos_token": tokenizer.id_to_token(config.eos_token_id),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }


def choose(documents: Sequence[Document], max_bytes: int) -> list[Document]:
    """Whole documents of at most `max_bytes` together, visited in the order of the sha256 of their paths.

    A document that does not fit, or that holds the separator itself, is passed over.
    """
    chosen, size = [], 0
    for path, text in sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest()):
        length = len(text.encode()) + len(SEPARATOR) + 1
        if size + length <= max_bytes and SEPARATOR not in text:
            chosen.append((path, text))
            size += length
    return chosen


def join(documents: Sequence[Document]) -> str:
    """The texts in one file, `<|endoftext|>` on a line of its own between them."""
    return f"{SEPARATOR}\n".join(text if text.endswith("\n") else text + "\n" for _, text in documents)


def describe(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """Which library the text is, its digest, and documents, bytes and tokens of each split."""
    splits = {name: getattr(corpus, name) for name in ("train", "selection", "test")}
    return {
        "python": platform.python_version(),
        "digest": corpus.digest,
        "splits": {
            name: {
                "documents": len(documents),
                "bytes": sum(len(text.encode()) for _, text in documents),
                "tokens": sum(len(e.ids) for e in tokenizer.encode_batch([text for _, text in documents])),
            }
            for name, documents in splits.items()
        },
    }


def command(training: Any) -> str:
    """The command line that trains and exports this model: every option that differs from its default."""
    default = type(training)()
    options = [
        f" --training.{field.name.replace('_', '-')} {_words(getattr(training, field.name))}"
        for field in dataclasses.fields(training)
        if getattr(training, field.name) != getattr(default, field.name)
    ]
    return "python -m experiments.train_reference --work DIR --out mpq/assets/reference_lm" + "".join(options)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def float32_logits(config: LlamaConfig, params: nnx.State) -> Any:
    """`tokens int32[batch, time] -> float32 logits`, with the weights as they are exported (rounded to bfloat16)."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    apply = jax.jit(lambda rounded, tokens: nnx.merge(graph, rounded)(tokens))
    return lambda tokens: apply(rounded, tokens)


def score(logits: Any, tokenizer: Tokenizer, documents: Sequence[Document], window: int, batch: int = 8) -> Score:
    """Loss of every token of every document, each counted once.

    A document is cut into pieces of `window - 1` tokens and BOS is put in front of each, so a token's context never
    reaches beyond its piece.

    Args:
      logits: `tokens int32[batch, window] -> float32[batch, window, vocab]`.
      tokenizer: puts BOS in front of every text.
      documents: `(path, text)`.
      window: tokens in a window, BOS included.
      batch: windows evaluated at once.
    """

    @jax.jit
    def nats(tokens: jax.Array, length: jax.Array, outputs: jax.Array) -> jax.Array:
        logp = jnp.take_along_axis(jax.nn.log_softmax(outputs[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(logp, where=jnp.arange(1, window) < length[:, None], axis=1)

    windows = [piece for _, text in documents for piece in pieces(tokenizer.encode(text).ids, window)]
    total = 0.0
    for start in track(range(0, len(windows), batch), "held-out loss", -(-len(windows) // batch)):
        part = windows[start : start + batch] + [[0]] * (start + batch - len(windows))
        tokens = np.array([piece + [0] * (window - len(piece)) for piece in part], np.int32)
        length = np.array([len(piece) for piece in part], np.int32)
        total += float(np.sum(np.asarray(nats(tokens, length, logits(tokens))), dtype=np.float64))
    text_bytes = sum(len(text.encode()) for _, text in documents)
    return Score(total, sum(len(piece) - 1 for piece in windows), text_bytes)


def pieces(ids: Sequence[int], window: int) -> list[list[int]]:
    """Token ids with BOS in front, cut into windows that each begin with that BOS."""
    bos, rest = ids[0], list(ids[1:])
    return [[bos, *rest[start : start + window - 1]] for start in range(0, len(rest), window - 1)]


def greedy(logits: Any, ids: Sequence[int], count: int) -> list[int]:
    """`ids` and the `count` likeliest next tokens, one after the other."""
    end = len(ids) + count
    tokens = np.zeros((1, -(-end // 64) * 64), np.int32)  # one shape serves all lengths: the model is causal
    tokens[0, : len(ids)] = ids
    for position in range(len(ids), end):
        tokens[0, position] = int(jnp.argmax(logits(tokens)[0, position - 1]))
    return tokens[0, :end].tolist()


def library_license() -> str:
    """The licence of the Python whose library the texts are taken from, as it is installed."""
    file = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if file.exists():
        return file.read_text(encoding="utf-8")
    return "Python Software Foundation License Version 2: https://docs.python.org/3/license.html\n"


def _row(score: Score) -> dict[str, float]:
    return dataclasses.asdict(score) | {
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
    }
