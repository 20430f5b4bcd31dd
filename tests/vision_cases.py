"""One small checkpoint of every vision family: its config, and its tensors by name, written by hand."""

from tests import checkpoint_folders as folders

LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}}
PREPROCESSOR = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "size": {"height": 32, "width": 32},
    "resample": 2,
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
RAW = {"do_rescale": False, "do_normalize": False}


def unit(name, outputs, inputs, kernel):
    """A convolution and its batch norm, as Hugging Face names them."""
    found = folders.conv(f"{name}.convolution", outputs, inputs, kernel)
    return found | folders.batch_norm(f"{name}.normalization", outputs, counter=True)


RESNET = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [2, 1],
    "layer_type": "basic",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "out_features": None,
    "out_indices": None,
    "stage_names": ["stem", "stage1", "stage2"],
    **LABELS,
}


def resnet_shapes():
    found = unit("resnet.embedder.embedder", 8, 3, 7)
    for stage, block, inputs, outputs in ((0, 0, 8, 8), (0, 1, 8, 8), (1, 0, 8, 16)):
        name = f"resnet.encoder.stages.{stage}.layers.{block}"
        found |= unit(f"{name}.layer.0", outputs, inputs, 3) | unit(f"{name}.layer.1", outputs, outputs, 3)
        if inputs != outputs:
            found |= unit(f"{name}.shortcut", outputs, inputs, 1)
    return found | folders.linear("classifier.1", 3, 16)


BOTTLENECK = {**RESNET, "layer_type": "bottleneck", "hidden_sizes": [16, 32], "depths": [1, 2]}


def bottleneck_shapes():
    found = unit("resnet.embedder.embedder", 8, 3, 7)
    for stage, block, inputs, outputs in ((0, 0, 8, 16), (1, 0, 16, 32), (1, 1, 32, 32)):
        name, inner = f"resnet.encoder.stages.{stage}.layers.{block}", outputs // 4
        found |= unit(f"{name}.layer.0", inner, inputs, 1) | unit(f"{name}.layer.1", inner, inner, 3)
        found |= unit(f"{name}.layer.2", outputs, inner, 1)
        if inputs != outputs:
            found |= unit(f"{name}.shortcut", outputs, inputs, 1)
    return found | folders.linear("classifier.1", 3, 32)


CIFAR = {
    "architectures": ["ResNetCifar"],
    "model_type": "resnet_cifar",
    "depth": 8,
    "width": 4,
    "num_labels": 3,
    "image_size": 16,
    "preprocessor": {"rescale_factor": 1 / 255, **IMAGENET},
}


def cifar_shapes():
    found = folders.conv("conv1", 4, 3, 3) | folders.batch_norm("bn1", 4, counter=True)
    for stage, inputs, outputs in ((1, 4, 4), (2, 4, 8), (3, 8, 16)):
        name = f"layer{stage}.0"
        for i, (k, n) in enumerate(((inputs, outputs), (outputs, outputs)), 1):
            found |= folders.conv(f"{name}.conv{i}", n, k, 3) | folders.batch_norm(f"{name}.bn{i}", n)
    return found | folders.linear("linear", 3, 16)


TINY = {
    "architectures": ["ResNetMLPerfTiny"],
    "model_type": "resnet_mlperf_tiny",
    "num_labels": 3,
    "image_size": 16,
    "preprocessor": RAW,
}


def tiny_shapes():
    number = lambda name, i: f"{name}_{i}" if i else name
    convs = ((16, 3, 3), (16, 16, 3), (16, 16, 3), (32, 16, 3), (32, 32, 3), (32, 16, 1))
    convs += ((64, 32, 3), (64, 64, 3), (64, 32, 1))
    found = {}
    for i, (n, k, size) in enumerate(convs):
        found |= folders.conv(number("conv2d", i), n, k, size, bias=True)
    for i, features in enumerate((16, 16, 16, 32, 32, 64, 64)):
        found |= folders.batch_norm(number("batch_normalization", i), features)
    return found | folders.linear("dense", 3, 64)


MOBILENET = {
    "architectures": ["MobileNetV2ForImageClassification"],
    "model_type": "mobilenet_v2",
    "num_channels": 3,
    "image_size": 32,
    "depth_multiplier": 0.05,
    "depth_divisible_by": 8,
    "min_depth": 8,
    "expand_ratio": 6.0,
    "output_stride": 32,
    "first_layer_is_expansion": True,
    "finegrained_output": False,
    "hidden_act": "relu6",
    "tf_padding": True,
    "classifier_dropout_prob": 0.8,
    "layer_norm_eps": 0.001,
    "semantic_loss_ignore_index": 255,
    **LABELS,
}


