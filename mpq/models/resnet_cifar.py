"""ResNets for CIFAR-10 in Flax NNX: the paper's 6n+2 layers, and ResNet-8 of MLPerf Tiny.

Neither comes in the Hugging Face layout, so the `config.json` beside `model.safetensors` is our own.

**`resnet_cifar`** (He et al. 2016, arXiv:1512.03385, section 4.2): a 3x3 convolution, three stages of n basic blocks
of widths w, 2w and 4w, global mean, linear. Where the shape changes, the shortcut is the paper's option A: every second
pixel, with zeros for the new channels, half of them before and half after. Tensors are named as PyTorch code for this
paper usually names them: `conv1`, `bn1`, `layer{1,2,3}.{block}.conv{1,2}`, `.bn{1,2}`, `linear`.

    {"model_type": "resnet_cifar", "architectures": ["ResNetCifar"], "depth": 20, "width": 16, "num_labels": 10,
     "image_size": 32, "preprocessor": {"rescale_factor": 0.00392156862745098, "image_mean": [0.485, 0.456, 0.406],
     "image_std": [0.229, 0.224, 0.225]}}

**`resnet_mlperf_tiny`** (Banbury et al. 2021, arXiv:2106.07597): three stages of one block, widths 16, 32 and 64,
biases in the convolutions, 1x1 convolutions without a norm as projections, TensorFlow's "same" padding, batch norm with
epsilon 1e-3, raw pixels. Tensors have the names that Keras numbered (`conv2d`, `conv2d_1`, ...,
`batch_normalization_6`, `dense`) and PyTorch's layout (OIHW kernels, `weight`, `running_mean`).

    {"model_type": "resnet_mlperf_tiny", "architectures": ["ResNetMLPerfTiny"], "num_labels": 10, "image_size": 32,
     "preprocessor": {"do_rescale": false, "do_normalize": false}}

`preprocessor` may lie in a `preprocessor_config.json` instead.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpq.inputs import Images
from mpq.models import vision
from mpq.models.family import CONV, LINEAR, Family, Stored, parse_strictly
from mpq.models.layers import NUM_BATCHES_TRACKED, num_labels, pytorch_tensor, without
from mpq.models.vision import ConvNorm, Preprocessor
from mpq.types import MpqError

STAGES = 3
TINY_WIDTHS = (16, 32, 64)
TINY_EPSILON = 1e-3  # the default of Keras


@dataclasses.dataclass(frozen=True)
class ResNetCifarConfig:
    """Shape of a CIFAR ResNet of `depth` = 6n+2 layers, whose first stage has `width` channels."""

    depth: int
    num_labels: int
    preprocessor: Preprocessor
    width: int = 16
    image_size: int = 32


@dataclasses.dataclass(frozen=True)
class ResNetTinyConfig:
    """Shape of the ResNet-8 of MLPerf Tiny."""

    num_labels: int
    preprocessor: Preprocessor
    image_size: int = 32


class CifarBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.stride, self.new = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.conv1 = vision.conv(inputs, outputs, 3, rngs, stride=self.stride, padding=1)
        self.bn1 = vision.batch_norm(outputs, rngs)
        self.conv2 = vision.conv(outputs, outputs, 3, rngs, padding=1)
        self.bn2 = vision.batch_norm(outputs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, height, width, inputs]` to `outputs` channels, at half the resolution where they are new."""
        y = self.bn2(self.conv2(jax.nn.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :: self.stride, :: self.stride]
        before = self.new // 2
        return jax.nn.relu(y + jnp.pad(shortcut, [(0, 0)] * 3 + [(before, self.new - before)]))


class ResNetCifar(nnx.Module):
    """Images `uint8[batch, height, width, 3]` to logits `float32[batch, classes]`."""

    def __init__(self, config: ResNetCifarConfig, *, rngs: nnx.Rngs):
        self.preprocessor = config.preprocessor
        self.conv1 = vision.conv(3, config.width, 3, rngs, padding=1)
        self.bn1 = vision.batch_norm(config.width, rngs)
        stages, inputs = [], config.width
        for stage in range(STAGES):
            outputs = config.width << stage
            blocks = (config.depth - 2) // (2 * STAGES)
            stages.append(nnx.List(CifarBlock(outputs if i else inputs, outputs, rngs) for i in range(blocks)))
            inputs = outputs
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nnx.Linear(inputs, config.num_labels, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        x = jax.nn.relu(self.bn1(self.conv1(self.preprocessor(images))))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return self.linear(vision.global_mean(x))


class TinyBlock(nnx.Module):
    """Two 3x3 convolutions; a 1x1 convolution as the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        stride = 1 if inputs == outputs else 2
        unit = lambda k, s, act: _tiny_unit(k, outputs, s, act, rngs)
        self.first, self.second = unit(inputs, stride, "relu"), unit(outputs, 1, None)
        same = inputs == outputs
        self.shortcut = None if same else vision.conv(inputs, outputs, 1, rngs, stride=2, padding="SAME", bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, height, width, inputs]` to `outputs` channels, at half the resolution where they are new."""
        y = self.second(self.first(x))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNetTiny(nnx.Module):
    """Images `uint8[batch, height, width, 3]` to logits `float32[batch, classes]`."""

    def __init__(self, config: ResNetTinyConfig, *, rngs: nnx.Rngs):
        self.preprocessor = config.preprocessor
        self.stem = _tiny_unit(3, TINY_WIDTHS[0], 1, "relu", rngs)
        widths = zip((TINY_WIDTHS[0], *TINY_WIDTHS), TINY_WIDTHS, strict=False)
        self.stages = nnx.List(TinyBlock(inputs, outputs, rngs) for inputs, outputs in widths)
        self.dense = nnx.Linear(TINY_WIDTHS[-1], config.num_labels, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        x = self.stem(self.preprocessor(images))
        for stage in self.stages:
            x = stage(x)
        return self.dense(vision.global_mean(x))


def parse_cifar(config: Mapping[str, Any]) -> ResNetCifarConfig:
    """Shape of the model that a `resnet_cifar` config describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    parsed = _parse(config, ResNetCifarConfig)
    if parsed.depth < 8 or (parsed.depth - 2) % (2 * STAGES):
        raise MpqError(
            f"config key 'depth' is {parsed.depth}: supported is 6n+2 with n of at least 1, such as 20 or 56"
        )
    return parsed


def stored_cifar(config: ResNetCifarConfig, path: str) -> Stored:
    """Where the checkpoint keeps the parameter at `path`: under the same name."""
    del config
    return pytorch_tensor(path, LINEAR if path.startswith("linear.") else CONV)


def stored_tiny(config: ResNetTinyConfig, path: str) -> Stored:
    """Where the checkpoint keeps the parameter at `path`: Keras numbers its layers in the order of their creation."""
    del config
    module, _, leaf = path.rpartition(".")
    return pytorch_tensor(f"{KERAS_NAMES[module]}.{leaf}", LINEAR if module == "dense" else CONV)


def _keras_names() -> dict[str, str]:
    """Our modules -> Keras names; a block's projection is made after its two convolutions."""
    units = ["stem", *[f"stages.{i}.{unit}" for i in range(STAGES) for unit in ("first", "second")]]
    convs = [f"{unit}.convolution" for unit in units]
    convs.insert(5, "stages.1.shortcut")
    convs.append("stages.2.shortcut")
    number = lambda name, i: f"{name}_{i}" if i else name
    names = {conv: number("conv2d", i) for i, conv in enumerate(convs)}
    names |= {f"{unit}.normalization": number("batch_normalization", i) for i, unit in enumerate(units)}
    return names | {"dense": "dense"}


KERAS_NAMES = _keras_names()

CIFAR = Family(
    name="resnet_cifar",
    architectures={"ResNetCifar": "classification"},
    parse=parse_cifar,
    build=lambda config: ResNetCifar(config, rngs=nnx.Rngs(0)),
    stored=stored_cifar,
    inputs=lambda config: Images(config.image_size, config.image_size),
    ignored=(NUM_BATCHES_TRACKED,),
)

MLPERF_TINY = Family(
    name="resnet_mlperf_tiny",
    architectures={"ResNetMLPerfTiny": "classification"},
    parse=lambda config: _parse(config, ResNetTinyConfig),
    build=lambda config: ResNetTiny(config, rngs=nnx.Rngs(0)),
    stored=stored_tiny,
    inputs=lambda config: Images(config.image_size, config.image_size),
    ignored=(NUM_BATCHES_TRACKED,),
)


def _parse(config: Mapping[str, Any], into: type[Any]) -> Any:
    values = {"num_labels": num_labels(config), "preprocessor": vision.parse_preprocessor(config)}
    return parse_strictly(without(config, "num_labels", "preprocessor"), into, only={}, defaults=values)


def _tiny_unit(inputs: int, outputs: int, stride: int, hidden_act: str | None, rngs: nnx.Rngs) -> ConvNorm:
    convolution = vision.conv(inputs, outputs, 3, rngs, stride=stride, padding="SAME", bias=True)
    return ConvNorm(convolution, rngs, hidden_act=hidden_act, epsilon=TINY_EPSILON)
