r"""Our file against the runtime's own quantizer, at the same size and in the runtime: ONNX Runtime's `MatMulNBits`.

Run:     python -m experiments.runtimes --model reference --data TEXT --test TEXT --out FILE
         (needs mpq[onnx,torch] and onnx_ir: HQQ of onnxruntime is written in PyTorch)
Expect:  KL to the original is lower in every row
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by quantizer, width and block of onnxruntime, bytes of the file and KL to the original, nats
         per token on held-out text, of its file and of ours, which is at most as large, and seconds a batch

Both start from the same graph, in float32 with the embedding in float16. Theirs quantizes its matmuls, scales in
float32, and sees no data; ours is the plan that `mpq allocate --for onnx` solves for the same number of bytes, rounded
by GPTQ. Logits are those of ONNX Runtime on the CPU, on one thread; `*_stderr` are over windows. Seconds are medians of
`repeats` of one batch, all files in turns: theirs, ours and the graph in float32.
"""

import dataclasses
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.distillation import Comparison
from experiments.distillation import Options as Text
from experiments.kept import keep, named_options, rows_in
from mpq.allocate import Problem, solve_frontier
from mpq.artifacts import make_plan
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.onnx.export import save, size_bytes
from mpq.onnx.graph import require_onnx
from mpq.record import RunRecord
from mpq.types import MpqError, Scheme

Run = Callable[[np.ndarray], np.ndarray]
"""A batch -> what the model says of it."""

QUANTIZERS = ("rtn", "rtn_symmetric", "hqq")
"""Of onnxruntime: its default with and without zero points, and HQQ, which has 4 bits only."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: a folder, or `reference`.
      data, test: calibration and held-out text.
      out: JSON file.
      quantizers: of `QUANTIZERS`.
      widths: bits and block of what they make, `4_32`.
      schemes: that our plans choose from.
      windows: of either text, `window` tokens each, `batch_size` a pass.
      repeats: of a batch, for its time.
    """

    model: str
    data: Path
    test: Path
    out: Path
    quantizers: tuple[str, ...] = QUANTIZERS
    widths: tuple[str, ...] = ("2_32", "4_32", "4_128", "8_32")
    schemes: tuple[str, ...] = (
        "int2_g16",
        "int2_g32",
        "int2_g16_zp",
        "int4_g16",
        "int4_g32",
        "int4_g32_zp",
        "int4_g64",
        "int4_g128",
        "int8_g16",
        "int8_g32",
        "int8_g128",
        "fp16",
    )
    windows: int = 64
    window: int = 256
    batch_size: int = 8
    repeats: int = 20


def runner(path: Path) -> Run:
    """A file in ONNX Runtime, on one thread; tokens in the integers that it reads."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    dtype = {"tensor(int64)": np.int64}.get(given.type)
    return lambda batch: session.run(None, {given.name: batch if dtype is None else batch.astype(dtype)})[0]


def medians(runs: Sequence[Run], batch: np.ndarray, repeats: int) -> list[float]:
    """Seconds of a batch, in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 2):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(batch)
            if repeat >= 2:  # the first ones allocate
                found.append(time.perf_counter() - start)
    return [float(np.median(found)) for found in times]


