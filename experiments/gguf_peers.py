r"""Files for llama.cpp at equal bytes: its own quantizer with an importance matrix, and `mpq gguf`.

Run:     python -m experiments.gguf_peers --model reference --data reference --llama-cpp DIR \
             --out experiments/results/gguf/reference.json
Needs:   pip install 'mpq[gguf]' xllamacpp, and a folder of llama.cpp's shared libraries (see `experiments.llama_cpp`)
Expect:  at the bytes of Q2_K, Q3_K_M, Q4_K_M and Q5_K_M a KL lower by a third to a half, the intervals apart
Resume:  type the same command again: mixes that the file holds are not made again
Writes:  one JSON object: by mix, bytes and KL of four files - llama.cpp's, its mix rounded by GPTQ here, the best found
         here within its bytes, and that with embedding and output in the mix's types - and how much lower KL is

Every number is of a file, run in llama.cpp, against the file of plain floats run there too, on held-out windows:
KL(float || quantized) in nats per token, standard errors over documents. Importances are E[x^2] of the weights' inputs
on all calibration windows, those that the search scores on included. As `llama-imatrix` does, they leave the embedding
out, where that is the output too.
"""

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.llama_cpp import LlamaCpp, Quantizer
from mpq.allocate import solve_frontier
from mpq.calibrate import calibrate
from mpq.data.sources import read_sets
from mpq.estimate import mean_over_documents, paired_difference, sums_over_documents
from mpq.files import canonical_json, read_json, write_json
from mpq.formats import parse_scheme
from mpq.gguf.export import in_memory, save
from mpq.gguf.names import gguf_name
from mpq.gguf.search import Options as SearchOptions
from mpq.gguf.search import Search, Target, best_file, file_problem
from mpq.inputs import Dataset
from mpq.models import load
from mpq.pipeline import score_store
from mpq.record import RunRecord
from mpq.types import QTensor

FILES = ("llama_cpp", "mix_rounded_here", "mpq_same_ends", "mpq")
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: a folder, or `reference`.
      data: text, divided as `mpq gguf` divides it, or `reference`.
      llama_cpp: folder of llama.cpp's shared libraries.
      out: JSON file.
      mixes: of llama.cpp.
      metric: that predicts losses; refine_rounds: of the search on measured plans.
      window: tokens; windows, statistics_windows, selection_windows and test_windows: of them.
      threads: of llama.cpp.
    """

    model: str
    data: str
    llama_cpp: Path
    out: Path
    mixes: tuple[str, ...] = MIXES
    metric: str = "fisher"
    refine_rounds: int = 0
    window: int = 256
    windows: int = 32
    statistics_windows: int = 96
    selection_windows: int = 32
    test_windows: int = 96
    threads: int = 1


def make_search(options: Options) -> Search:
    """The search for files of a model."""
    names = ("metric", "refine_rounds", "window", "windows", "statistics_windows", "selection_windows", "test_windows")
    how = SearchOptions(**{name: getattr(options, name) for name in names})
    model = load(options.model)
    sets = read_sets(model, options.data, window=options.window, limits=how.limits, windows_per_document=4)
    return Search(model, sets, model.name, how, score_store(options.out.parent / "scores"))


def importances(search: Search) -> dict[str, np.ndarray]:
    """Name of a tensor -> `float32[k]`, of all weights in blocks, and of the output where it is no embedding."""
    stats = calibrate(search.traced, search.model.params, search.sets["calibration"], search.options.batch_size)
    weights = [w for w in search.traced.weights if w.path in stats and "embedding" not in w.kind]
    return {gguf_name(w.path): np.diagonal(stats[w.path].gram[0]).astype(np.float32) for w in weights}


class Measured:
    """KL of files to the file of plain floats, both run in llama.cpp, by document."""

    def __init__(self, plain: Path, data: Dataset, threads: int):
        self.data, self._threads = data, threads
        self._tokens = [row[mask].tolist() for row, mask in zip(data.inputs, data.mask, strict=True)]
        self.counts = sums_over_documents([len(t) - 1 for t in self._tokens], data.document)
        self._reference = list(self._log_probabilities(plain))

    def __call__(self, path: Path) -> np.ndarray:
        """Sums over the tokens of each document, `float64[D]` nats."""
        pairs = zip(self._reference, self._log_probabilities(path), strict=True)
        return sums_over_documents([float((np.exp(p) * (p - q)).sum()) for p, q in pairs], self.data.document)

    def _log_probabilities(self, path: Path) -> Iterator[np.ndarray]:
        file = LlamaCpp(path, self.data.inputs.shape[1], self._threads)
        for tokens in self._tokens:
            z = file.logits(tokens)[:-1].astype(np.float64)
            z -= z.max(axis=-1, keepdims=True)
            yield (z - np.log(np.exp(z).sum(axis=-1, keepdims=True))).astype(np.float32)
        file.close()


def compared(measured: Measured, sums: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Numbers of the files of one mix.

    Args:
      measured: gives the counts.
      sums: KL by document, `float64[D]`, of every one of `FILES`.
      sizes: bytes of each.
    """
    row: dict[str, Any] = {}
    for name, values in sums.items():
        mean, stderr = mean_over_documents(values, measured.counts)
        row[name] = {"bytes": sizes[name], "kl": float(mean), "kl_stderr": float(stderr)}
    theirs, ours = sums["llama_cpp"], sums["mpq"]
    for name, values in sums.items():  # a ratio of two sums over documents, as a mean per token is
        ratio, stderr = mean_over_documents(values, theirs)
        row[name] |= {"lower_by_percent": 100 * (1 - float(ratio)), "lower_by_percent_stderr": 100 * float(stderr)}
    difference, stderr = paired_difference(ours, theirs, measured.counts)
    ends = [row[name]["kl"] + sign * 1.96 * row[name]["kl_stderr"] for name, sign in (("mpq", 1), ("llama_cpp", -1))]
    return row | {
        "difference": float(difference),
        "difference_stderr": float(stderr),
        "intervals_apart": ends[0] < ends[1],
    }


