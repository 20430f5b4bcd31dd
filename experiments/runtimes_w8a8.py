r"""Rounded weights and activations in ONNX Runtime: our files against those of its own quantizer, about as large.

Run:     python -m experiments.runtimes_w8a8 --model reference --data TEXT --test TEXT --out FILE
         (or a classifier's folder and .npz files of images; needs mpq[onnx])
Expect:  KL to the original is lower in every row
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by quantizer of onnxruntime, bytes of the file, KL to the original (nats per output, on
         held-out data), how often its first choice is the original's, and seconds a batch in the runtime, of its file
         and of ours

Both start from the model in float32, embeddings in float16. Norms are folded into convolutions, but for theirs with
dynamic ranges, which is closer to the original with norms apart; with static ones it is faster and closer when they are
folded. Theirs, after its own pre-processing: `quantize_dynamic`, and `quantize_static` in QDQ form, with ranges of
minimum and maximum from the same calibration data, weights by tensor or by channel; of all operations it has, or of
matmuls and convolutions alone (`products`), which is closer to the original. By channel, all operations of ResNet-20
fail there. Activations are unsigned: files with signed ones, its default, do not load for these graphs. Ours: all
matmuls and convolutions at int8_channel by GPTQ; dynamic ranges by token, or by image; static ones by squared error
with zero points, texts smoothed. Of the ways to store an embedding, in `EMBEDDINGS`, ours takes the first whose file is
no larger than theirs, or the last. One thread; both files in turns, the median of `repeats`.
"""

import dataclasses
import importlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.distillation import windows_of
from experiments.kept import keep, named_options, rows_in
from experiments.litert import folded
from experiments.runtimes import Run, medians, runner
from mpq.activations.plans import calibrated, uniform_rows
from mpq.activations.smooth import smooth_model
from mpq.artifacts import make_plan
from mpq.calibrate import calibrate
from mpq.data.sources import read_set
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.inputs import Dataset, Tokens
from mpq.models import Model, load
from mpq.onnx.export import save, size_bytes
from mpq.quantize import GPTQ, Candidates
from mpq.record import RunRecord
from mpq.types import MpqError, Scheme

QUANTIZERS = (
    "dynamic",
    "dynamic_by_channel",
    "static",
    "static_by_channel",
    "static_products",
    "static_products_by_channel",
)
"""Of onnxruntime."""

EMBEDDINGS = ("fp16", "int8_g32", "int8_channel")
"""Schemes that our file may have for what is looked up, best first."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: a folder, or `reference`.
      data, test: calibration and held-out text, or images.
      out: JSON file.
      quantizers: of `QUANTIZERS`.
      windows, test_windows: of text, `window` tokens each, or images; `batch_size` a pass.
      repeats: of a batch, for its time.
    """

    model: str
    data: Path
    test: Path
    out: Path
    quantizers: tuple[str, ...] = QUANTIZERS
    windows: int = 64
    test_windows: int = 32
    window: int = 256
    batch_size: int = 8
    repeats: int = 20


