"""The Hessian trace of every weight, against PyHessian (Yao et al. 2020, arXiv:1912.07145) on the same model and batch.

Needs:   the parity environment (`make parity` makes it)
Run:     .venv-parity/bin/python -m experiments.bench_hessian --out experiments/results/bench_hessian.json
Takes:   ten minutes on two cores
Expect:  `layers_over_ours` above 5, at least 85 % of the traces within 2 standard errors of each other;
         `whole_over_ours` about 1, for it is the same product, and `layers_over_ours_at_equal_error` below 1
Writes:  one JSON file: seconds per probe, their ratios, and how far the traces agree

The reference model runs in JAX and in `transformers`, with equal weights, the same windows, the mean next-token loss of
both, float32 and as many threads. One probe is one sample of the trace of every weight:

- `ours`: the metric `hessian_trace`, whole; one Hessian-vector product gives every weight a sample;
- `layers`: PyHessian as HAWQ-V2 needs it. `hessian.trace` gives the trace of all parameters that take a gradient and
  nothing finer, so that it runs once for every weight, with that one alone taking a gradient. The gradient and its
  graph are made once and serve all probes of a weight; their time is given as `layers_setup` and not counted;
- `whole`: `hessian.trace` over all weights at once: one product a probe, as ours, and one number, the sum. It keeps the
  gradient's graph between probes, where ours runs forward again.

The three take turns, medians are over repeats. Processor time (`cpu_`) is steadier than wall time where other work
runs. Samples of `ours` carry the cross terms between weights, those of `layers` do not. `variance_over_layers`, the
median over weights, says what that costs in probes; `layers_over_ours_at_equal_error` is the ratio with that many more.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

import mpq
from mpq.files import write_json
from mpq.inputs import Dataset
from mpq.models import Model
from mpq.models.hub import resolve
from mpq.sensitivity import HessianTrace
from mpq.sensitivity.base import half_mean_square

SCHEME = mpq.parse_scheme("int4_g64")  # a table needs one; the trace is what it is divided by


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      out: JSON file, or None.
      windows: of the reference's calibration text, all in one batch.
      window: tokens each.
      probes: a turn.
      repeats: turns.
      threads: of PyTorch; JAX takes all cores that the process may use.
    """

    out: Path | None = None
    windows: int = 4
    window: int = 128
    probes: int = 4
    repeats: int = 3
    threads: int = len(os.sched_getaffinity(0))


