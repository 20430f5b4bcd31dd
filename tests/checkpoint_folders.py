"""Random checkpoints in the Hugging Face layout from lists of names and shapes: what tests of model families load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Shapes = Mapping[str, tuple[int, ...]]


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors large enough that every layer matters: matrices keep the size of what they multiply.

    Norms are about 1, variances between 0.5 and 1.5, counters 7.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7)
        elif name.endswith("position_ids"):
            tensors[name] = np.arange(shape[-1])[None]
        elif name.endswith("running_var"):
            tensors[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif len(shape) == 1:
            tensors[name] = (0.3 * rng.normal(size=shape) + name.endswith("weight")).astype(np.float32)
        else:
            tensors[name] = (rng.normal(size=shape) * 1.5 / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return tensors


def linear(name: str, n: int, k: int) -> Shapes:
    """A linear layer with a bias."""
    return {f"{name}.weight": (n, k), f"{name}.bias": (n,)}


def norm(name: str, features: int) -> Shapes:
    """A layer norm."""
    return {f"{name}.weight": (features,), f"{name}.bias": (features,)}


def batch_norm(name: str, features: int, *, counter: bool = False) -> Shapes:
    """A batch norm, with the counter of training steps that PyTorch stores since version 0.4.1."""
    shapes = {f"{name}.{leaf}": (features,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    return shapes | ({f"{name}.num_batches_tracked": ()} if counter else {})


def conv(name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = False) -> Shapes:
    """A convolution; `inputs` are those of one group."""
    weight = {f"{name}.weight": (outputs, inputs, kernel, kernel)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], **beside: Any) -> str:
    """A checkpoint folder; returns its path.

    Args:
      path: of the folder.
      config: its `config.json`.
      tensors: of `model.safetensors`.
      beside: other JSON files, by the key of `mpq.models.checkpoint.SIDECARS`.
    """
    from mpq.models.checkpoint import SIDECARS

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "model.safetensors")
    for key, body in beside.items():
        file = path / SIDECARS[key]
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(body))
    return str(path)
