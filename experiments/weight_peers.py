r"""Weights rounded by other tools beside ours: the same model, windows, calibration text and way of counting bits.

Run:     python -m experiments.weight_peers --model DIR --python ENV/bin/python --data TEXT --test TEXT --other TEXT
         --out FILE   (ENV is an environment of its own with the peers: `pip install auto-round hqq bitsandbytes
         nvidia-modelopt torchao`; another has gptqmodel, whose pins are not theirs: a second run, `--peers "GPTQ ..."`)
Expect:  at every size, at most half of the best peer's excess loss
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by setting of a peer and by budget of ours, bits per weight, seconds, KL to the original and
         excess loss, nats per token, on text like the calibration text and on another domain's;
         `python -m analysis.weight_peers` draws up the tables

Peers quantize in PyTorch, in their own environment, with their own defaults but for windows and group sizes; theirs are
the logits (`experiments/weight_peer_worker.py`). Ours are plans of `experiments/distillation.py`. All quantize the
linear weights of the decoder's blocks; sizes count codes, scales and zero points, and 16 bits for a value that a peer
leaves as it is. Standard errors are over windows.
"""

import dataclasses
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from experiments.activation_peers import Logits, as_model
from experiments.distillation import Comparison, quality, windows_of
from experiments.distillation import Options as Ours
from experiments.kept import keep, rows_in
from mpq.config import known
from mpq.evaluate import DocumentScores, Reference, score
from mpq.models import Model
from mpq.models.hub import resolve
from mpq.quantize import apply_plan
from mpq.record import RunRecord
from mpq.types import MpqError, Params

WORKER = Path(__file__).with_name("weight_peer_worker.py")
UNTOUCHED = 16
"""Bits of a value that a peer leaves as it is."""


class Peer(NamedTuple):
    """A setting of a peer.

    Attributes:
      method: function of the worker.
      options: of it.
    """

    method: str
    options: Mapping[str, Any]


def _auto_round(bits: int, sym: bool = True) -> Peer:
    return Peer("auto_round", {"bits": bits, "group_size": 32, "sym": sym})


def _auto_scheme(avg_bits: float) -> Peer:
    return Peer("auto_round", {"avg_bits": avg_bits, "choices": (2, 3, 4, 8), "group_size": 32, "sym": True})


def _bnb(quant_type: str, blocksize: int, double: bool = False) -> Peer:
    return Peer("bitsandbytes", {"quant_type": quant_type, "blocksize": blocksize, "double": double})


def _grouped(method: str, bits: int, group_size: int = 32, **more: Any) -> Peer:
    return Peer(method, {"bits": bits, "group_size": group_size, **more})


FLOAT = "PyTorch, float32"
PEERS: Mapping[str, Peer] = {
    FLOAT: Peer("nothing", {}),
    **{f"AutoRound W{bits}g32": _auto_round(bits) for bits in (2, 3, 4)},
    **{f"AutoRound W{bits}g32 asymmetric": _auto_round(bits, sym=False) for bits in (2, 3, 4)},
    **{f"AutoRound AutoScheme {bits:g}": _auto_scheme(bits) for bits in (2.6, 3.0, 3.5, 4.0, 4.5)},
    **{f"HQQ W{bits}g{group}": _grouped("hqq", bits, group) for bits, group in ((2, 64), (3, 64), (4, 64))},
    **{f"bitsandbytes {name.upper()} {block}": _bnb(name, block) for name, block in (("nf4", 64), ("fp4", 64))},
    "bitsandbytes NF4 64, double": _bnb("nf4", 64, double=True),
    **{f"GPTQ W{bits}g32": _grouped("gptqmodel", bits, sym=True) for bits in (2, 3, 4)},
    **{f"ModelOpt AWQ W{bits}g32": _grouped("modelopt", bits, config="INT4_AWQ_CFG") for bits in (3, 4)},
    **{f"torchao W{bits}g32": _grouped("torchao", bits) for bits in (2, 3, 4)},
}


