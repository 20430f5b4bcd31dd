"""Vision families: what the trace finds in each, what is refused, and the accuracy of real models."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpq.inputs import Images
from mpq.models import FAMILIES, functional, load, mobilenet_v2, vision
from mpq.models.family import Stored
from mpq.types import MpqError
from tests import checkpoint_folders as folders
from tests.vision_cases import CASES, CIFAR, DEIT, IMAGENET, MOBILENET, PREPROCESSOR, RAW, TEACHER, TINY, resnet_shapes


def write(path, case, seed=0, shapes=None, drop=(), preprocessor=PREPROCESSOR, **changes):
    config, own = CASES[case]
    config = {key: value for key, value in (config | changes).items() if key not in drop}
    beside = {} if "preprocessor" in config or preprocessor is None else {"preprocessor": preprocessor}
    return folders.write(path, config, folders.random_tensors(shapes or own, seed), **beside)


def images(model, batch=2, seed=0):
    struct = model.inputs.struct(batch)
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, struct.shape, dtype=np.uint8))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Name, shapes and model of every case."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return request.param, CASES[request.param][1], load(write(folder, request.param))


def test_logits_are_finite_and_differ_from_image_to_image(case):
    _, _, model = case
    assert model.task.name == "classification"
    assert isinstance(model.inputs, Images)
    logits = model.apply(model.params, images(model, 3))
    assert logits.shape == (3, 3)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert np.ptp(logits, axis=0).max() > 1e-3


def without_ignored(shapes):
    """The tensors that a model needs: not counters, nor what only pretraining has."""
    ignored = ("num_batches_tracked", "mask_token", "pooler.dense.weight", "pooler.dense.bias")
    return {name: shape for name, shape in shapes.items() if not name.endswith(ignored)}


def test_every_tensor_is_a_parameter_or_ignored(case):
    _, shapes, model = case
    kept = without_ignored(shapes)
    assert len(model.params) == len(kept)
    assert model.num_parameters == sum(int(np.prod(shape)) for shape in kept.values())


def test_the_trace_finds_every_kernel_as_a_matrix(case):
    name, shapes, model = case
    found = model.trace(batch=2)
    by_path = {w.path: w for w in found.weights}
    assert set(by_path) == {path for path in model.params if path.endswith("kernel")}
    for path, weight in by_path.items():
        *window, inputs, outputs = model.params[path].shape
        depthwise = name == "mobilenet_v2" and inputs == 1
        assert weight.kind == ("conv" if window else "matmul")
        assert weight.batch == (outputs if depthwise else 1), path
        assert (weight.k, weight.n) == (int(np.prod(window)) * inputs, 1 if depthwise else outputs), path
    matrices = [shape for shape in without_ignored(shapes).values() if len(shape) in (2, 4)]
    assert sorted(w.size for w in found.weights) == sorted(int(np.prod(shape)) for shape in matrices)
    reasons = {s.path: s.reason for s in found.skipped if model.params[s.path].ndim > 1}
    assert reasons == {
        path: reason
        for path, reason in {
            "embeddings.cls_token": "broadcast over activations: a bias or a scale, not a matrix",
            "embeddings.distillation_token": "broadcast over activations: a bias or a scale, not a matrix",
            "embeddings.position_embeddings": "broadcast over activations: a bias or a scale, not a matrix",
        }.items()
        if path in model.params
    }


def test_weights_that_read_the_same_input_are_fused(case):
    name, _, model = case
    groups = {w.group for w in model.trace(batch=2).weights if w.group != w.path}
    attention = {f"layers.{i}.attention.{{query,key,value}}.kernel" for i in range(2)}
    # Where a bottleneck keeps the resolution, its first 1x1 convolution and its projection read one input.
    projection = {"{stages.0.layers.0.layer.0.convolution.kernel,stages.0.layers.0.shortcut.convolution.kernel}"}
    assert groups == {"vit": attention, "deit": attention, "deit with teacher": attention}.get(
        name, projection if name == "resnet bottleneck" else set()
    )


def test_a_distillation_token_and_a_second_head_change_the_logits(tmp_path):
    """With equal heads the mean of both is not the class token's logits."""
    shapes = CASES["deit with teacher"][1]
    tensors = folders.random_tensors(shapes)
    for leaf in ("weight", "bias"):
        tensors[f"distillation_classifier.{leaf}"] = tensors[f"cls_classifier.{leaf}"]
    both = load(folders.write(tmp_path / "both", TEACHER, tensors, preprocessor=PREPROCESSOR))
    one = {n.replace("cls_classifier", "classifier"): t for n, t in tensors.items() if "distillation_cl" not in n}
    single = load(folders.write(tmp_path / "one", DEIT, one, preprocessor=PREPROCESSOR))
    x = images(both)
    assert np.abs(both.apply(both.params, x) - single.apply(single.params, x)).max() > 1e-3


