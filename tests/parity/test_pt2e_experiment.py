"""What `experiments.pt2e` starts from, and what it refuses; torchao itself is no dependency."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from experiments import pt2e
from experiments.pt2e import Options
from experiments.pt2e_resnet import resnet
from tests import tiny
from tests.runtime_cases import made, message_of, some_inputs

pytestmark = pytest.mark.parity


def test_the_network_in_pytorch_is_the_one_in_jax(tmp_path):
    model = made("resnet_cifar", tmp_path)
    module = resnet(torch, model.config, load_file(tmp_path / "model.safetensors"))
    images = some_inputs(model, 3, 0)
    want = np.asarray(jax.jit(model.apply)(model.params, images))
    with torch.no_grad():
        got = module(torch.from_numpy(images)).numpy()
    # Sums of another order: 2^-24 of the largest value in each of a few dozen steps.
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_what_a_program_reads(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("read", torch.zeros(5, dtype=torch.int8))
            self.register_buffer("left", torch.zeros(7))

        def forward(self, x):
            return x + self.read

    assert pt2e.stored_bytes(torch.export.export(Two(), (torch.zeros(5),), strict=False)) == 5


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    root = tmp_path_factory.mktemp("pt2e")
    of_text = {"windows": 4, "test_windows": 4, "window": 16, "batch_size": 4}
    return Options(**tiny.model_and_texts(root), out=root / "tiny.json", **of_text)


def test_an_unknown_quantizer(options):
    message = "unknown quantizer 'xnnpack': the valid ones are histogram, minmax"
    assert message_of(lambda: pt2e.main(dataclasses.replace(options, quantizers=("xnnpack",)))) == message


def test_another_family(options):
    message = f"{options.model} is of another family: PT2E is compared on resnet_cifar"
    assert message_of(lambda: pt2e.main(options)) == message
    assert not Path(options.out).exists()