@dataclasses.dataclass(frozen=True)
class Texts:
    """What peers and ours are given.

    Attributes:
      model: a folder of a Llama, or `reference`.
      python: of an environment with the peers.
      data, test: calibration and held-out text.
      other: text of another domain.
      out: JSON file.
      steps: of a distillation.
      windows: of every text, `window` tokens each, `batch_size` a pass.
    """

    model: str
    python: Path
    data: Path
    test: Path
    other: Path
    out: Path
    steps: int = 600
    windows: int = 64
    window: int = 256
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class Options(Texts):
    """What is compared.

    Attributes:
      peers: of `PEERS`.
      ingredients: of `experiments.distillation`, for ours.
      budgets: bits per quantized weight, for ours.
    """

    peers: tuple[str, ...] = tuple(PEERS)
    ingredients: tuple[str, ...] = ("propagated", "propagated_varied")
    budgets: tuple[float, ...] = (2.5, 2.9, 3.5, 3.9, 4.5)


@dataclasses.dataclass(frozen=True)
class Made:
    """What a worker made.

    Attributes:
      logits: of windows that it was given.
      layers: as the worker's docstring says.
      row: seconds and versions.
    """

    logits: Logits
    layers: Sequence[Sequence[Any]]
    row: Mapping[str, Any]


def size_bits(layers: Sequence[Sequence[Any]], values: int) -> float:
    """Bits of all quantized values of a model of which a peer quantized `layers`.

    Args:
      layers: name, rows, columns, bits of a code, values that share a scale, bits of a scale and of a zero point, and
        whether a group may go on in the next row.
      values: of the model; those of no layer count `UNTOUCHED` bits.

    Raises:
      MpqError: the layers hold more.
    """
    total, held = 0.0, 0
    for _, rows, columns, bits, group, scale, zero, flat in layers:
        groups = -(-rows * columns // group) if flat else rows * -(-columns // group)
        total += rows * columns * bits + groups * (scale + zero)
        held += rows * columns
    if held > values:
        raise MpqError(f"the layers of a peer hold {held} values, of {values} that are counted: give the same weights")
    return total + UNTOUCHED * (values - held)


def refusal(printed: str, python: Path, method: str) -> str:
    """The last line that a worker printed before it failed.

    Raises:
      MpqError: it failed for want of a package.
    """
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "nothing was printed").strip()
    if "ModuleNotFoundError" in printed:
        raise MpqError(
            f"{python} cannot run {method} ({last}): give an environment that has the package, or other peers"
        )
    return last


def by_window(texts: Sequence[tuple[np.ndarray, Path]]) -> Logits:
    """Logits that were computed before, by the window that they are of: tokens, and the file of their logits."""
    arrays = [np.load(path, mmap_mode="r") for _, path in texts]
    found = {w.tobytes(): (n, i) for n, (tokens, _) in enumerate(texts) for i, w in enumerate(tokens)}

    def run(windows: np.ndarray) -> np.ndarray:
        return np.stack([arrays[n][i] for n, i in (found[np.asarray(w, np.int32).tobytes()] for w in windows)])

    return run


class Work:
    """Jobs for the environment of the peers, on the same windows.

    Attributes:
      python: its interpreter.
      folder: for the files of a job.
      calibration: `int32[windows, time]`.
      texts: name -> `int32[windows, time]`.
    """

    def __init__(self, python: Path, folder: Path, calibration: np.ndarray, texts: Mapping[str, np.ndarray]) -> None:
        self.python, self.folder, self.texts = python, folder, texts
        for name, tokens in {"calibration": calibration, **texts}.items():
            np.save(self._tokens(name), tokens)

    def __call__(self, source: str | Path, peer: Peer, **more: Any) -> Made | str:
        """Do one; what a peer does not take, in its own words, the last line of what it printed.

        Raises:
          MpqError: the environment lacks a package.
        """
        job = {"folder": str(source), "method": peer.method, "options": dict(peer.options), "out": str(self.folder)}
        job |= {"calibration": self._tokens("calibration"), "texts": {t: self._tokens(t) for t in self.texts}, **more}
        path = self.folder / "job.json"
        path.write_text(json.dumps(job))
        command = [str(self.python), "-P", str(WORKER), str(path)]  # modules beside the worker have names of packages
        ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if ran.returncode:
            return refusal(ran.stderr, self.python, peer.method)
        made = json.loads((self.folder / "made.json").read_text())
        logits = by_window([(tokens, self.folder / f"{name}.npy") for name, tokens in self.texts.items()])
        return Made(logits, made.pop("layers"), made)

    def _tokens(self, name: str) -> str:
        return str(self.folder / f"tokens-{name}.npy")