class Peer:
    """PyHessian on the model of `transformers`."""

    def __init__(self, folder: Path, data: Dataset, threads: int):
        self._torch, self._pyhessian = (importlib.import_module(name) for name in ("torch", "pyhessian"))
        self._torch.set_num_threads(threads)
        self._torch.manual_seed(0)
        # the fused attention kernels have no second derivative
        options = {"dtype": self._torch.float32, "attn_implementation": "eager"}
        llama = importlib.import_module("transformers").LlamaForCausalLM
        self._model = llama.from_pretrained(folder, **options).requires_grad_(False)
        self._parameters = dict(self._model.named_parameters())
        as_ids = lambda ids: self._torch.tensor(ids, dtype=self._torch.long)
        self._data = as_ids(data.inputs), as_ids(np.where(data.mask, data.inputs, -100))  # where no loss is taken

    def versions(self) -> dict[str, str]:
        """Of what is compared with."""
        return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pyhessian")}

    def hessian(self, names: Sequence[str]) -> Any:
        """PyHessian's object over the parameters `names`, its gradient made."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for name in names:
            self._parameters[name].requires_grad_(True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward.*create_graph", category=UserWarning)
            return self._pyhessian.hessian(self._model, self._loss, data=self._data, cuda=False)

    def _loss(self, outputs: Any, targets: Any) -> Any:
        logits = outputs.logits[:, :-1]
        return self._torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())


def main(options: Options) -> None:
    """Measure, print, write."""
    model = mpq.load("reference")
    config = mpq.RunConfig(name="bench_hessian", window=options.window, calibration_windows=options.windows)
    data = mpq.datasets(model, config)["calibration"]
    traced = model.trace(len(data.inputs), options.window)
    names = [tensor_name(spec.param) for spec in traced.weights]
    peer = Peer(resolve("reference"), data, options.threads)

    candidates = mpq.Candidates(model.params, traced.weights, mpq.RTN())
    ours = functools.partial(our_traces, model, traced, candidates, data)
    clock = Clock()
    samples: dict[str, list[Any]] = {"ours": [], "layers": [], "whole": []}
    ours(2, jax.random.key(options.repeats))  # compiles
    for repeat in range(options.repeats):
        samples["ours"].append(clock("ours", lambda r=repeat: ours(options.probes, jax.random.key(r))))
        whole = peer.hessian(names)
        samples["whole"] += clock("whole", lambda h=whole: h.trace(maxIter=options.probes, tol=0.0))
        del whole
        of_weights = []
        for name in names:
            one = clock("layers_setup", lambda n=name: peer.hessian([n]))
            of_weights.append(clock("layers", lambda h=one: h.trace(maxIter=options.probes, tol=0.0)))
            del one
        clock.next_turn()
        samples["layers"].append(np.array(of_weights))
    seconds = clock.medians(options.probes)
    result = {
        "model": model.name,
        "weights": len(names),
        "tokens": int(data.mask[:, 1:].sum()),
        **{k: v for k, v in dataclasses.asdict(options).items() if k != "out"},
        "versions": {"jax": jax.__version__, **peer.versions()},
        "seconds_per_probe": seconds,
        **compare(samples, seconds),
    }
    Console().print_json(data=result)
    if options.out is not None:
        write_json(options.out, result)


class Clock:
    """Seconds of named pieces, added up within a turn, wall and processor."""

    def __init__(self) -> None:
        self._turns: list[dict[str, float]] = [{}]

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        """What `function` returns."""
        start = time.perf_counter(), time.process_time()
        result = function()
        turn = self._turns[-1]
        for kind, begin, end in zip(("", "cpu_"), start, (time.perf_counter(), time.process_time()), strict=True):
            turn[kind + name] = turn.get(kind + name, 0.0) + end - begin
        return result

    def next_turn(self) -> None:
        """End this turn."""
        self._turns.append({})

    def medians(self, probes: int) -> dict[str, float]:
        """Name -> median over turns of the seconds of one probe; of a set-up, of the set-up."""
        turns = self._turns[:-1]
        return {
            name: statistics.median(turn[name] for turn in turns) / (1 if name.endswith("setup") else probes)
            for name in turns[0]
        }


def our_traces(
    model: Model, traced: mpq.Trace, candidates: mpq.Candidates, data: Dataset, probes: int, key: jax.Array
) -> np.ndarray:
    """`float64[2, weights]`: traces of the Hessian blocks and their standard errors."""
    metric = HessianTrace(num_probes=probes)
    table = metric(model, traced, [SCHEME], candidates, data, key=key, batch_size=len(data.inputs))
    half = np.array([half_mean_square(model.params, spec, [SCHEME], candidates) for spec in traced.weights])
    return np.stack([table.loss_increase / half, table.stderr / half])[..., 0]


def tensor_name(param: str) -> str:
    """The name that `transformers` gives a parameter of the reference model."""
    return "model." + param.removesuffix(".kernel").removesuffix(".embedding") + ".weight"


def compare(samples: dict[str, list[Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """Ratios of times, and the agreement of the traces."""
    turns = len(samples["ours"])
    ours, our_stderr = np.array(samples["ours"]).swapaxes(0, 1)  # [turns, weights] each
    layers = np.concatenate(samples["layers"], axis=1)  # [weights, samples]
    num = layers.shape[1]
    trace, stderr = ours.mean(axis=0), np.sqrt(np.square(our_stderr).sum(axis=0)) / turns
    their_trace, their_stderr = layers.mean(axis=1), layers.std(axis=1, ddof=1) / np.sqrt(num)
    z = (trace - their_trace) / np.hypot(stderr, their_stderr)
    variance = float(np.median(np.square(stderr / their_stderr)))  # equal numbers of samples
    whole = np.array(samples["whole"])
    return {
        "layers_over_ours": seconds["layers"] / seconds["ours"],
        "cpu_layers_over_ours": seconds["cpu_layers"] / seconds["cpu_ours"],
        "whole_over_ours": seconds["whole"] / seconds["ours"],
        "cpu_whole_over_ours": seconds["cpu_whole"] / seconds["cpu_ours"],
        "variance_over_layers": variance,
        "layers_over_ours_at_equal_error": seconds["layers"] / seconds["ours"] / variance,
        "samples_of_each_trace": num,
        "within_2_stderr": float(np.mean(np.abs(z) < 2)),
        "largest_difference_in_stderr": float(np.abs(z).max()),
        "sum_of_traces": [float(trace.sum()), float(np.sqrt(np.square(stderr).sum()))],
        "whole_trace": [float(whole.mean()), float(whole.std(ddof=1) / np.sqrt(len(whole)))],
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
