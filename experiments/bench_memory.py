"""How much memory sensitivity metrics take, in sizes of the float32 weights.

Run:     python -m experiments.bench_memory --out FILE
Expect:  `peak_over_weights` below 3 for six schemes: weights, one more copy of them or the packed candidates, the rest
Writes:  one JSON object: megabytes, and for every metric the peak of its process

Llamas with random weights and one short window, so that weights outweigh activations. JAX, the compiler and its
programs take memory too, the same for any width. So every metric runs on two models of one depth, each in a process of
its own, and what counts is the difference of the two peaks over the difference of the two sizes. That includes the
weights themselves, all candidates, and activations as far as they grow with the width.

What counts is what is asked for. The GNU C library keeps large pieces that were given back for later, and holds some
more of the weights' size so; `MALLOC_MMAP_THRESHOLD_` in the environment keeps it from that, here as in any other run.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from mpq.files import write_json
from mpq.formats import parse_scheme
from mpq.inputs import Dataset, Tokens
from mpq.models.llama import Llama, LlamaConfig
from mpq.models.model import Model, functional
from mpq.quantize import RTN, Candidates
from mpq.sensitivity import METRICS
from mpq.tasks import CausalLM

VOCABULARY, HEAD_DIM = 4096, 64
THRESHOLD, THRESHOLD_BYTES = "MALLOC_MMAP_THRESHOLD_", "262144"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      out: JSON file, or None.
      metrics: by name.
      schemes: columns of the tables.
      hidden: widths of the two models.
      layers: their depth.
      window: tokens of the one window.
      seed: of weights, tokens and keys.
    """

    out: Path | None = None
    metrics: tuple[str, ...] = ("kl", "fisher", "gauss_newton", "layer_error", "weight_mse")
    schemes: tuple[str, ...] = ("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64")
    hidden: tuple[int, int] = (512, 1024)
    layers: int = 6
    window: int = 64
    seed: int = 0


def main(options: Options) -> None:
    """Measure, print, write."""
    os.environ[THRESHOLD] = THRESHOLD_BYTES
    spawn = multiprocessing.get_context("spawn")
    peaks: dict[str, list[int]] = {}
    for metric in options.metrics:
        for hidden in options.hidden:
            with spawn.Pool(1) as pool:
                peaks.setdefault(metric, []).append(pool.apply(peak, (options, metric, hidden)))
    small, large = (weight_bytes(options, hidden) for hidden in options.hidden)
    body = {
        "weights_mb": [small / 1e6, large / 1e6],
        "schemes": options.schemes,
        "window": options.window,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "environment": {THRESHOLD: THRESHOLD_BYTES},
        "peak_mb": {metric: [value / 1e6 for value in values] for metric, values in peaks.items()},
        "peak_over_weights": {metric: (b - a) / (large - small) for metric, (a, b) in peaks.items()},
    }
    print(json.dumps(body, indent=1))
    if options.out is not None:
        write_json(options.out, body)


def peak(options: Options, metric: str, hidden: int) -> int:
    """Most bytes that this process held when the table of one metric is made."""
    score(options, metric, hidden)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def weight_bytes(options: Options, hidden: int) -> int:
    """Of the weights in float32."""
    apply, shapes = functional(nnx.eval_shape(lambda: Llama(llama_config(options, hidden), rngs=nnx.Rngs(0))))
    del apply
    return 4 * sum(math.prod(shape.shape) for path, shape in shapes.items() if not path.endswith("scale"))


def score(options: Options, metric: str, hidden: int) -> None:
    """The table of one metric."""
    model = random_llama(options, hidden)
    traced = model.trace(1, options.window)
    tokens = np.random.default_rng(options.seed).integers(VOCABULARY, size=(1, options.window), dtype=np.int32)
    data = Dataset(tokens, np.ones_like(tokens, bool), np.zeros(1, np.int32), "random tokens", str(options.seed))
    candidates = Candidates(model.params, traced.weights, RTN())
    schemes = tuple(map(parse_scheme, options.schemes))
    METRICS[metric](model, traced, schemes, candidates, data, key=jax.random.key(options.seed), batch_size=1)


def random_llama(options: Options, hidden: int) -> Model:
    """A Llama with random weights."""
    apply, shapes = functional(nnx.eval_shape(lambda: Llama(llama_config(options, hidden), rngs=nnx.Rngs(0))))
    keys = jax.random.split(jax.random.key(options.seed), len(shapes))
    params = {
        path: jnp.ones(shape.shape) if path.endswith("scale") else jax.random.normal(k, shape.shape) / hidden**0.5
        for (path, shape), k in zip(shapes.items(), keys, strict=True)
    }
    stored = dict.fromkeys(params, "float32")
    return Model(apply=apply, params=params, stored=stored, name="random", inputs=Tokens(VOCABULARY), task=CausalLM())


def llama_config(options: Options, hidden: int) -> LlamaConfig:
    """With tied embeddings."""
    heads = hidden // HEAD_DIM
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=options.window,
        tie_word_embeddings=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