class Runtimes:
    """The model, its text, and the graph that both sides start from."""

    def __init__(self, options: Options, folder: Path) -> None:
        names = [f.name for f in dataclasses.fields(options) if f.name in Text.__annotations__]
        shared: dict[str, Any] = {name: getattr(options, name) for name in names}
        self.options, self.folder = options, folder
        self.comparison = Comparison(Text(**shared, only="", uniform=(options.schemes[0],), fine=options.schemes[1:]))
        self.test = self.comparison.reference.data
        model = self.comparison.model
        apply = jax.jit(model.apply)
        batches = np.split(self.test.inputs, range(options.batch_size, len(self.test.inputs), options.batch_size))
        self.batches = batches
        self.original = [np.asarray(jax.nn.log_softmax(apply(model.params, batch))) for batch in batches]
        self.plain = {w.path: w.kind != "matmul" for w in self.comparison.traced.weights}

    def exported(self, choice: Mapping[str, Scheme]) -> Exported:
        """The model under a plan, as it is read back from the disk."""
        model, weights = self.comparison.model, self.comparison.traced.weights
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            plan = make_plan("plan", choice, None, weights, 0, model.digest)
            qtensors = self.comparison.candidates.choose(choice)
            orbax.save(Path(folder) / "plan", **export_arguments(model, weights, qtensors, plan))
            return orbax.load(Path(folder) / "plan")

    def base(self) -> Path:
        """The graph in float32, its embedding in float16."""
        path, halved = self.folder / "base.onnx", {True: parse_scheme("fp16"), False: parse_scheme("fp32")}
        if not path.exists():
            save(path, self.exported({name: halved[plain] for name, plain in self.plain.items()}), "base")
        return path

    def theirs(self, quantizer: str, bits: int, block: int) -> Path:
        """The file that onnxruntime's quantizer makes."""
        onnx, nbits = require_onnx(), importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        base = onnx.load(self.base())
        symmetric = quantizer == "rtn_symmetric"
        config = nbits.DefaultWeightOnlyQuantConfig(block, symmetric, bits=bits)
        if quantizer == "hqq":
            config = nbits.HQQWeightOnlyQuantConfig(block, bits)
        made = nbits.MatMulNBitsQuantizer(base, bits, block, symmetric, algo_config=config)
        made.process()
        path = self.folder / f"{quantizer}_{bits}_{block}.onnx"
        onnx.save(made.model.model, path)
        return path

    def ours(self, limit: int) -> tuple[Path, dict[str, Scheme]]:
        """The best plan whose file has at most `limit` bytes."""
        table = self.comparison.table
        only = {f"(?:{path})": ["fp16"] for path, plain in self.plain.items() if plain}
        frontier = solve_frontier(Problem.from_table(table, only=only))
        bits = 8 * limit
        while True:
            choice = dict(frontier.at(bits=bits).choice)
            exported = self.exported(choice)
            if (size := size_bytes(exported, "ours")) <= limit:
                break
            bits -= 8 * (size - limit)
        path = self.folder / f"ours_{limit}.onnx"
        save(path, exported, "ours")
        return path, choice

    def kl(self, run: Run) -> tuple[float, float]:
        """KL of a file to the original, and its standard error."""
        rows: list[np.ndarray] = []
        for batch, p in zip(self.batches, self.original, strict=True):
            q = np.asarray(jax.nn.log_softmax(run(batch)))
            rows.append((np.exp(p) * (p - q)).sum(-1, dtype=np.float64).mean(-1))
        values = np.concatenate(rows)
        return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a quantizer and width, those in `done` left out; what a quantizer does not do is left out too."""
        known = {(row["quantizer"], row["bits"], row["block"]) for row in done}
        for name in self.options.quantizers:
            for width in self.options.widths:
                bits, block = map(int, width.split("_"))
                if (name, bits, block) in known or (name == "hqq" and bits != 4):
                    continue
                theirs = self.theirs(name, bits, block)
                ours, choice = self.ours(theirs.stat().st_size)
                schemes = [str(scheme) for scheme in choice.values()]
                row: dict[str, Any] = {"quantizer": name, "bits": bits, "block": block}
                runs = {"their": runner(theirs), "our": runner(ours), "float": runner(self.base())}
                for side, path in (("their", theirs), ("our", ours)):
                    kl, stderr = self.kl(runs[side])
                    row |= {f"{side}_bytes": path.stat().st_size, f"{side}_kl": kl, f"{side}_kl_stderr": stderr}
                times = medians(list(runs.values()), self.batches[0], self.options.repeats)
                row |= {f"{side}_seconds": seconds for side, seconds in zip(runs, times, strict=True)}
                yield row | {"schemes": {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))}}


def main(options: Options) -> None:
    """Compare, print, write after every row.

    Raises:
      MpqError: a quantizer is not among those there are, or the model or a text is wrong.
    """
    if unknown := [name for name in options.quantizers if name not in QUANTIZERS]:
        raise MpqError(f"unknown quantizer {unknown[0]!r}: the valid ones are {', '.join(QUANTIZERS)}")
    done = rows_in(options.out)
    with tempfile.TemporaryDirectory() as folder:
        runtimes = Runtimes(options, Path(folder))
        comparison = runtimes.comparison
        inputs = {"data": comparison.calibration.digest, "model": comparison.model.digest, "test": runtimes.test.digest}
        config = named_options(options, ("data", "test", "out"))
        record = RunRecord.collect(config | {"model": comparison.model.name}, seeds={}, inputs=inputs)
        keep(runtimes.rows(done), options.out, {"record": record.to_json()}, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
