"""ViT and DeiT in Flax NNX (Dosovitskiy et al. 2021, arXiv:2010.11929; Touvron et al. 2021, arXiv:2012.12877).

Image patches become tokens by one convolution; a class token goes in front, positions are learned, the blocks are
pre-norm, and a linear head reads the class token. What Hugging Face calls DeiT has a distillation token beside it, and,
as `DeiTForImageClassificationWithTeacher`, a second head that reads that token: the logits are then the mean of both
(Touvron et al., section 4). DeiT trained without distillation is a ViT, and Hugging Face calls it so.

Images have the one size that the learned positions are for. The pooler of `ViTModel` is no part of a classifier.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpq.inputs import Images
from mpq.models import vision
from mpq.models.encoder import Block, EncoderShape, rename
from mpq.models.family import CONV, LINEAR, Family, Stored, parse_strictly
from mpq.models.layers import layer_norm, num_labels, pytorch_tensor, without
from mpq.models.vision import Preprocessor

DEIT, DEIT_WITH_TEACHER = "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"

NEUTRAL = (
    "attention_probs_dropout_prob",
    "encoder_stride",
    "hidden_dropout_prob",
    "pooler_act",
    "pooler_output_size",
    "problem_type",
)

BLOCK_NAMES = {
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "layernorm_before",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "layernorm_after",
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a ViT; the field names are those of a Hugging Face `config.json`.

    Attributes:
      image_size, patch_size: height and width.
      architecture: class name in `config["architectures"]`.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    num_labels: int
    preprocessor: Preprocessor
    architecture: str
    qkv_bias: bool = True

    @property
    def distilled(self) -> bool:
        """Whether there is a distillation token."""
        return self.architecture in (DEIT, DEIT_WITH_TEACHER)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the classifiers: the first reads the class token, a second the distillation token."""
        if self.architecture == DEIT_WITH_TEACHER:
            return "cls_classifier", "distillation_classifier"
        return ("classifier",)

    @property
    def block(self) -> EncoderShape:
        """Shape of one block."""
        return EncoderShape(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.hidden_act,
            self.layer_norm_eps,
            pre_norm=True,
            qkv_bias=self.qkv_bias,
        )


class Embeddings(nnx.Module):
    """Class token, distillation token if there is one, and patches; a learned position is added to each."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        d, patch = config.hidden_size, config.patch_size
        zeros = lambda rows: nnx.Param(jnp.zeros((1, rows, d), jnp.float32))
        self.cls_token = zeros(1)
        self.distillation_token = zeros(1) if config.distilled else None
        patches = (config.image_size[0] // patch[0]) * (config.image_size[1] // patch[1])
        self.position_embeddings = zeros(patches + 1 + config.distilled)
        self.projection = nnx.Conv(config.num_channels, d, patch, strides=patch, padding="VALID", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, height, width, channels]` to `[batch, tokens, hidden]`."""
        x = self.projection(x)
        batch, d = x.shape[0], x.shape[-1]
        first = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        tokens = [jnp.broadcast_to(token[...], (batch, 1, d)) for token in first]
        return jnp.concatenate([*tokens, x.reshape(batch, -1, d)], axis=1) + self.position_embeddings[...]


class ViT(nnx.Module):
    """Images `uint8[batch, height, width, channels]` to logits `float32[batch, classes]`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.preprocessor = config.preprocessor
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(Block(config.block, rngs) for _ in range(config.num_hidden_layers))
        self.layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.heads = nnx.List(nnx.Linear(config.hidden_size, config.num_labels, rngs=rngs) for _ in config.heads)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, the mean of all heads."""
        x = self.embeddings(self.preprocessor(images))
        for block in self.layers:
            x = block(x)
        x = self.layernorm(x)
        logits = [head(x[:, i]) for i, head in enumerate(self.heads)]
        return sum(logits[1:], logits[0]) / len(logits)


def parse_config(config: Mapping[str, Any]) -> ViTConfig:
    """The shape of the model that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    values = {
        "num_labels": num_labels(config),
        "preprocessor": vision.parse_preprocessor(config, config.get("num_channels", 3)),
        "architecture": config["architectures"][0],
    }
    config = without(config, "num_labels", "preprocessor", *NEUTRAL)
    config |= {key: vision.square(config[key]) for key in ("image_size", "patch_size") if key in config}
    return parse_strictly(config, ViTConfig, only={}, defaults=values)


def stored(config: ViTConfig, path: str) -> Stored:
    """Where a Hugging Face checkpoint keeps the parameter at `path`."""
    if path.startswith("heads."):
        _, head, leaf = path.split(".")
        return pytorch_tensor(f"{config.heads[int(head)]}.{leaf}", LINEAR)
    prefix = "deit" if config.distilled else "vit"
    if path.startswith("embeddings.projection."):
        return pytorch_tensor(f"{prefix}.{path.replace('projection', 'patch_embeddings.projection')}", CONV)
    return pytorch_tensor(f"{prefix}.{rename(path, BLOCK_NAMES)}", LINEAR)


def _family(name: str, *architectures: str) -> Family:
    return Family(
        name=name,
        architectures=dict.fromkeys(architectures, "classification"),
        parse=parse_config,
        build=lambda config: ViT(config, rngs=nnx.Rngs(0)),
        stored=stored,
        inputs=lambda config: Images(config.image_size[0], config.image_size[1], config.num_channels),
        # Of checkpoints of the pretrained model that a classifier was made from.
        ignored=(r"(vit|deit)\.pooler\.dense\.(weight|bias)", r"(vit|deit)\.embeddings\.mask_token"),
    )


VIT = _family("vit", "ViTForImageClassification")
DEIT_FAMILY = _family("deit", DEIT, DEIT_WITH_TEACHER)