def mobilenet_shapes():
    top = "mobilenet_v2."
    found = unit(f"{top}conv_stem.first_conv", 8, 3, 3) | unit(f"{top}conv_stem.conv_3x3", 8, 1, 3)
    found |= unit(f"{top}conv_stem.reduce_1x1", 8, 8, 1)
    for i in range(16):
        name, outputs = f"{top}layer.{i}", 16 if i == 15 else 8
        found |= unit(f"{name}.expand_1x1", 48, 8, 1) | unit(f"{name}.conv_3x3", 48, 1, 3)
        found |= unit(f"{name}.reduce_1x1", outputs, 48, 1)
    return found | unit(f"{top}conv_1x1", 64, 16, 1) | folders.linear("classifier", 3, 64)


SQUEEZENET = {
    "architectures": ["SqueezeNet"],
    "model_type": "squeezenet",
    "version": "1_1",
    "num_labels": 3,
    "image_size": 33,
    "preprocessor": IMAGENET,
}
FIRES = {  # torchvision: number in `features` -> squeeze channels
    "1_0": {3: 16, 4: 16, 5: 32, 7: 32, 8: 48, 9: 48, 10: 64, 12: 64},
    "1_1": {3: 16, 4: 16, 6: 32, 7: 32, 9: 48, 10: 48, 11: 64, 12: 64},
}


def squeezenet_shapes(version="1_1"):
    stem, kernel = {"1_0": (96, 7), "1_1": (64, 3)}[version]
    found, inputs = dict(folders.conv("features.0", stem, 3, kernel, bias=True)), stem
    for number, squeeze in FIRES[version].items():
        name = f"features.{number}"
        found |= folders.conv(f"{name}.squeeze", squeeze, inputs, 1, bias=True)
        found |= folders.conv(f"{name}.expand1x1", 4 * squeeze, squeeze, 1, bias=True)
        found |= folders.conv(f"{name}.expand3x3", 4 * squeeze, squeeze, 3, bias=True)
        inputs = 8 * squeeze
    return found | folders.conv("classifier.1", 3, inputs, 1, bias=True)


VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "qkv_bias": True,
    "encoder_stride": 16,
    **LABELS,
}


def vit_shapes(prefix="vit", first=1, heads=("classifier",)):
    found = {f"{prefix}.embeddings.cls_token": (1, 1, 16), f"{prefix}.embeddings.mask_token": (1, 1, 16)}
    if first == 2:
        found[f"{prefix}.embeddings.distillation_token"] = (1, 1, 16)
    found[f"{prefix}.embeddings.position_embeddings"] = (1, 16 + first, 16)
    found |= folders.conv(f"{prefix}.embeddings.patch_embeddings.projection", 16, 3, 8, bias=True)
    for i in range(2):
        layer = f"{prefix}.encoder.layer.{i}."
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            found |= folders.linear(f"{layer}{name}", 16, 16)
        found |= folders.linear(f"{layer}attention.output.dense", 16, 16)
        found |= folders.linear(f"{layer}intermediate.dense", 24, 16) | folders.linear(f"{layer}output.dense", 16, 24)
        found |= folders.norm(f"{layer}layernorm_before", 16) | folders.norm(f"{layer}layernorm_after", 16)
    found |= folders.norm(f"{prefix}.layernorm", 16) | folders.linear(f"{prefix}.pooler.dense", 16, 16)
    for head in heads:
        found |= folders.linear(head, 3, 16)
    return found


DEIT = {**VIT, "architectures": ["DeiTForImageClassification"], "model_type": "deit"}
TEACHER = {**DEIT, "architectures": ["DeiTForImageClassificationWithTeacher"]}

CASES = {
    "resnet": (RESNET, resnet_shapes()),
    "resnet bottleneck": (BOTTLENECK, bottleneck_shapes()),
    "resnet_cifar": (CIFAR, cifar_shapes()),
    "resnet_mlperf_tiny": (TINY, tiny_shapes()),
    "mobilenet_v2": (MOBILENET, mobilenet_shapes()),
    "squeezenet 1.0": ({**SQUEEZENET, "version": "1_0"}, squeezenet_shapes("1_0")),
    "squeezenet 1.1": (SQUEEZENET, squeezenet_shapes()),
    "vit": (VIT, vit_shapes()),
    "deit": (DEIT, vit_shapes("deit", 2)),
    "deit with teacher": (TEACHER, vit_shapes("deit", 2, ("cls_classifier", "distillation_classifier"))),
}
