r"""What quantization-aware training recovers of what rounding loses: mixed plans, and weights with activations.

Run:     python -m experiments.qat --model reference --data reference --train stdlib --train-batch 4 --steps 1400
             --train-rows 5600 --rounding 0.012 --scale 0.002 --beside 0.003 --noise 0.1 --out FILE
         python -m experiments.qat --model DIR --data cifar10_lossless_head.npz --train cifar10_train_jpeg.npz
             --plans W2A4 "2.5 bpw" W3A3 W4A4 --schemes int2_channel int3_channel int4_channel int8_channel
             --metric kl --table-rows 512 --batch-size 64 --train-batch 64 --steps 500 --train-rows 32000
             --rounding 0.006 --scale 0.001 --ranges 0.002 --beside 0.001 --out FILE
Expect:  training recovers most of what rounding loses where that is much
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by plan and way, KL to the original and rise of the loss on the test set, nats per output, the
         task's own quality, each with its standard error over documents; seconds, and those of processors, which
         other work on the machine does not lengthen

Rounding is GPTQ; of weights alone in text models then QEP, in networks for images norms estimated again. Training
starts from the last of these. Calibration, and the table that mixed plans are solved from, take the calibration set of
`--data`, training `--train`; nothing takes the test set.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments import stdlib_corpus
from experiments.kept import keep, rows_in
from mpq.activations import activation_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.plans import calibrated
from mpq.allocate import Frontier, Problem, solve_frontier
from mpq.calibrate import calibrate
from mpq.config import known
from mpq.data import take
from mpq.data.sources import read_set, read_sets
from mpq.data.text import make_dataset
from mpq.distill import Distill
from mpq.equalize import find_shifts
from mpq.equalize.shifts import Shift
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.inputs import Dataset, Tokens
from mpq.models import load
from mpq.quantize import GPTQ, Candidates, apply_plan
from mpq.quantize.correction import correct_biases
from mpq.quantize.propagate import Propagation
from mpq.record import RunRecord
from mpq.sensitivity import METRICS
from mpq.types import Params, QTensor, Scheme

STDLIB = "stdlib"
"""As `--train`: the training split of the reference model's corpus, `experiments.stdlib_corpus`."""


class Setting(NamedTuple):
    """A plan: bits per weight of a mixed one, or schemes of weights and of activations, the model's ends at 8 bits.

    So has LSQ its networks (Esser et al. 2020, arXiv:1902.08153, section 3).
    """

    bpw: float | None = None
    weights: str = ""
    activations: str = ""


PLANS: Mapping[str, Setting] = {
    "2.5 bpw": Setting(2.5),
    "W4A4": Setting(None, "int4_channel", "int4_tensor_static_asym"),
    "W3A3": Setting(None, "int3_channel", "int3_tensor_static_asym"),
    "W2A4": Setting(None, "int2_channel", "int4_tensor_static_asym"),
}
END = Setting(None, "int8_channel", "int8_tensor_static_asym")
"""Of the first and the last weight, and of what they read, in plans with activations."""