@pytest.mark.parametrize(
    ("given", "factor", "mean", "std"),
    [
        (PREPROCESSOR, 1 / 255, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]),
        (IMAGENET, 1 / 255, IMAGENET["image_mean"], IMAGENET["image_std"]),
        ({**PREPROCESSOR, "rescale_factor": 1 / 127.5}, 1 / 127.5, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]),
        ({**PREPROCESSOR, "do_rescale": False}, 1, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]),
        ({**PREPROCESSOR, "do_normalize": False}, 1 / 255, [0, 0, 0], [1, 1, 1]),
        (RAW, 1, [0, 0, 0], [1, 1, 1]),
    ],
)
def test_pixels_are_rescaled_and_normalized(given, factor, mean, std):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    got = vision.parse_preprocessor({"preprocessor": given})(jnp.asarray(pixels))
    assert got.dtype == jnp.float32
    want = (pixels * factor - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"size": {"height": 30, "width": 40}}, (30, 40)),
        ({"size": 48}, (48, 48)),
        ({"size": {"shortest_edge": 56}, "crop_pct": 0.875}, (56, 56)),
        ({"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 32, "width": 40}}, (32, 40)),
        ({"size": {"height": 30, "width": 40}, "do_center_crop": False, "crop_size": 20}, (30, 40)),
        ({"size": 64, "crop_size": 20}, (20, 20)),
    ],
)
def test_a_network_without_a_size_reads_what_its_preprocessor_makes(tmp_path, given, size):
    model = load(write(tmp_path / "m", "resnet", preprocessor=IMAGENET | given))
    assert model.inputs == Images(*size)


def test_a_preprocessor_in_the_config_equals_one_beside_it(tmp_path):
    inside = load(write(tmp_path / "a", "resnet_cifar"))
    beside = load(
        write(tmp_path / "b", "resnet_cifar", drop=("preprocessor",), preprocessor=CIFAR["preprocessor"]),
    )
    assert np.array_equal(inside.apply(inside.params, images(inside)), beside.apply(beside.params, images(beside)))


def test_gray_images_need_one_mean(tmp_path):
    shapes = resnet_shapes() | folders.conv("resnet.embedder.embedder.convolution", 8, 1, 7)
    gray = {**PREPROCESSOR, "image_mean": [0.5], "image_std": [0.2]}
    model = load(write(tmp_path / "m", "resnet", shapes=shapes, preprocessor=gray, num_channels=1))
    assert model.inputs == Images(32, 32, 1)
    assert np.isfinite(model.apply(model.params, images(model))).all()
    with pytest.raises(MpqError, match="one value for each of 1 channels"):
        load(write(tmp_path / "n", "resnet", shapes=shapes, num_channels=1))


@pytest.mark.parametrize(
    ("multiplier", "stem", "widths"),
    [
        (1.4, 48, [24, 32, 48, 88, 136, 224, 448]),
        (1.0, 32, [16, 24, 32, 64, 96, 160, 320]),
        (0.75, 24, [16, 24, 24, 48, 72, 120, 240]),
        (0.35, 16, [8, 8, 16, 24, 32, 56, 112]),
    ],
)
def test_mobilenet_widths_are_those_of_the_published_models(multiplier, stem, widths):
    config = mobilenet_v2.parse_config({**MOBILENET, "depth_multiplier": multiplier, "preprocessor": PREPROCESSOR})
    assert config.scaled(mobilenet_v2.STEM_CHANNELS) == stem
    assert list(dict.fromkeys(zip(map(config.scaled, mobilenet_v2.CHANNELS), mobilenet_v2.CHANNELS, strict=True))) == [
        *zip(widths, [16, 24, 32, 64, 96, 160, 320], strict=True)
    ]