class Comparison:
    """The model, its data, and files of both sides."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder, self.given = options, folder, load(options.model)
        self.model = folded(self.given)
        self.is_text = isinstance(self.model.inputs, Tokens)
        self.traced = self.model.trace(options.batch_size, options.window if self.is_text else None)
        self.calibration = self._read(options.data, "calibration", options.windows)
        self.test = self._read(options.test, "test", options.test_windows)
        self.stats = calibrate(self.traced, self.model.params, self.calibration, options.batch_size)
        self.batches = self._batches(self.test)
        apply = jax.jit(self.model.apply)
        self.original = [np.asarray(jax.nn.log_softmax(apply(self.model.params, batch))) for batch in self.batches]

    def base(self, apart: bool) -> Path:
        """The graph in float32 that a side starts from, embeddings in float16; norms apart or folded."""
        path = self.folder / f"base_{'apart' if apart else 'folded'}.onnx"
        if not path.exists():
            choice = {w.path: parse_scheme("fp16" if "embedding" in w.kind else "fp32") for w in self.traced.weights}
            save(path, self.exported(choice, None, self.given if apart else self.model), "base")
        return path

    def _read(self, path: Path, which: str, count: int) -> Dataset:
        if self.is_text:
            return windows_of(self.model, path, count, self.options.window)
        return read_set(self.model, str(path), which, window=None, limit=count)

    def _batches(self, data: Dataset) -> list[np.ndarray]:
        return np.split(data.inputs, range(self.options.batch_size, len(data.inputs), self.options.batch_size))

    def exported(self, choice: dict[str, Scheme], activations: str | None, model: Model | None = None) -> Exported:
        """A model with its weights under these schemes and all activations under one, read back from the disk."""
        model, traced, weights, stats = model or self.model, self.traced, self.traced.weights, self.stats
        size = self.options.batch_size
        rows = uniform_rows(traced, activations, None)
        chosen, _ = calibrated(rows, model, traced, self.calibration, None, size)
        if activations and "static" in activations and self.is_text:
            model, chosen, stats = smooth_model(model, traced, chosen, choice, stats, self.calibration, size)
        plan = make_plan("plan", choice, None, weights, 0, model.digest)
        plan = plan.with_activations({row.spec.path: row.to_json() for row in chosen})
        qtensors = Candidates(model.params, weights, GPTQ(), stats).choose(choice)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            orbax.save(Path(folder) / "plan", **export_arguments(model, weights, qtensors, plan, chosen))
            return orbax.load(Path(folder) / "plan")

    def theirs(self, quantizer: str) -> Path:
        """The file that onnxruntime's quantizer makes."""
        ort = importlib.import_module("onnxruntime.quantization")
        path, by_channel = self.folder / f"{quantizer}.onnx", quantizer.endswith("by_channel")
        given = self.base(apart=quantizer.startswith("dynamic"))
        base = given.with_name(f"prepared_{given.name}")
        if not base.exists():  # as onnxruntime asks for: what depends on weights alone is computed
            prepare = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
            prepare(given, base, skip_symbolic_shape=True)
        if quantizer.startswith("dynamic"):
            # ConvInteger has kernels for unsigned weights only.
            kind = ort.QuantType.QInt8 if self.is_text else ort.QuantType.QUInt8
            ort.quantize_dynamic(base, path, per_channel=by_channel, weight_type=kind)
            return path
        name = "input_ids" if self.is_text else "inputs"
        batches = [{name: self._fed(batch)} for batch in self._batches(self.calibration)]

        class Reader(ort.CalibrationDataReader):  # what quantize_static asks for
            def __init__(self) -> None:
                self.left = iter(batches)

            def get_next(self) -> dict[str, np.ndarray] | None:
                """The next batch; None after the last."""
                return next(self.left, None)

        only = ["Conv", "MatMul"] if "products" in quantizer else None
        unsigned: dict[str, Any] = {"activation_type": ort.QuantType.QUInt8}
        ort.quantize_static(base, path, Reader(), per_channel=by_channel, op_types_to_quantize=only, **unsigned)
        return path

    def ours(self, quantizer: str, limit: int) -> tuple[Path, str]:
        """Our file, of at most `limit` bytes if one is, else the smallest; and the scheme of its embedding."""
        rounded = "int8_token" if self.is_text else "int8_tensor"
        rounded = "int8_tensor_static_asym" if quantizer.startswith("static") else rounded
        path = self.folder / f"ours_{quantizer}.onnx"
        embeddings = EMBEDDINGS if self.is_text else EMBEDDINGS[:1]
        for embedding in embeddings:
            schemes = {True: parse_scheme(embedding), False: parse_scheme("int8_channel")}
            choice = {w.path: schemes["embedding" in w.kind] for w in self.traced.weights}
            exported = self.exported(choice, rounded)
            if size_bytes(exported, "ours") <= limit or embedding == embeddings[-1]:
                save(path, exported, "ours")
                return path, embedding if self.is_text else "none"
        raise AssertionError("the last one is written whatever its size")

    def _fed(self, batch: np.ndarray) -> np.ndarray:
        return batch.astype(np.int64) if self.is_text else batch

    def quality(self, run: Run) -> tuple[float, float, float]:
        """KL to the original, its standard error over windows or images, and the share of equal first choices."""
        kl: list[np.ndarray] = []
        same: list[np.ndarray] = []
        for batch, p in zip(self.batches, self.original, strict=True):
            q = np.asarray(jax.nn.log_softmax(run(batch)))
            kl.append((np.exp(p) * (p - q)).sum(-1, dtype=np.float64).reshape(len(batch), -1).mean(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).reshape(-1))
        values = np.concatenate(kl)
        return (
            float(values.mean()),
            float(values.std(ddof=1) / np.sqrt(len(values))),
            float(np.concatenate(same).mean()),
        )

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a quantizer, those in `done` left out."""
        known = {row["quantizer"] for row in done}
        for name in (name for name in self.options.quantizers if name not in known):
            theirs = self.theirs(name)
            ours, embedding = self.ours(name, theirs.stat().st_size)
            runs = {"their": runner(theirs), "our": runner(ours)}
            row: dict[str, Any] = {"quantizer": name, "our_embedding": embedding}
            for (side, run), path in zip(runs.items(), (theirs, ours), strict=True):
                values = (path.stat().st_size, *self.quality(run))
                row |= dict(
                    zip([f"{side}_{k}" for k in ("bytes", "kl", "kl_stderr", "agreement")], values, strict=True)
                )
            times = medians([*runs.values(), runner(self.base(apart=False))], self.batches[0], self.options.repeats)
            yield row | dict(zip(("their_seconds", "our_seconds", "float_seconds"), times, strict=True))


def compare(options: Options, comparison: type[Comparison], quantizers: Collection[str]) -> None:
    """Compare, print, write after every row.

    Args:
      options: what is compared.
      comparison: makes the rows.
      quantizers: those there are.

    Raises:
      MpqError: a quantizer is not among them, or the model or data are wrong.
    """
    if unknown := [name for name in options.quantizers if name not in quantizers]:
        raise MpqError(f"unknown quantizer {unknown[0]!r}: the valid ones are {', '.join(quantizers)}")
    done = rows_in(options.out)
    with tempfile.TemporaryDirectory() as folder:
        found = comparison(options, Path(folder))
        inputs = {"data": found.calibration.digest, "model": found.given.digest, "test": found.test.digest}
        config = named_options(options, ("data", "test", "out"))
        record = RunRecord.collect(config | {"model": found.model.name}, seeds={}, inputs=inputs)
        keep(found.rows(done), options.out, {"record": record.to_json()}, done)


def main(options: Options) -> None:
    """As `compare`, in ONNX Runtime."""
    compare(options, Comparison, QUANTIZERS)


if __name__ == "__main__":
    main(tyro.cli(Options))
