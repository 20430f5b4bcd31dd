"""Our vision families against `transformers`, and against PyTorch modules where it has none; the bound is 1e-4.

All in float32, on random models whose batch norms have random statistics and affine parameters. torchvision is not
needed: SqueezeNet and the ResNets for CIFAR are written here in PyTorch from their papers. Measured, largest difference
and the largest logit of that model: ResNets 1.8e-6 of 8, ViT and DeiT 1.3e-6 of 3, SqueezeNet 1.1e-5 of 13, MobileNetV2
3.1e-5 of 24.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from mpq.models import load

pytestmark = pytest.mark.parity

ATOL = 1e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def randomized(model, gain=1.2):
    """Norms, statistics and biases away from the ones and zeros that would hide a missing or swapped one.

    `gain` is how much larger the output of a layer is than its input: deep networks must neither die nor explode.
    """
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, gain / np.sqrt(module.weight[0].numel()))
                if module.bias is not None:
                    module.bias.normal_(0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith(("_token", "position_embeddings")):
                parameter.normal_(0, 0.5)
    return model.eval()


def pixels(size, batch=3):
    """Noise and a gradient of its own in each image: of noise alone the mean over positions is always the same."""
    rng = np.random.default_rng(0)
    row, column = (np.linspace(-1, 1, n) for n in size)
    slope = rng.normal(size=(3, batch, 1, 1, 3))
    image = slope[0] + slope[1] * row[:, None, None] + slope[2] * column[:, None]
    return np.clip(128 + 60 * image + rng.normal(0, 30, image.shape), 0, 255).astype(np.uint8)


def normalized(images):
    x = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    return torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)


def compare(folder, images, want, size=None):
    size = size or images.shape[1]
    preprocessor = {"image_mean": MEAN, "image_std": STD, "size": {"height": size, "width": size}}
    if not json.loads((folder / "config.json").read_text()).get("preprocessor"):
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    model = load(str(folder))
    got = np.asarray(model.apply(model.params, jnp.asarray(images)))
    want = want.numpy()
    assert got.shape == want.shape
    assert 0.1 < np.abs(want).max() < 100
    assert np.ptp(want, axis=0).max() > 0.1  # the images, not the biases, decide
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


def compare_hugging_face(folder, model, images):
    model = randomized(model)
    model.save_pretrained(folder)
    with torch.no_grad():
        want = model(normalized(images)).logits
    compare(folder, images, want)


RESNETS = {
    "basic": {"layer_type": "basic", "hidden_sizes": [8, 16, 24], "depths": [2, 1, 2]},
    "bottleneck": {"layer_type": "bottleneck", "hidden_sizes": [16, 32], "depths": [1, 2]},
    "stride in the first 1x1": {"hidden_sizes": [16, 32], "depths": [2, 1], "downsample_in_bottleneck": True},
    "stride in the first stage": {"hidden_sizes": [16, 32], "depths": [1, 1], "downsample_in_first_stage": True},
    "stride in a basic first stage": {
        "layer_type": "basic",
        "hidden_sizes": [8, 16],
        "depths": [2, 2],
        "downsample_in_first_stage": True,
        "downsample_in_bottleneck": True,
    },
    "another activation": {"hidden_sizes": [16, 32], "depths": [1, 1], "hidden_act": "gelu"},
}


@pytest.mark.parametrize("options", RESNETS.values(), ids=RESNETS.keys())
def test_resnet(tmp_path, options):
    config = transformers.ResNetConfig(embedding_size=8, num_labels=3, **options)
    # 45 pixels are an odd number before some strides, and an even one before others: 45, 23, 12, 6
    compare_hugging_face(tmp_path, transformers.ResNetForImageClassification(config), pixels((45, 45)))


MOBILENETS = {
    "as usual": {},
    "symmetric padding": {"tf_padding": False},
    "odd sizes": {"image_size": 50},
    "odd sizes, symmetric padding": {"image_size": 50, "tf_padding": False},
    "expansion of its own": {"first_layer_is_expansion": False},
    "output stride 16": {"output_stride": 16},
    "output stride 8": {"output_stride": 8},
    "output stride 8, symmetric": {"output_stride": 8, "tf_padding": False},
    "coarse output": {"finegrained_output": False},
    "wide": {"depth_multiplier": 0.35, "expand_ratio": 3.0},
    "relu, small epsilon": {"hidden_act": "relu", "layer_norm_eps": 1e-5},
}


@pytest.mark.parametrize("options", MOBILENETS.values(), ids=MOBILENETS.keys())
def test_mobilenet_v2(tmp_path, options):
    config = transformers.MobileNetV2Config(**({"depth_multiplier": 0.1, "image_size": 64, "num_labels": 4} | options))
    compare_hugging_face(
        tmp_path, transformers.MobileNetV2ForImageClassification(config), pixels([config.image_size] * 2)
    )


VITS = {
    "as usual": {},
    "no biases": {"qkv_bias": False},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "not square": {"image_size": [16, 32], "patch_size": [8, 4]},
    "large epsilon": {"layer_norm_eps": 1e-2},
}
CLASSIFIERS = {
    "vit": (transformers.ViTConfig, transformers.ViTForImageClassification),
    "deit": (transformers.DeiTConfig, transformers.DeiTForImageClassification),
    "deit with teacher": (transformers.DeiTConfig, transformers.DeiTForImageClassificationWithTeacher),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("options", VITS.values(), ids=VITS.keys())
def test_vit_and_deit(tmp_path, kind, options):
    make_config, make_model = CLASSIFIERS[kind]
    base = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
        "num_labels": 5,
    }
    config = make_config(**(base | options))
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    compare_hugging_face(tmp_path, make_model(config), pixels(size))


def compare_written_here(folder, config, model, images, inputs, **options):
    model = randomized(model, **options)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    with torch.no_grad():
        want = model(inputs)
    compare(folder, images, want)


class Fire(nn.Module):
    def __init__(self, inputs, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = functional.relu(self.squeeze(x))
        return functional.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


class SqueezeNet(nn.Module):
    """The layers, numbered as torchvision numbers them."""

    def __init__(self, version, labels):
        super().__init__()
        pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)
        if version == "1_0":
            body = [pool(), Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128)]
            body += [pool(), Fire(256, 32, 128), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256)]
            body += [pool(), Fire(512, 64, 256)]
        else:
            body = [pool(), Fire(64, 16, 64), Fire(128, 16, 64)]
            body += [pool(), Fire(128, 32, 128), Fire(256, 32, 128)]
            body += [pool(), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)]
        stem = nn.Conv2d(3, 96, 7, stride=2) if version == "1_0" else nn.Conv2d(3, 64, 3, stride=2)
        self.features = nn.Sequential(stem, nn.ReLU(), *body)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(512, labels, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return self.classifier(self.features(x)).flatten(1)


@pytest.mark.parametrize("version", ["1_0", "1_1"])
@pytest.mark.parametrize("size", [33, 51])
def test_squeezenet(tmp_path, version, size):
    config = {
        "model_type": "squeezenet",
        "architectures": ["SqueezeNet"],
        "version": version,
        "num_labels": 6,
        "image_size": size,
    }
    images = pixels((size, size))
    # no norms here: ReLU halves the power, and biases would win
    compare_written_here(tmp_path, config, SqueezeNet(version, 6), images, normalized(images), gain=1.5)


class CifarBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.grow = outputs - inputs
        stride = 2 if self.grow else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            zeros = torch.zeros(len(x), self.grow // 2, (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
            x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
        return functional.relu(x + y)


class ResNetCifar(nn.Module):
    def __init__(self, blocks, width, labels):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage in (1, 2, 3):
            outputs = width * 2 ** (stage - 1)
            inputs = [outputs // 2 if stage > 1 else width] + [outputs] * (blocks - 1)
            setattr(self, f"layer{stage}", nn.Sequential(*[CifarBlock(k, outputs) for k in inputs]))
        self.linear = nn.Linear(4 * width, labels)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.mark.parametrize(("depth", "width", "size"), [(20, 8, 32), (8, 4, 21)])
def test_resnet_cifar(tmp_path, depth, width, size):
    config = {
        "model_type": "resnet_cifar",
        "architectures": ["ResNetCifar"],
        "depth": depth,
        "width": width,
        "num_labels": 10,
        "image_size": size,
    }
    images = pixels((size, size))
    compare_written_here(tmp_path, config, ResNetCifar((depth - 2) // 6, width, 10), images, normalized(images))


class ResNetTiny(nn.Module):
    """Layers under the names that Keras gave them; TensorFlow's padding of an even size is one zero at the end."""

    def __init__(self, labels):
        super().__init__()
        wiring = [(3, 16, 3), (16, 16, 3), (16, 16, 3), (16, 32, 3), (32, 32, 3), (16, 32, 1)]
        wiring += [(32, 64, 3), (64, 64, 3), (32, 64, 1)]
        self.strides = {3: 2, 5: 2, 6: 2, 8: 2}
        number = lambda name, i: f"{name}_{i}" if i else name
        self.convs, self.norms = [], []
        for i, (inputs, outputs, kernel) in enumerate(wiring):
            self.convs.append(nn.Conv2d(inputs, outputs, kernel))
            self.add_module(number("conv2d", i), self.convs[-1])
        for i, features in enumerate((16, 16, 16, 32, 32, 64, 64)):
            self.norms.append(nn.BatchNorm2d(features, eps=1e-3))
            self.add_module(number("batch_normalization", i), self.norms[-1])
        self.dense = nn.Linear(64, labels)

    def conv(self, i, x):
        convolution, stride = self.convs[i], self.strides.get(i, 1)
        if convolution.kernel_size == (3, 3):
            x = functional.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        return functional.conv2d(x, convolution.weight, convolution.bias, stride)

    def forward(self, x):
        relu, norm = functional.relu, self.norms
        x = relu(norm[0](self.conv(0, x)))
        x = relu(x + norm[2](self.conv(2, relu(norm[1](self.conv(1, x))))))
        x = relu(self.conv(5, x) + norm[4](self.conv(4, relu(norm[3](self.conv(3, x))))))
        x = relu(self.conv(8, x) + norm[6](self.conv(7, relu(norm[5](self.conv(6, x))))))
        return self.dense(x.mean((2, 3)))


def test_resnet_mlperf_tiny(tmp_path):
    config = {
        "model_type": "resnet_mlperf_tiny",
        "architectures": ["ResNetMLPerfTiny"],
        "num_labels": 10,
        "preprocessor": {"do_rescale": True, "rescale_factor": 1 / 64, "do_normalize": False},
    }
    images = pixels((32, 32))
    inputs = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32) / 64
    compare_written_here(tmp_path, config, ResNetTiny(10), images, inputs)
