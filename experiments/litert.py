r"""Our .tflite file against those of ai-edge-quantizer's recipes, at the same size and in the runtime: LiteRT.

Run:     python -m experiments.litert --model reference --data reference --out FILE
         python -m experiments.litert --model DIR --data FILE.npz --out FILE --recipes static_wi8_ai8 ...
         (needs mpq[litert] and ai-edge-quantizer)
Expect:  KL to the original is lower in every row
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by recipe and kind of our file, bytes of both files, KL to the original on the test set (nats
         a token or image), top-1 agreement with it, and how long ours takes of the time of theirs

Both start from the same float32 file, batch norms folded into their convolutions. Theirs quantizes all that the recipe
names, min-max or, static, calibrated on the calibration set; ours is the plan that is solved for at most as many bytes,
rounded by GPTQ. Against weight-only recipes ours has float32 inputs, against dynamic ones hybrid operators, against
static ones the plan's static ranges (`exact`), or int8 sums of residual blocks beside them (`integer`). Outputs are
those of LiteRT's interpreter with XNNPACK on one thread; `*_stderr` are over windows or images, `kl_change` is the mean
of ours less theirs on each of them, times are medians of runs in turn, of one batch.
"""

import dataclasses
import importlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.kept import keep, rows_in
from mpq.activations.apply import choose_activations
from mpq.activations.ranges import calibrate_activations
from mpq.activations.rows import activation_rows
from mpq.activations.scheme import parse_activation_scheme
from mpq.allocate import Problem, solve_frontier
from mpq.artifacts import make_plan
from mpq.calibrate import calibrate
from mpq.config import known
from mpq.data.dataset import take
from mpq.data.sources import read_sets
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.export.targets import TARGETS, allowed_for
from mpq.formats import parse_scheme
from mpq.inputs import Tokens
from mpq.litert.export import save, size_bytes
from mpq.litert.weights import has_hybrid
from mpq.models import Model, load
from mpq.quantize import GPTQ, Candidates
from mpq.record import RunRecord
from mpq.sensitivity import METRICS
from mpq.types import Scheme, SensitivityTable

RECIPES: Mapping[str, tuple[str, ...]] = {
    "weight_only_wi8_afp32": ("weights",),
    "weight_only_wi4_afp32": ("weights",),
    "dynamic_wi8_afp32": ("weights", "hybrid"),
    "dynamic_wi4_afp32": ("weights", "hybrid"),
    "dynamic_wi2c_afp32": ("weights", "hybrid"),
    "static_wi8_ai8": ("exact", "integer"),
}
"""Of ai-edge-quantizer -> the kinds of our files that are put beside it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: a folder, or `reference`.
      data: as `mpq run` takes it; divided into calibration and test.
      out: JSON file.
      recipes: of `RECIPES`.
      schemes: that our plans choose from.
      rows: of calibration and test, windows or images.
      sensitivity_rows: of the calibration set, for the table that plans are solved from.
      window: tokens.
      batch_size: a pass.
      repeats: of a timed run.
    """

    model: str
    data: str
    out: Path
    recipes: tuple[str, ...] = tuple(r for r in RECIPES if not r.startswith("static"))
    schemes: tuple[str, ...] = (
        "int2_channel",
        "int2_g16",
        "int2_g32",
        "int2_g16_zp",
        "int4_channel",
        "int4_g16",
        "int4_g32",
        "int4_g64",
        "int8_channel",
        "int8_g64",
    )
    rows: tuple[int, int] = (64, 64)
    sensitivity_rows: int = 32
    window: int = 256
    batch_size: int = 8
    repeats: int = 9


def folded(model: Model) -> Model:
    """`model` with every batch norm in the convolution before it; of other models nothing changes."""
    params = dict(model.params)
    for path in model.params:
        name, _, last = path.rpartition(".")
        kernel = f"{name.replace('bn', 'conv').replace('normalization', 'convolution')}.kernel"
        if last != "mean" or kernel not in params:
            continue
        mean, var, scale, bias = (np.asarray(params[f"{name}.{part}"]) for part in ("mean", "var", "scale", "bias"))
        epsilon = np.float32(1e-5)
        factor = scale / np.sqrt(var + epsilon)
        made = {"mean": np.zeros_like(mean), "var": np.full_like(var, 1 - epsilon), "scale": np.ones_like(scale)}
        made["bias"] = bias - mean * factor
        params |= {f"{name}.{part}": jnp.asarray(value) for part, value in made.items()}
        params[kernel] = jnp.asarray(np.asarray(params[kernel]) * factor)
    return dataclasses.replace(model, params=params)


