"""A regression model to quantize: a coordinate network fitted to the elevation model that ships with matplotlib.

Run:     python -m experiments.terrain --out experiments/assets/terrain
Writes:  `model.safetensors` (bf16), `data.npz` (inputs and targets) and `card.json`; about two minutes on two cores.
Then:    mpq run experiments/configs/terrain.py

A multilayer perceptron on random Fourier features of the position (Tancik et al. 2020, arXiv:2006.10739, eq. 5) that
gives the elevation there. Storing a signal as the quantized weights of such a network is a way to compress it (Dupont
et al. 2021, arXiv:2103.03123). Data: the Jacksboro fault, 344 x 403 points, `jacksboro_fault_dem.npz` of matplotlib's
sample data. A tenth of the points, drawn at random, is never trained on.
"""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from safetensors.numpy import load_file, save

import mpq
from mpq.files import digest_arrays, write_bytes, write_json, writing
from mpq.progress import shown, track

WIDTH, FREQUENCIES, LAYERS = 128, 64, 3
KEPT = 8192
"""Training points that are kept for calibration."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Hyperparameters; they are written into the card."""

    steps: int = 6000
    batch: int = 2048
    lr: float = 2e-3
    bandwidth: float = 8.0
    """Standard deviation of the Fourier frequencies, in periods over the map."""
    seed: int = 0


class Field(nnx.Module):
    """Position `[batch, 2]` in [0, 1] to elevation `[batch, 1]` in standard deviations of the map."""

    def __init__(self, training: Training, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(training.bandwidth)
        self.features = nnx.Linear(2, FREQUENCIES, use_bias=False, kernel_init=normal, rngs=rngs)
        widths = [2 * FREQUENCIES, *[WIDTH] * LAYERS]
        self.hidden = nnx.List(nnx.Linear(k, n, rngs=rngs) for k, n in itertools.pairwise(widths))
        self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Elevation at each position."""
        angle = 2 * np.pi * self.features(x)
        h = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        for layer in self.hidden:
            h = nnx.gelu(layer(h))
        return self.out(h)


def points() -> tuple[np.ndarray, np.ndarray, float]:
    """All positions `float32[n, 2]`, standardized elevations `float32[n, 1]`, and the standard deviation in metres."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "jacksboro_fault_dem.npz"
    with np.load(path) as file:
        elevation = file["elevation"].astype(np.float64)
    rows, columns = elevation.shape
    grid = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    scale = float(elevation.std())
    inputs = np.stack(grid, axis=-1).reshape(-1, 2).astype(np.float32)
    return inputs, ((elevation - elevation.mean()) / scale).reshape(-1, 1).astype(np.float32), scale


def main(out: Path, training: Training = Training()) -> None:
    """Train and write the model, the data and a card."""
    inputs, targets, scale = points()
    held_out = np.random.default_rng(training.seed).random(len(inputs)) < 0.1
    graph, params = nnx.split(Field(training, nnx.Rngs(training.seed)), nnx.Param)
    optimizer = optax.adam(optax.cosine_decay_schedule(training.lr, training.steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(x) - y)))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    x, y = inputs[~held_out], targets[~held_out]
    with shown():
        for step in track(range(training.steps), "train", training.steps):
            rows = np.random.default_rng([training.seed, step]).integers(len(x), size=training.batch)
            params, state = update(params, state, x[rows], y[rows])
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    error = jax.jit(lambda p, x, y: jnp.mean(jnp.square(nnx.merge(graph, p)(x) - y)))
    mse = {
        "train": float(error(params, x, y)),
        "held_out": float(error(params, inputs[held_out], targets[held_out])),
    }
    tensors = {
        ".".join(map(str, path)): np.asarray(v.get_value()).astype(jnp.bfloat16)
        for path, v in nnx.to_flat_state(params)
    }
    some = np.random.default_rng(training.seed).permutation(len(x))[:KEPT]
    data = {"train_x": x[some], "train_y": y[some]}
    data |= {"test_x": inputs[held_out], "test_y": targets[held_out]}
    card = {
        "training": dataclasses.asdict(training),
        "mse": mse,
        "rmse_metres": {name: scale * value**0.5 for name, value in mse.items()},
        "metres_per_unit": scale,
        "parameters": sum(t.size for t in tensors.values()),
        "data_digest": digest_arrays(data),
        "weights_digest": digest_arrays({name: t.astype(np.float32) for name, t in tensors.items()}),
    }
    with writing(out) as folder:
        folder.mkdir()
        write_bytes(folder / "model.safetensors", save(tensors))
        with (folder / "data.npz").open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **data)
        write_json(folder / "card.json", card)
    print(json.dumps(card, indent=1))


def load_model(folder: Path) -> mpq.Model:
    """The trained network as a model for every stage; `experiments/configs/terrain_model.py` is its file."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    apply, _ = mpq.functional(nnx.eval_shape(lambda: Field(Training(), nnx.Rngs(0))))
    tensors = load_file(folder / "model.safetensors")
    params = {name: jnp.asarray(t.astype(np.float32)) for name, t in tensors.items()}
    task = mpq.Regression(variance=card["mse"]["held_out"])
    return mpq.Model(apply, params, dict.fromkeys(params, "bfloat16"), "terrain", mpq.Arrays((2,)), task)


if __name__ == "__main__":
    tyro.cli(main)
