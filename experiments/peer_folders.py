r"""Checkpoints of `mpq export` beside those that their runtime's own quantizer makes, of the same format and size.

Run:     python -m experiments.peer_folders --model reference --python ENV/bin/python --data TEXT --test TEXT
         --other TEXT --out FILE   (environments as for `experiments/weight_peers.py`)
Expect:  a lower KL to the original by QEP in every case; where no data is seen, the same codes
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by case and method, bytes of the weights' file and quality on two texts, from the logits of
         the runtime, which reads both sides' folders alike; of ours also what it changes (KL less that of theirs,
         paired by window) and the runtime's time for a batch over that for theirs, both in one run in turns

All have one scheme for the linear weights of the blocks, and the rest in float32. What differs is which codes and
scales are chosen within the format. Standard errors are over windows.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from experiments.activation_peers import as_model
from experiments.distillation import Comparison
from experiments.kept import keep, rows_in
from experiments.weight_peers import PEERS, Judged, Made, Peer, Texts, compared
from mpq.artifacts import make_plan
from mpq.config import known
from mpq.distill import Distill
from mpq.evaluate import DocumentScores
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.formats import parse_scheme
from mpq.hf.containers import CONTAINERS
from mpq.hf.export import save
from mpq.models.hub import resolve
from mpq.quantize import RTN, Candidates
from mpq.types import QTensor, Scheme

Scores = Mapping[str, DocumentScores]
"""By text."""


class Case(NamedTuple):
    """A format that a runtime reads, and its own quantizer.

    Attributes:
      theirs: what makes their folder.
      reader: what runs ours.
      container: of `mpq.hf.containers`.
      scheme: of the linear weights, as large as theirs.
    """

    theirs: Peer
    reader: Peer
    container: str
    scheme: str


_STOCK, _GPTQMODEL = Peer("nothing", {}), Peer("read_by_gptqmodel", {})
CASES: Mapping[str, Case] = {
    "bitsandbytes NF4": Case(
        Peer("bitsandbytes_folder", {"quant_type": "nf4", "double": False}), _STOCK, "bnb", "nf4_g64_sfloat32"
    ),
    "AutoRound W4g32": Case(
        Peer("auto_round_folder", {**PEERS["AutoRound W4g32"].options, "format": "llm_compressor"}),
        _STOCK,
        "hf",
        "int4_g32",
    ),
    "GPTQModel W4g32": Case(PEERS["GPTQ W4g32"], _GPTQMODEL, "gptq", "int4_g32"),
    "GPTQModel W3g32": Case(PEERS["GPTQ W3g32"], _GPTQMODEL, "gptq", "int3_g32"),
}
METHODS = ("rtn", "gptq", "qep", "guided", "distilled")
"""Ours: without data, each weight for itself, each making up for those before it, that by end-loss-weighted grams, and
the third distilled."""


@dataclasses.dataclass(frozen=True)
class Options(Texts):
    """What is compared.

    Attributes:
      cases: of `CASES`.
      methods: of `METHODS`.
    """

    cases: tuple[str, ...] = ("bitsandbytes NF4", "AutoRound W4g32")
    methods: tuple[str, ...] = METHODS


def rounded(comparison: Comparison, scheme: Scheme, method: str, steps: int) -> dict[str, QTensor]:
    """The weights of the blocks under one scheme, made by one of `METHODS`."""
    choice = dict.fromkeys((w.path for w in comparison.weights), scheme)
    if method == "rtn":
        return Candidates(comparison.model.params, comparison.traced.weights, RTN()).choose(choice)
    if method == "gptq":
        return comparison.candidates.choose(choice)
    if method == "guided":
        return comparison.led.propagated(comparison.led.candidates, choice)
    qtensors = comparison.propagated(comparison.candidates, choice)
    if method == "qep":
        return qtensors
    training = Distill(steps=steps, batch_size=comparison.options.batch_size)
    found = training(comparison.model, comparison.traced, qtensors, comparison.calibration, key=jax.random.key(0))
    return found.qtensors


def written(folder: Path, comparison: Comparison, qtensors: Mapping[str, QTensor], container: str) -> Path:
    """The checkpoint of a model with these weights, all others in float32."""
    model, weights = comparison.model, comparison.traced.weights
    plain = [w.path for w in weights if w.path not in qtensors]
    rest = Candidates(model.params, weights, RTN()).choose(dict.fromkeys(plain, parse_scheme("fp32")))
    whole = {**rest, **qtensors}
    plan = make_plan("plan", {path: q.scheme for path, q in whole.items()}, None, weights, 0, model.digest)
    orbax.save(folder / "plan", **export_arguments(model, weights, whole, plan))
    save(folder / "checkpoint", orbax.load(folder / "plan"), CONTAINERS[container])
    return folder / "checkpoint"


def weights_bytes(folder: Path) -> int:
    """Of all files of weights below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def changed(now: DocumentScores, before: DocumentScores) -> dict[str, float]:
    """KL less that of before, paired by window."""
    return dict(zip(("kl_change", "kl_change_stderr"), now.difference(before), strict=True))