class Files:
    """The model, its data, and the float32 file that both sides start from."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.model = folded(load(options.model))
        text = isinstance(self.model.inputs, Tokens)
        self.window = options.window if text else None
        limits = {"calibration": options.rows[0], "selection": 1, "test": options.rows[1]}
        per = 4 if text else None
        sets = read_sets(self.model, options.data, window=self.window, limits=limits, windows_per_document=per)
        self.calibration, self.test = sets["calibration"], sets["test"]
        self.traced = self.model.trace(options.batch_size, self.window)
        stats = calibrate(self.traced, self.model.params, self.calibration, options.batch_size)
        make = lambda scale: Candidates(self.model.params, self.traced.weights, GPTQ(scale=scale), stats)
        self.candidates, self.positive = make("mse"), make("absmax")
        apply = jax.jit(self.model.apply)
        count = len(self.test.inputs) // options.batch_size * options.batch_size
        self.batches = np.split(np.asarray(self.test.inputs[:count]), count // options.batch_size)
        self.real = np.asarray(self.test.mask[:count]) if text else None
        self.original = np.concatenate([np.asarray(apply(self.model.params, batch)) for batch in self.batches])
        self.base = folder / "base.tflite"
        plain = {spec.path: parse_scheme("fp32") for spec in self.traced.weights}
        save(self.base, self.exported(plain, None), "base", window=self.window)
        self.table = self.sensitivities()

    def sensitivities(self) -> SensitivityTable:
        """Monte Carlo Fisher of GPTQ's errors."""
        schemes, rows = tuple(map(parse_scheme, self.options.schemes)), self.options.sensitivity_rows
        part = take(self.calibration, rows)
        key, size = jax.random.key(0), self.options.batch_size
        return METRICS["fisher"](self.model, self.traced, schemes, self.candidates, part, key=key, batch_size=size)

    def exported(self, choice: Mapping[str, Scheme], kind: str | None) -> Exported:
        """The model under a plan, as it is read back from the disk; activations by the kind of file."""
        rows = {} if kind is None else self.activations(kind)
        ranges = {}
        if kind in ("exact", "integer"):
            size = self.options.batch_size
            ranges = calibrate_activations(self.model, self.traced, list(rows), self.calibration, batch_size=size)
        chosen = choose_activations(rows, ranges)
        of = {one.spec.path: one.to_json() for one in chosen}
        weights = self.traced.weights
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            plan = make_plan("plan", choice, None, weights, 0, self.model.digest, of)
            # Integer operators want positive scales, which those of least squared error are not always.
            qtensors = (self.candidates if kind in (None, "weights") else self.positive).choose(choice)
            arguments = export_arguments(self.model, weights, qtensors, plan, chosen)
            orbax.save(Path(folder) / "plan", **arguments)
            return orbax.load(Path(folder) / "plan")

    def activations(self, kind: str) -> dict[Any, Any]:
        """Rows and their schemes."""
        if kind == "weights":
            return {}
        token = isinstance(self.model.inputs, Tokens)
        text = {"hybrid": "int8_token_asym" if token else "int8_tensor_asym"}.get(kind, "int8_tensor_static_asym")
        return {row: parse_activation_scheme(text) for row in activation_rows(self.traced)}

    def theirs(self, recipe: str) -> Path:
        """The file that ai-edge-quantizer makes."""
        quantizer, recipes = (importlib.import_module(f"ai_edge_quantizer.{m}") for m in ("quantizer", "recipe"))
        made = quantizer.Quantizer(str(self.base))
        made.load_quantization_recipe(getattr(recipes, recipe)())
        calibrated = None
        if made.need_calibration:
            name = "input_ids" if isinstance(self.model.inputs, Tokens) else "inputs"
            rows = [{name: np.asarray(x)[None]} for x in self.calibration.inputs]
            calibrated = made.calibrate({"serving_default": rows})
        path = self.folder / f"{recipe}.tflite"
        path.write_bytes(bytes(made.quantize(calibrated).quantized_model))
        return path

    def ours(self, limit: int, kind: str) -> tuple[Path, dict[str, Scheme]]:
        """The best plan whose file has at most `limit` bytes."""
        allowed = allowed_for("litert", self.table)
        keep = {"hybrid": has_hybrid, "weights": lambda scheme: True}.get(kind, lambda s: s.group_size is None)
        only = {f"(?:{re.escape(path)})": [str(s) for s in of if keep(s)] for path, of in allowed.items()}
        bits = TARGETS["litert"].stored_bits
        problem = Problem.from_table(self.table, only=only, stored_bits=bits)
        frontier, budget = solve_frontier(problem), min(8 * limit, problem.max_bits)
        options = {"window": self.window, "integer": kind == "integer"}
        while True:
            choice = dict(frontier.at(bits=budget).choice)
            exported = self.exported(choice, kind)
            if (size := size_bytes(exported, "ours", **options)) <= limit:
                break
            budget -= 8 * (size - limit)
        path = self.folder / f"ours_{kind}_{limit}.tflite"
        save(path, exported, "ours", **options)
        return path, choice

    def scores(self, path: Path) -> tuple[dict[str, float], np.ndarray]:
        """KL to the original with its standard error, and agreement of the largest output; the KL of each row."""
        run = Interpreter(path, self.batches[0])
        got = np.concatenate([run(batch) for batch in self.batches])
        p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (self.original, got))
        kl, same = (np.exp(p) * (p - q)).sum(-1, dtype=np.float64), p.argmax(-1) == q.argmax(-1)
        values = kl if self.real is None else (kl * self.real).sum(-1) / self.real.sum(-1)
        agreement = float(same.mean() if self.real is None else same[self.real].mean())
        mean, stderr = mean_and_stderr(values)
        return {"kl": mean, "kl_stderr": stderr, "agreement": agreement}, values

    def times(self, paths: Sequence[Path]) -> list[float]:
        """Median seconds of a batch of each file, in turn."""
        runs, found = [Interpreter(path, self.batches[0]) for path in paths], [[] for _ in paths]
        for _ in range(self.options.repeats):
            for run, seconds in zip(runs, found, strict=True):
                start = time.perf_counter()
                run(self.batches[0])
                seconds.append(time.perf_counter() - start)
        return [float(np.median(seconds)) for seconds in found]

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a recipe and kind of our file, those in `done` left out."""
        known = {(row["recipe"], row["kind"]) for row in done}
        for recipe in self.options.recipes:
            for kind in RECIPES[recipe]:
                if (recipe, kind) in known:
                    continue
                theirs = self.theirs(recipe)
                ours, choice = self.ours(theirs.stat().st_size, kind)
                schemes = [str(scheme) for scheme in choice.values()]
                row: dict[str, Any] = {"recipe": recipe, "kind": kind}
                values = {}
                for side, path in (("their", theirs), ("our", ours)):
                    row |= {f"{side}_bytes": path.stat().st_size}
                    found, values[side] = self.scores(path)
                    row |= {f"{side}_{name}": value for name, value in found.items()}
                row["kl_change"], row["kl_change_stderr"] = mean_and_stderr(values["our"] - values["their"])
                their_time, our_time = self.times([theirs, ours])
                row["time_ratio"] = our_time / their_time
                yield row | {"schemes": {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))}}


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """Of `float64[rows]`, one for each window or image."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


