"""How fast a checkpoint is loaded, against what reading its file takes.

Run:     python -m experiments.bench_load --out FILE
Expect:  `over_read_and_copy` at most 1.5, in a few seconds
Writes:  one JSON object: the times and both ratios

A random Llama checkpoint in bfloat16 is written to a temporary folder and read once, so that it is in the page cache.
Then three things take turns, each timed over the whole checkpoint, the median over repeats:

- `read`: `safetensors.numpy.load_file`;
- `read_and_copy`: the same, and every tensor converted to contiguous float32, as it lies;
- `load`: `mpq.models.load`: config, module, names, shapes, finite values, transposition to `[k, n]`, JAX arrays.

Ratios are of the times of one turn, since what else the machine does slows down all three alike; those of processor
time (`cpu_`) are steadier where it is busy.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tyro
from flax import nnx
from safetensors.numpy import load_file, save_file

from mpq.files import write_json
from mpq.models import FAMILIES, load
from mpq.models.checkpoint import find_family
from mpq.models.model import functional

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 12_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      out: JSON file, or None.
      layers: blocks of the model; 12 make 333 MB.
      repeats: of every timing.
      seed: of the random weights.
    """

    out: Path | None = None
    layers: int = 12
    repeats: int = 5
    seed: int = 0


def main(options: Options) -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, CONFIG | {"num_hidden_layers": options.layers}, options.seed)
        body = measure(folder, options.repeats)
    print(json.dumps(body, indent=1))
    if options.out is not None:
        write_json(options.out, body)


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A folder with random bfloat16 weights of the config's shapes."""
    family = find_family(config, FAMILIES)
    parsed = family.parse(config)
    _, shapes = functional(nnx.eval_shape(lambda: family.build(parsed)))
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, struct in shapes.items():
        stored = family.stored(parsed, path)
        shape = (
            tuple(struct.shape[stored.permutation.index(i)] for i in range(len(struct.shape)))
            if stored.permutation
            else struct.shape
        )
        tensors[stored.names[0]] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Median seconds and ratios."""
    file = folder / "model.safetensors"
    work: dict[str, Callable[[], Any]] = {
        "read": lambda: load_file(file),
        "read_and_copy": lambda: {n: np.ascontiguousarray(t.astype(np.float32)) for n, t in load_file(file).items()},
        "load": lambda: jax.block_until_ready(load(str(folder)).params),
    }
    for run in work.values():
        run()
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    taken: dict[tuple[str, str], list[float]] = {(name, clock): [] for name in work for clock in clocks}
    for _ in range(repeats):
        for name, run in work.items():
            start = {clock: now() for clock, now in clocks.items()}
            run()
            for clock, now in clocks.items():
                taken[name, clock].append(now() - start[clock])
    ratio = lambda base, clock: statistics.median(
        a / b for a, b in zip(taken["load", clock], taken[base, clock], strict=True)
    )
    return {
        "file_bytes": file.stat().st_size,
        "repeats": repeats,
        **{f"{name}_{clock}": statistics.median(values) for (name, clock), values in taken.items()},
        **{f"over_{base}": ratio(base, "seconds") for base in ("read", "read_and_copy")},
        **{f"cpu_over_{base}": ratio(base, "cpu_seconds") for base in ("read", "read_and_copy")},
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