ROUNDED, IN_ORDER, NORMS, TRAINED = "GPTQ", "GPTQ, QEP", "GPTQ, norms estimated again", "trained"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      model: a folder, or `reference`.
      data: calibration and test set, as of a run.
      train: what is trained on: data like these, or `stdlib`.
      out: JSON file.
      plans: of `PLANS`.
      schemes: of mixed plans.
      metric: of the table that these are solved from.
      calibration, test: rows of each.
      table_rows: of the calibration set, for the table.
      batch_size: rows a pass.
      train_rows: rows to train on.
      train_batch: of those, a step.
      steps: of the training.
      rounding, scale, ranges, beside, noise: of `mpq.distill.Distill`.
    """

    model: str
    data: str
    train: str
    out: Path
    plans: tuple[str, ...] = ("2.5 bpw",)
    schemes: tuple[str, ...] = (
        "int2_g32",
        "int3_g32",
        "int4_g32",
        "int2_g16_sfp8",
        "int2_g32_sfp8",
        "int3_g16_sfp8",
        "int3_g32_sfp8",
        "int4_g16_sfp8",
        "int4_g32_sfp8",
    )
    metric: str = "fisher"
    calibration: int = 512
    test: int = 932
    table_rows: int = 16
    batch_size: int = 8
    train_rows: int = 4096
    train_batch: int = 8
    steps: int = 500
    rounding: float = Distill.rounding
    scale: float = Distill.scale
    ranges: float = Distill.ranges
    beside: float = Distill.beside
    noise: float = Distill.noise


class Made(NamedTuple):
    """Weights, activations and other parameters of a quantized model."""

    qtensors: dict[str, QTensor]
    activations: tuple[RoundedActivation, ...]
    beside: Params


class Comparison:
    """The model, its data, and what plans share."""

    def __init__(self, options: Options) -> None:
        self.options, self.model = options, load(options.model)
        self.is_text = isinstance(self.model.inputs, Tokens)
        limits = {"calibration": options.calibration, "selection": 1, "test": options.test}
        self.sets = read_sets(self.model, options.data, window=None, limits=limits, windows_per_document=None)
        self.window = self.sets["test"].inputs.shape[1] if self.is_text else None
        self.traced = self.model.trace(options.batch_size, self.window)
        self.reference = Reference(self.model, self.sets["test"], options.batch_size)
        self.original = score(self.model, self.model.params, self.sets["test"], reference=self.reference, batch_size=0)

    @functools.cached_property
    def candidates(self) -> Candidates:
        """GPTQ on the calibration set."""
        stats = calibrate(self.traced, self.model.params, self.sets["calibration"], self.options.batch_size)
        return Candidates(self.model.params, self.traced.weights, GPTQ(), stats)

    @functools.cached_property
    def shifts(self) -> tuple[Shift, ...]:
        """What norms and biases can take up."""
        return tuple(find_shifts(self.model, self.traced, self.sets["calibration"]))

    @functools.cached_property
    def frontier(self) -> Frontier:
        """Of mixed plans."""
        options = self.options
        table = METRICS[options.metric](
            self.model,
            self.traced,
            tuple(map(parse_scheme, options.schemes)),
            self.candidates,
            take(self.sets["calibration"], options.table_rows),
            key=jax.random.key(0),
            batch_size=options.batch_size,
        )
        return solve_frontier(Problem.from_table(table))

    @functools.cached_property
    def training(self) -> Dataset:
        """What is trained on: of a text, windows of documents in a fixed random order."""
        options, model = self.options, self.model
        if options.train != STDLIB:
            return read_set(model, options.train, "calibration", window=self.window, limit=options.train_rows)
        assert isinstance(model.inputs, Tokens)
        assert self.window is not None
        documents = [text for _, text in stdlib_corpus.read().train]
        shape: dict[str, Any] = {"window": self.window, "max_windows": options.train_rows, "windows_per_document": 8}
        mixed = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
        return make_dataset(mixed, model.tokenizer, bos=model.inputs.bos, drop_tail=True, source=STDLIB, **shape)

    def choice(self, setting: Setting) -> dict[str, Scheme]:
        """Schemes of the weights."""
        if setting.bpw is not None:
            return self.frontier.at(bpw=setting.bpw).choice
        paths = [spec.path for spec in self.traced.weights]
        inner, end = parse_scheme(setting.weights), parse_scheme(END.weights)
        return {path: end if path in (paths[0], paths[-1]) else inner for path in paths}

    def activations(self, setting: Setting) -> tuple[RoundedActivation, ...]:
        """Rounded activations, with the ranges of the calibration set."""
        if not setting.activations:
            return ()
        rows = activation_rows(self.traced)
        inner, end = parse_activation_scheme(setting.activations), parse_activation_scheme(END.activations)
        ends = (rows[0].path, rows[-1].path)
        plan = {row.path: RoundedActivation(row, end if row.path in ends else inner).to_json() for row in rows}
        data, batch_size = self.sets["calibration"], self.options.batch_size
        return calibrated(plan, self.model, self.traced, data, None, batch_size)[0]

    def made(self, setting: Setting) -> Iterator[tuple[str, Made, dict[str, Any]]]:
        """One way of making the plan after the other, with what there is to tell of each."""
        options, data = self.options, self.sets["calibration"]
        choice, chosen = self.choice(setting), self.activations(setting)
        made = Made(self.candidates.choose(choice), chosen, {})
        yield ROUNDED, made, {}
        if self.is_text and not chosen:
            in_order = Propagation(self.traced, self.candidates, data, batch_size=options.batch_size)
            made = made._replace(qtensors=in_order.choose(choice))
            yield IN_ORDER, made, {}
        if not self.is_text:
            params = apply_plan(self.model.params, self.traced.weights, made.qtensors)
            more: dict[str, Any] = {"activations": chosen, "norms": True, "batch_size": options.batch_size}
            params = correct_biases(self.model, self.traced, params, self.shifts, data, **more)
            taken = {spec.param for spec in self.traced.weights}
            made = made._replace(beside={path: p for path, p in params.items() if path not in taken})
            yield NORMS, made, {}
        found = self.distill(
            self.model,
            self.traced,
            made.qtensors,
            self.training,
            key=jax.random.key(0),
            activations=chosen,
            beside=made.beside,
        )
        told = {"first_loss": float(found.losses[0]), "last_losses": float(found.losses[-50:].mean())}
        yield TRAINED, Made(found.qtensors, found.activations, found.beside), told

    @property
    def distill(self) -> Distill:
        """The training."""
        options = self.options
        rates = {name: getattr(options, name) for name in ("rounding", "scale", "ranges", "beside", "noise")}
        return Distill(steps=options.steps, batch_size=options.train_batch, written=0, **rates)  # as `mpq qat`

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a plan and way of making it; plans all of whose rows are in `done` are left out."""
        known = {(row["plan"], row["way"]) for row in done}
        for name in self.options.plans:
            if (name, TRAINED) in known:
                continue
            start, busy = time.perf_counter(), time.process_time()
            for way, made, told in self.made(PLANS[name]):
                jax.block_until_ready(made.qtensors)
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
                if (name, way) not in known:
                    times = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
                    yield {"plan": name, "way": way} | times | told | self.row(made)
                start, busy = time.perf_counter(), time.process_time()

    def row(self, made: Made) -> dict[str, Any]:
        """Size and quality."""
        params = apply_plan({**self.model.params, **made.beside}, self.traced.weights, made.qtensors)
        model = with_activations(self.model, self.traced, made.activations)
        scores = score(model, params, self.sets["test"], reference=self.reference, batch_size=0)
        excess, stderr = scores.difference(self.original, "nll")
        result, schemes = scores.summary(), [str(q.scheme) for q in made.qtensors.values()]
        size = sum(w.size_bits(made.qtensors[w.path].scheme) for w in self.traced.weights)
        return {
            "bits_per_weight": size / sum(w.size for w in self.traced.weights),
            "quality": result.quality,
            "quality_stderr": result.quality_stderr,
            "kl": result.kl,
            "kl_stderr": result.kl_stderr,
            "excess": excess,
            "excess_stderr": stderr,
            "schemes": {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))},
            "activations": sorted({str(one.scheme) for one in made.activations}),
        }


def main(options: Options) -> None:
    """Measure, print, write after every row.

    Raises:
      MpqError: a plan is not among those there are, or the model or its data are wrong.
    """
    for name in options.plans:
        known("plan", name, PLANS)
    done = rows_in(options.out)
    comparison = Comparison(options)
    names = {"data": Path(options.data).name, "train": Path(options.train).name, "out": options.out.name}
    config = dataclasses.asdict(options) | names | {"model": comparison.model.name}
    inputs = {"model": comparison.model.digest, "train": comparison.training.digest}
    inputs |= {name: data.digest for name, data in comparison.sets.items()}
    record = RunRecord.collect(config, seeds={"training": 0}, inputs=inputs)
    result = comparison.original.summary()
    head = {
        "quality_name": result.quality_name,
        "quality": result.quality,
        "nll": result.nll,
        "cores": len(os.sched_getaffinity(0)),
        "distill": dataclasses.asdict(comparison.distill),
        "record": record.to_json(),
    }
    keep(comparison.rows(done), options.out, head, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
