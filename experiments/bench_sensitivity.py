r"""Cost and quality of the sensitivity metrics on one model.

Run:     python -m experiments.bench_sensitivity --model reference --data TEXT --out FILE
Expect:  fisher / gradient pass at most 3 with 8 schemes, kl loop / forward passes at most 1.15; Kendall's tau above 0.9
Writes:  one JSON object: both ratios, and for every metric named its agreement with measured KL

Two ratios, each of wall-clock times after compilation, the median over repeats that take turns:

- `fisher_over_gradient`: the whole Fisher table over a plain gradient pass (d mean NLL / d all parameters) of the same
  batches;
- `kl_over_forward`: the whole KL table over as many bare forward passes (logits only) as it has candidates, plus the
  reference's.

Quality: over all (weight, scheme) pairs with a KL above 1e-7, Kendall's tau, and the geometric mean and spread of
predicted / measured. `--spans` repeats the Fisher metric with other spans: 1 is independent positions, 0 the whole
window.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.stats import kendalltau

from mpq.data import make_dataset, read_documents
from mpq.evaluate import counts_of
from mpq.formats import parse_scheme
from mpq.inputs import Batch, Dataset, Tokens
from mpq.models import Model, load
from mpq.quantize import RTN, Candidates
from mpq.sensitivity import METRICS, Fisher
from mpq.types import MpqError, Params, Scheme, SensitivityTable

SCHEMES = ("int2_g32", "int2_g64", "int3_g32", "int3_g64", "int4_g32", "int4_g64", "int6_g64", "int8_g64")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      model: `reference` or a folder.
      data: a text file.
      out: JSON file, or None.
      schemes: columns of the tables.
      metrics: timed; `kl` and `fisher`, which the ratios are of, always are.
      windows: of the text; `window` tokens each, `batch_size` a pass.
      spans: further spans of the Fisher metric to compare; 0: the whole window.
      repeats: of every timing.
      seed: of signs and probes.
    """

    model: str
    data: Path
    out: Path | None = None
    schemes: tuple[str, ...] = SCHEMES
    metrics: tuple[str, ...] = ()
    windows: int = 16
    window: int = 256
    batch_size: int = 8
    spans: tuple[int, ...] = ()
    repeats: int = 3
    seed: int = 0


def main(options: Options) -> None:
    """Measure, print, write."""
    model = load(options.model)
    if not isinstance(model.inputs, Tokens):
        raise MpqError(f"model {model.name!r} reads no text: give a language model")
    data = make_dataset(
        read_documents(options.data),
        model.tokenizer,
        bos=model.inputs.bos,
        window=options.window,
        max_windows=options.windows,
        drop_tail=True,
        source=options.data.name,
    )
    traced = model.trace(options.batch_size, options.window)
    schemes = tuple(map(parse_scheme, options.schemes))
    candidates = Candidates(model.params, traced.weights, RTN())
    arguments = (model, traced, schemes, candidates, data)
    keywords = {"key": jax.random.key(options.seed), "batch_size": options.batch_size}
    metrics = {name: METRICS[name] for name in ("kl", "fisher", *options.metrics)}
    metrics |= {f"fisher span {s}": Fisher(span=s or None) for s in options.spans}
    tables = {name: metric(*arguments, **keywords) for name, metric in metrics.items()}
    seconds = times(
        {
            "forward": lambda: forward_pass(model, data, options.batch_size),
            "gradient": lambda: gradient_pass(model, data, options.batch_size),
            **{name: (lambda m=metric: m(*arguments, **keywords)) for name, metric in metrics.items()},
        },
        options.repeats,
    )
    measured = int((tables["kl"].loss_increase != 0).sum()) + 1  # and the reference
    result = {
        "model": model.name,
        "data": data.source,
        "tokens": int(counts_of(model.task, data).sum()),
        "weights": len(traced.weights),
        "schemes": options.schemes,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds": seconds,
        "fisher_over_gradient": seconds["fisher"] / seconds["gradient"],
        "kl_over_forward": seconds["kl"] / (measured * seconds["forward"]),
        "agreement_with_kl": {n: agreement(t, tables["kl"], schemes) for n, t in tables.items() if n != "kl"},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


def times(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a change in the machine's load touches all alike."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward_pass(model: Model, data: Dataset, batch_size: int) -> None:
    """Logits of every batch, nothing else."""
    jax.block_until_ready([_forward(model, model.params, b) for b in data.batches(batch_size)])


def gradient_pass(model: Model, data: Dataset, batch_size: int) -> None:
    """Gradient of the mean NLL with respect to all parameters, every batch."""
    for batch in data.batches(batch_size):
        jax.block_until_ready(_gradient(model, model.params, batch, model.task.counted(batch.mask)))


def agreement(table: SensitivityTable, truth: SensitivityTable, schemes: Sequence[Scheme]) -> dict[str, Any]:
    """Kendall's tau over all pairs, and per scheme tau and geometric mean and spread of predicted / measured."""
    predicted, measured = table.loss_increase, truth.loss_increase
    used = measured > 1e-7
    columns = {}
    for i, scheme in enumerate(schemes):
        p, m = predicted[used[:, i], i], measured[used[:, i], i]
        if len(m) > 2:
            log = np.log(np.maximum(p, 1e-12) / m)
            columns[str(scheme)] = {
                "tau": _tau(p, m),
                "ratio": round(float(np.exp(log.mean())), 3),
                "spread": round(float(log.std()), 3),
                "relative_stderr": _finite(np.median(table.stderr[used[:, i], i] / np.abs(p))),
            }
    return {"tau": _tau(predicted[used], measured[used]), "schemes": columns}


def _finite(value: Any) -> float | None:
    """Three digits; None where a single document gives no standard error."""
    return round(float(value), 3) if np.isfinite(value) else None


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    return round(float(np.asarray(kendalltau(a, b))[0]), 3)


def _nll(model: Model, params: Params, batch: Batch, counted: jax.Array) -> jax.Array:
    log_q = jax.nn.log_softmax(model.apply(params, batch.inputs)[:, :-1])
    return -jnp.sum(jnp.take_along_axis(log_q, batch.inputs[:, 1:, None], -1)[..., 0] * counted[:, :-1])


_forward = jax.jit(lambda model, params, batch: model.apply(params, batch.inputs), static_argnums=0)
_gradient = jax.jit(
    lambda model, params, batch, counted: jax.value_and_grad(lambda p: _nll(model, p, batch, counted))(params),
    static_argnums=0,
)


if __name__ == "__main__":
    main(tyro.cli(Options))
