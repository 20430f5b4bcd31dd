"""Text for distillation beside the text that is there: windows spliced from two, with some tokens exchanged.

What such a text says matters little, for the original model says what comes next; what matters is that the quantized
model meets contexts that it cannot have learned by heart.
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
