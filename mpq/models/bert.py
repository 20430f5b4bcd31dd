"""BERT in Flax NNX (Devlin et al. 2019, arXiv:1810.04805): sentence embeddings, classification, regression.

`BertModel` with the files of sentence-transformers (Reimers and Gurevych 2019, arXiv:1908.10084) is an embedding model,
all-MiniLM-L6-v2 among them: the last hidden states are averaged over the tokens that are not padding, or the first one
is taken, and the result is scaled to unit length where the checkpoint lists a Normalize module. Without those files it
is their mean, unscaled, which is what sentence-transformers does with a plain BERT. `BertForSequenceClassification` has
the pooler (a dense layer and tanh on the first token) and a linear head; with one label it is a regression.

Token types are all 0: one segment a text. Heads of pretraining (`BertForMaskedLM` and its like) are refused by class
name, since without their head there is nothing to evaluate them by.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpq.inputs import Tokens
from mpq.models.encoder import Block, EncoderShape, l2_normalize, masked_mean, rename
from mpq.models.family import Family, Stored, parse_strictly
from mpq.models.layers import layer_norm, num_labels, pytorch_tensor, without
from mpq.types import MpqError

EMBEDDING, CLASSIFICATION = "BertModel", "BertForSequenceClassification"

NEUTRAL = (
    "attention_probs_dropout_prob",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "directionality",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "output_past",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "tie_word_embeddings",
)
"""Keys that matter in training only, or that nothing reads (`pooler_*` and `directionality` were Google's)."""

POOLING_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
POOLING_NEUTRAL = ("word_embedding_dimension", "embedding_dimension", "include_prompt")

BLOCK_NAMES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How one vector is made of a text's hidden states: `mean` over its tokens, or the first (`cls`)."""

    mode: str = "mean"
    normalize: bool = False


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT; the field names are those of a Hugging Face `config.json`.

    Attributes:
      num_labels: outputs of the classifier; None for an embedding model.
      pooling: of an embedding model; None for a classifier.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    num_labels: int | None = None
    pooling: Pooling | None = None

    @property
    def block(self) -> EncoderShape:
        """Shape of one block."""
        return EncoderShape(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.hidden_act,
            self.layer_norm_eps,
            pre_norm=False,
        )


class Embeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, normalized."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        table = lambda rows: nnx.Embed(rows, config.hidden_size, rngs=rngs)
        self.word_embeddings = table(config.vocab_size)
        self.position_embeddings = table(config.max_position_embeddings)
        self.token_type_embeddings = table(config.type_vocab_size)
        self.LayerNorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`int32[batch, time]` to `[batch, time, hidden]`."""
        x = self.word_embeddings(tokens) + self.token_type_embeddings(jnp.zeros_like(tokens))
        return self.LayerNorm(x + self.position_embeddings(jnp.arange(tokens.shape[1])))


class Bert(nnx.Module):
    """Token ids `int32[batch, time]` to an embedding `float32[batch, hidden]`, or to `float32[batch, num_labels]`."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.pad, self.pooling = config.pad_token_id, config.pooling
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(Block(config.block, rngs) for _ in range(config.num_hidden_layers))
        if config.num_labels is not None:
            self.pooler = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
            self.classifier = nnx.Linear(config.hidden_size, config.num_labels, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Positions that hold `pad` are not seen and not averaged."""
        mask = tokens != self.pad
        x = self.embeddings(tokens)
        for block in self.layers:
            x = block(x, mask)
        if self.pooling is None:
            return self.classifier(jnp.tanh(self.pooler(x[:, 0])))
        pooled = masked_mean(x, mask) if self.pooling.mode == "mean" else x[:, 0]
        return l2_normalize(pooled) if self.pooling.normalize else pooled


def parse_config(config: Mapping[str, Any]) -> BertConfig:
    """The shape of the model that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    classifies = config["architectures"][0] == CLASSIFICATION
    labels = num_labels(config) if classifies else None
    pooling = None if classifies else parse_pooling(config.get("pooling"), config.get("modules"))
    config = without(config, "pooling", "modules", "num_labels", *NEUTRAL)
    only = {
        "add_cross_attention": (False,),
        "is_decoder": (False,),
        "position_embedding_type": ("absolute", None),
        "problem_type": (None, "regression" if labels == 1 else "single_label_classification"),
    }
    return parse_strictly(config, BertConfig, only=only, defaults={"num_labels": labels, "pooling": pooling})


def parse_pooling(config: Mapping[str, Any] | None, modules: Sequence[Mapping[str, Any]] | None) -> Pooling:
    """How a checkpoint of sentence-transformers pools.

    Args:
      config: its `1_Pooling/config.json`; None: there is none.
      modules: its `modules.json`, which lists what a text goes through; None: there is none.

    Raises:
      MpqError: a module beside transformer, pooling and normalization; a way of pooling other than mean and cls, none,
        two at once; an unknown key.
    """
    kinds = [str(module.get("type")).rpartition(".")[-1] for module in modules or ()]
    if kinds and (kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"])):
        raise MpqError(f"modules.json lists {kinds}: supported is Transformer, Pooling and, at will, Normalize")
    if config is None:
        return Pooling(normalize=kinds[2:] == ["Normalize"])
    modes = {str(mode) for mode in [config.get("pooling_mode")] if mode is not None}
    for key, value in without(config, *POOLING_NEUTRAL, "pooling_mode").items():
        if not key.startswith("pooling_mode_"):
            raise MpqError(f"1_Pooling/config.json has the unknown key {key!r}: it may change the embedding")
        modes |= {POOLING_FLAGS.get(key, key)} if value else set()
    if len(modes) != 1 or not modes <= set(POOLING_FLAGS.values()):
        raise MpqError(f"1_Pooling/config.json asks for {sorted(modes)}: supported is one of 'mean' and 'cls'")
    return Pooling(modes.pop(), kinds[2:] == ["Normalize"])


def stored(config: BertConfig, path: str) -> Stored:
    """Where a Hugging Face checkpoint keeps the parameter at `path`."""
    name = rename(path, BLOCK_NAMES).replace("pooler.", "pooler.dense.")
    prefix = "bert." if config.num_labels is not None and not path.startswith("classifier.") else ""
    return pytorch_tensor(prefix + name)


FAMILY = Family(
    name="bert",
    architectures={EMBEDDING: "embedding", CLASSIFICATION: "classification"},
    parse=parse_config,
    build=lambda config: Bert(config, rngs=nnx.Rngs(0)),
    stored=stored,
    inputs=lambda config: Tokens(config.max_position_embeddings, pad=config.pad_token_id),
    # Indices that older versions stored, and the pooler, which is beside what an embedding model pools.
    ignored=(r"(bert\.)?embeddings\.(position_ids|token_type_ids)", r"pooler\.dense\.(weight|bias)"),
)