def row_of(
    judged: Judged, folder: Path, made: Made | str, theirs: Scores | None
) -> tuple[dict[str, Any], Scores | None]:
    """What a row says of a folder that the runtime has read, and its scores; the refusal, if it has refused it.

    Args:
      judged: model and texts.
      folder: of the weights' files.
      made: what the runtime made of it.
      theirs: scores of their folder, which ours is put beside; None: this is theirs, or they have none.
    """
    if isinstance(made, str):
        return {"refused": made}, None
    scores = judged.all_scores(as_model(judged.model, made.logits), judged.model.params)
    row = {"bytes": weights_bytes(folder), "versions": made.row["versions"], **judged.described(scores)}
    if theirs is not None:
        row |= {text: row[text] | changed(now, theirs[text]) for text, now in scores.items()}
        row["time_ratio"] = made.row["turns"][0] / made.row["turns"][1]
    return row, scores


def rows(
    options: Options, comparison: Comparison, judged: Judged, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One a case for theirs, made again where ours is yet to be put beside it, then one a method for ours."""
    has = {(row["case"], row["method"]) for row in done}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work, own, place = judged.work(options.python, folder), folder / "theirs", folder / "made"
        for case in options.cases:
            missing = [method for method in ("theirs", *options.methods) if (case, method) not in has]
            if not missing:
                continue
            theirs, reader, container, scheme = CASES[case]
            told = {"case": case, "scheme": scheme, "container": container, "steps": options.steps}
            shutil.rmtree(own, ignore_errors=True)
            row, before = row_of(judged, own, work(resolve(options.model), theirs, save=str(own)), None)
            if "theirs" in missing:
                yield told | {"method": "theirs"} | row
            for method in missing:
                if method != "theirs":
                    shutil.rmtree(place, ignore_errors=True)
                    qtensors = rounded(comparison, parse_scheme(scheme), method, options.steps)
                    beside = {} if before is None else {"beside": str(own)}
                    made = work(written(place, comparison, qtensors, container), reader, **beside)
                    row, _ = row_of(judged, place / "checkpoint", made, before)
                    yield told | {"method": method} | row


def main(options: Options) -> None:
    """Compare, print, write after every row.

    Raises:
      MpqError: a case or a method is not among those there are, the environment of the peers lacks one, or the model or
        a text is wrong.
    """
    for name in options.cases:
        known("case", name, CASES)
    for name in options.methods:
        known("method", name, dict.fromkeys(METHODS))
    done = rows_in(options.out)
    comparison, judged = compared(options)
    keep(rows(options, comparison, judged, done), options.out, judged.head(options), done)


if __name__ == "__main__":
    main(tyro.cli(Options))
