"""Inputs for distillation beside those that are there: what the quantized model cannot have learned by heart.

Text: windows spliced from two, with some tokens exchanged. What such a text says matters little, for the original model
says what comes next. Images: mirrored and moved.
"""

import numpy as np

from mpq.inputs import Dataset


def varied(data: Dataset, rows: np.ndarray, rng: np.random.Generator, *, noise: float, splice: bool) -> np.ndarray:
    """Some windows of a text, varied: `int32[len(rows), window]`.

    The first token of a window (BOS) and padding stay.

    Args:
      data: windows of tokens.
      rows: which of them.
      rng: of everything drawn.
      noise: share of tokens that are replaced by tokens drawn from all of `data`.
      splice: from a random place on, a window goes on as another one does there.
    """
    tokens, real = data.inputs[rows], data.mask[rows].copy()
    real[:, 0] = False
    if splice:
        other = rng.integers(len(data.inputs), size=len(rows))
        cut = rng.integers(tokens.shape[1], size=(len(rows), 1))
        take = (np.arange(tokens.shape[1]) >= cut) & real & data.mask[other]
        tokens = np.where(take, data.inputs[other], tokens)
    replace = (rng.random(tokens.shape) < noise) & real
    return np.where(replace, rng.choice(data.inputs[data.mask], tokens.shape), tokens).astype(data.inputs.dtype)


def moved(images: np.ndarray, rng: np.random.Generator, *, mirror: bool, shift: float) -> np.ndarray:
    """`[batch, height, width, channels]`, each image moved, and half of them mirrored.

    Args:
      images: as the model reads them.
      rng: of everything drawn.
      mirror: left for right, with a probability of one half.
      shift: at most this share of the height up or down, and of the width to either side; edges are repeated.
    """
    count, height, width, _ = images.shape
    far = [round(shift * size) for size in (height, width)]
    up, left = (rng.integers(2 * most + 1, size=count) for most in far)
    padded = np.pad(images, [(0, 0), *((most, most) for most in far), (0, 0)], mode="edge")
    rows, columns = up[:, None] + np.arange(height), left[:, None] + np.arange(width)
    if mirror:
        columns = np.where(rng.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