VIT_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
PATCH_16 = {"image_size": 224, "patch_size": 16, "num_labels": 1000}
PUBLISHED = {
    "ResNet-18": ("resnet", {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}),
    "ResNet-50": (
        "resnet bottleneck",
        {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]},
    ),
    "ResNet-56": ("resnet_cifar", {"depth": 56, "width": 16, "num_labels": 10}),
    "MobileNetV2 1.0": ("mobilenet_v2", {"depth_multiplier": 1.0, "finegrained_output": True}),
    "SqueezeNet 1.0": ("squeezenet 1.0", {}),
    "SqueezeNet 1.1": ("squeezenet 1.1", {}),
    "ViT-B/16": ("vit", VIT_BASE | PATCH_16),
    "DeiT-B/16 distilled": ("deit with teacher", VIT_BASE | PATCH_16),
}
PARAMETERS = {
    "ResNet-18": 11_689_512,
    "ResNet-50": 25_557_032,
    "ResNet-56": 853_018,
    "MobileNetV2 1.0": 3_504_872,
    "SqueezeNet 1.0": 1_248_424,
    "SqueezeNet 1.1": 1_235_496,
    "ViT-B/16": 86_567_656,
    "DeiT-B/16 distilled": 87_338_192,
}
"""As the tables of torchvision and timm count them, and akamaster/pytorch_resnet_cifar: without running statistics."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    case, changes = PUBLISHED[name]
    config = CASES[case][0] | {"preprocessor": IMAGENET, "num_labels": 1000} | changes
    config = {key: value for key, value in config.items() if key != "id2label"}
    family = FAMILIES[config["model_type"]]
    _, shapes = functional(nnx.eval_shape(lambda: family.build(family.parse(config))))
    learned = {path: shape for path, shape in shapes.items() if not path.endswith((".mean", ".var"))}
    assert sum(int(np.prod(shape.shape)) for shape in learned.values()) == PARAMETERS[name]


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_mobilenet_keeps_its_resolution_from_the_output_stride_on(output_stride):
    found = mobilenet_v2.strides(output_stride)
    assert 2 * int(np.prod([stride for stride, _ in found])) == output_stride
    # what the strides do not do, the dilation does: the last block sees as far as in the undilated network
    assert found[-1][1] * output_stride == 32


def test_keras_numbers_a_projection_after_the_convolutions_of_its_block():
    from mpq.models.resnet_cifar import MLPERF_TINY

    name = lambda path: MLPERF_TINY.stored(None, path)
    assert name("stages.1.shortcut.kernel") == Stored(("conv2d_5.weight",), (2, 3, 1, 0))
    assert name("stages.2.shortcut.bias") == Stored(("conv2d_8.bias",))
    assert name("stages.2.first.normalization.mean") == Stored(("batch_normalization_5.running_mean",))
    assert name("dense.kernel") == Stored(("dense.weight",), (1, 0))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("resnet", {"hidden_act": "mish"}, "'hidden_act' is 'mish': supported is 'gelu'"),
        ("resnet", {"layer_type": "preact"}, "'layer_type' is 'preact': supported is 'basic', 'bottleneck'"),
        ("resnet", {"depths": [2, 1, 1]}, r"hidden_sizes \(8, 16\) and depths \(2, 1, 1\) differ"),
        ("resnet", {"groups": 32}, r"'groups' \(value 32\) is unknown"),
        ("resnet", {"depths": [2, 2]}, r"lacks the tensor 'resnet\.encoder\.stages\.1\.layers\.1"),
        ("resnet", {"depths": [1, 1]}, r"holds the tensor 'resnet\.encoder\.stages\.0\.layers\.1"),
        ("resnet", {"id2label": {"0": "a"}}, r"tensor 'classifier\.1\.\w+' has shape"),
        ("resnet", {"architectures": ["ResNetModel"]}, "'ResNetModel'.*supported is"),
        ("resnet", {"id2label": {}}, "has 0 labels"),
        ("resnet_cifar", {"depth": 9}, "'depth' is 9: supported is 6n"),
        ("resnet_cifar", {"depth": 2}, "'depth' is 2: supported is 6n"),
        ("resnet_cifar", {"shortcut": "B"}, r"'shortcut' \(value 'B'\) is unknown"),
        ("resnet_mlperf_tiny", {"width": 8}, r"'width' \(value 8\) is unknown"),
        ("mobilenet_v2", {"output_stride": 4}, "'output_stride' is 4: supported is 8, 16, 32"),
        ("mobilenet_v2", {"hidden_act": "hardswish"}, "'hidden_act' is 'hardswish'"),
        ("mobilenet_v2", {"padding_mode": "reflect"}, r"'padding_mode' \(value 'reflect'\) is unknown"),
        ("mobilenet_v2", {"first_layer_is_expansion": False}, r"lacks the tensor 'mobilenet_v2\.conv_stem\.expand_1x1"),
        ("squeezenet 1.1", {"version": "2"}, "'version' is '2': supported is '1_0', '1_1'"),
        ("squeezenet 1.1", {"version": "1_0"}, r"lacks the tensor 'features\.5"),
        ("squeezenet 1.1", {"dropout": 0.5}, r"'dropout' \(value 0.5\) is unknown"),
        ("vit", {"hidden_act": "quick_gelu"}, "'hidden_act' is 'quick_gelu'"),
        ("vit", {"num_attention_heads": 3}, "'num_attention_heads' is 3: it has to divide hidden_size 16"),
        ("vit", {"use_cls_token": False}, r"'use_cls_token' \(value False\) is unknown"),
        ("vit", {"patch_size": 4}, r"tensor 'vit\.embeddings\.\S+' has shape"),
        ("vit", {"qkv_bias": False}, r"holds the tensor 'vit\.encoder\.layer\.0\.attention\.attention\.key\.bias'"),
        ("deit", {"architectures": ["DeiTForImageClassificationWithTeacher"]}, "lacks the tensor 'cls_classifier"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, case, changes, message):
    with pytest.raises(MpqError, match=message):
        load(write(tmp_path / "m", case, **changes))


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        (None, r"no preprocessor_config\.json"),
        ({"size": 32}, "image_mean None and image_std None"),
        ({**PREPROCESSOR, "image_std": [0.5]}, "one value for each of 3 channels"),
        ({**PREPROCESSOR, "do_flip_channel_order": True}, r"'do_flip_channel_order' \(value True\) is unknown"),
        (IMAGENET, "states no size"),
    ],
)
def test_a_preprocessor_that_does_not_fit_is_refused(tmp_path, preprocessor, message):
    with pytest.raises(MpqError, match=message):
        load(write(tmp_path / "m", "resnet", preprocessor=preprocessor))


@pytest.mark.parametrize(
    ("file", "config", "correct", "parameters"),
    [
        ("resnet20_cifar10", {**CIFAR, "depth": 20, "width": 16}, 854, 271_098),  # 91.63 %
        ("resnet8_mlperftiny_cifar10", TINY, 818, 78_666),  # 87.77 %
    ],
)
def test_real_models_classify_as_many_images_as_they_should(shared_data, tmp_path, file, config, correct, parameters):
    folders.write(tmp_path / "m", {**config, "num_labels": 10, "image_size": 32}, {})
    shutil.copy(shared_data / "vision" / f"{file}.safetensors", tmp_path / "m" / "model.safetensors")
    model = load(str(tmp_path / "m"))
    assert model.num_parameters == parameters
    with np.load(shared_data / "vision" / "cifar10_lossless_head.npz") as data:
        x, y = data["test_x"], data["test_y"]
    classify = jax.jit(lambda params, batch: model.apply(params, batch).argmax(-1))
    found = [classify(model.params, jnp.asarray(batch)) for batch in np.split(x, 4)]
    assert int((np.concatenate(found) == y).sum()) == correct