class Judged:
    """Both texts, and the original on them."""

    def __init__(self, path: Path, comparison: Comparison) -> None:
        options, self.model, self.calibration = comparison.options, comparison.model, comparison.calibration
        other = windows_of(self.model, path, options.windows, options.window)
        self.references = {"test": comparison.reference, "other": Reference(self.model, other, options.batch_size)}
        self.original = {name: self.scores(name, self.model, self.model.params) for name in self.references}

    def scores(self, text: str, model: Model, params: Params) -> DocumentScores:
        """On one of the two texts."""
        reference = self.references[text]
        return score(model, params, reference.data, reference=reference, batch_size=0)

    def all_scores(self, model: Model, params: Params) -> dict[str, DocumentScores]:
        """On both texts."""
        return {text: self.scores(text, model, params) for text in self.original}

    def described(self, scores: Mapping[str, DocumentScores]) -> dict[str, Any]:
        """Excess loss, KL to the original and agreement of first choices, by text."""
        found = {}
        for text, of in scores.items():
            found[text] = quality(of, self.original[text]) | {"agreement": of.summary().agreement}
        return found

    def quality(self, model: Model, params: Params) -> dict[str, Any]:
        """As `described`, of a model."""
        return self.described(self.all_scores(model, params))

    def work(self, python: Path, folder: Path) -> Work:
        """Jobs on both texts, and on the calibration text."""
        tokens = {name: np.asarray(one.data.inputs, np.int32) for name, one in self.references.items()}
        return Work(python, folder, np.asarray(self.calibration.inputs, np.int32), tokens)

    def head(self, options: Any) -> dict[str, Any]:
        """What stands beside the rows of an experiment with these options, whose paths are told by their names."""
        config = {key: v.name if isinstance(v, Path) else v for key, v in dataclasses.asdict(options).items()}
        inputs = {name: reference.data.digest for name, reference in self.references.items()}
        inputs |= {"data": self.calibration.digest, "model": self.model.digest}
        record = RunRecord.collect(
            config | {"model": self.model.name}, seeds={"distill": 0, "fisher": 0}, inputs=inputs
        )
        perplexity = {name: original.summary().quality for name, original in self.original.items()}
        return {"perplexity": perplexity, "record": record.to_json()}


def compared(options: Texts) -> tuple[Comparison, Judged]:
    """Ours, and what judges all."""
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(Ours) if hasattr(options, f.name)}
    comparison = Comparison(Ours(**shared))
    return comparison, Judged(options.other, comparison)


def rows(
    options: Options, comparison: Comparison, judged: Judged, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One a setting of a peer, then one an ingredient and budget of ours; those in `done` left out."""
    has, values = {row["name"] for row in done}, sum(w.size for w in comparison.weights)
    with tempfile.TemporaryDirectory() as folder:
        work = judged.work(options.python, Path(folder))
        for name in options.peers:
            if name not in has:
                made = work(resolve(options.model), PEERS[name])
                if isinstance(made, str):
                    yield {"name": name, "by": "peer", "refused": made}
                    continue
                bits = size_bits(made.layers, values) / values if made.layers else None
                quality = judged.quality(as_model(judged.model, made.logits), judged.model.params)
                yield {"name": name, "by": "peer", "bits_per_weight": bits, **made.row, **quality}
    for budget, ingredient in itertools.product(options.budgets, options.ingredients):
        if (name := f"{ingredient} {budget:g}") not in has:
            start, cpu = time.perf_counter(), time.process_time()
            qtensors = comparison.plan(ingredient, int(budget * values))
            spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            schemes = [str(q.scheme) for q in qtensors.values()]
            yield {
                "name": name,
                "by": "mpq",
                "ingredient": ingredient,
                "budget": budget,
                "steps": options.steps,
                "bits_per_weight": sum(w.size_bits(qtensors[w.path].scheme) for w in comparison.weights) / values,
                "schemes": {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))},
                **{key: round(value, 2) for key, value in spent.items()},
                **judged.quality(judged.model, apply_plan(judged.model.params, comparison.traced.weights, qtensors)),
            }


def main(options: Options) -> None:
    """Compare, print, write after every row.

    Raises:
      MpqError: a peer is not among those there are, its environment lacks it, or the model or a text is wrong.
    """
    for name in options.peers:
        known("peer", name, PEERS)
    done = rows_in(options.out)
    comparison, judged = compared(options)
    keep(rows(options, comparison, judged, done), options.out, judged.head(options), done)


if __name__ == "__main__":
    main(tyro.cli(Options))
