"""The ResNet for CIFAR of He et al. (arXiv:1512.03385, section 4.2, shortcuts of option A) as a module of PyTorch.

PT2E wants convolutions and norms as PyTorch's own layers trace to, so that it finds and fuses them; names of the layers
are those of the checkpoint. Weights and images come as `mpq` reads them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def resnet(torch: Any, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """A module of `uint8[batch, height, width, 3]` to logits, in evaluation mode.

    Args:
      torch: the package.
      config: of a checkpoint of family `resnet_cifar`.
      tensors: its weights by name.
    """
    nn, pixels = torch.nn, config["preprocessor"]
    norm = lambda channels: nn.BatchNorm2d(channels, eps=config.get("batch_norm_eps", 1e-5))
    conv = lambda given, made, stride=1: nn.Conv2d(given, made, 3, stride, padding=1, bias=False)

    class Block(nn.Module):
        def __init__(self, given: int, made: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(given, made, made // given), norm(made)
            self.conv2, self.bn2 = conv(made, made), norm(made)

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            new = y.shape[1] - x.shape[1]
            if new:
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new - new // 2))
            return torch.relu(y + x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, blocks = config["width"], (config["depth"] - 2) // 6
            self.conv1, self.bn1 = conv(3, width), norm(width)
            sizes = [(width, width), (width, 2 * width), (2 * width, 4 * width)]
            stages = [
                nn.Sequential(*(Block(given if i == 0 else made, made) for i in range(blocks))) for given, made in sizes
            ]
            self.layer1, self.layer2, self.layer3 = stages
            self.linear = nn.Linear(4 * width, config["num_labels"])
            self.mean, self.std = (torch.tensor(pixels[key]) for key in ("image_mean", "image_std"))

        def forward(self, images: Any) -> Any:
            x = ((images.float() * pixels["rescale_factor"] - self.mean) / self.std).permute(0, 3, 1, 2)
            x = torch.relu(self.bn1(self.conv1(x)))
            return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))

    made = Network()
    made.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, strict=False)
    return made.eval()