class Interpreter:
    """A file in LiteRT, for batches of one shape; outputs in float32."""

    def __init__(self, path: Path, batch: np.ndarray) -> None:
        litert = importlib.import_module("ai_edge_litert.interpreter")
        self._run = litert.Interpreter(model_path=str(path), num_threads=1)
        (self._given,), (self._out,) = self._run.get_input_details(), self._run.get_output_details()
        self._run.resize_tensor_input(self._given["index"], batch.shape, strict=True)
        self._run.allocate_tensors()
        self(batch)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self._run.set_tensor(self._given["index"], self._codes(batch))
        self._run.invoke()
        found, (scale, zero) = self._run.get_tensor(self._out["index"]), self._out["quantization"]
        return found if found.dtype == np.float32 else (found.astype(np.float32) - zero) * scale

    def _codes(self, batch: np.ndarray) -> np.ndarray:
        dtype, (scale, zero) = self._given["dtype"], self._given["quantization"]
        if dtype == batch.dtype:
            return batch
        info = np.iinfo(dtype)
        return np.clip(np.round(batch / scale) + zero, info.min, info.max).astype(dtype)


def main(options: Options) -> None:
    """Compare, print, write after every row.

    Raises:
      MpqError: a recipe is not among those there are, or the model or the data are wrong.
    """
    for name in options.recipes:
        known("recipe", name, RECIPES)
    done = rows_in(options.out)
    with tempfile.TemporaryDirectory() as folder:
        files = Files(options, Path(folder))
        inputs = {"data": files.calibration.digest, "model": files.model.digest, "test": files.test.digest}
        config = dataclasses.asdict(options) | {"data": Path(options.data).name, "out": options.out.name}
        record = RunRecord.collect(config | {"model": files.model.name}, seeds={}, inputs=inputs)
        keep(files.rows(done), options.out, {"record": record.to_json()}, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