def rows(
    options: Options, search: Search, quantizer: Quantizer, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One a mix, those in `done` left out."""
    known = {row["mix"] for row in done}
    weights, params = search.traced.weights, search.model.params
    with tempfile.TemporaryDirectory(dir=options.out.parent) as name:
        folder = Path(name)
        single = parse_scheme("fp32")
        floats = {w.path: QTensor(w.read(params), None, None, single) for w in weights}
        save(folder / "plain.gguf", in_memory(search.model, weights, floats), search.name)
        measured = Measured(folder / "plain.gguf", search.sets["test"], options.threads)
        importance = importances(search)
        for mix in options.mixes:
            if mix in known:
                continue
            paths = {name: folder / f"{name}.gguf" for name in FILES}
            sizes = {"llama_cpp": quantizer(folder / "plain.gguf", paths["llama_cpp"], mix, importance)}
            sizes["mix_rounded_here"] = search.write(paths["mix_rounded_here"], search.mix(mix))
            found = best_file(search, Target(size=f"{sizes['llama_cpp']}B"), paths["mpq"])
            sizes["mpq"] = found["size_bytes"]
            ends = {re.escape(p): str(s) for p, s in search.mix(mix).items() if not p.startswith("layers.")}
            problem = file_problem(search.table, search.bytes_beside, ends)
            bits = min(8 * (sizes["llama_cpp"] - search.bytes_beside), problem.max_bits)
            alike = solve_frontier(problem).at(bits=bits)
            sizes["mpq_same_ends"] = search.write(paths["mpq_same_ends"], alike.choice)
            sums = {name: measured(path) for name, path in paths.items()}
            told = {key: found[key] for key in ("plan", "plans", "choices")}
            yield {"mix": mix, **compared(measured, sums, sizes), "searched": told}


def main(options: Options) -> None:
    """Measure, print, write after every mix.

    Raises:
      MpqError: the model, a text or llama.cpp's folder is wrong.
    """
    options.out.parent.mkdir(parents=True, exist_ok=True)
    quantizer, search = Quantizer(options.llama_cpp), make_search(options)
    done = read_json(options.out, "results of a comparison")["rows"] if options.out.exists() else []
    inputs = {"model": search.model.digest, **{name: data.digest for name, data in search.sets.items()}}
    config = dataclasses.asdict(options) | {"out": options.out.name, "llama_cpp": quantizer.name}
    config |= {"model": search.model.name, "data": Path(options.data).name}
    record = RunRecord.collect(config, seeds={"search": search.options.seed}, inputs=inputs)
    test = search.sets["test"]
    head = {"documents": len(np.unique(test.document)), "tokens": int(test.mask.sum()), "record": record.to_json()}
    for row in rows(options, search, quantizer, done):
        print(canonical_json({key: value for key, value in row.items() if key != "searched"}), end="", flush=True)
        done.append(row)
        write_json(options.out, head | {"rows": done})


if __name__ == "__main__":
    main(tyro.cli(Options))
