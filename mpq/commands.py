"""What the sub-commands do: files in, a stage, files out, and the plain result that `--json` prints."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpq import artifacts, commands_activations, show
from mpq.activations import ActivationRange
from mpq.activations.plans import rows_at, split_plan, uniform_rows
from mpq.activations.range_file import load_ranges
from mpq.allocate import solve_frontier
from mpq.calibrate import Weighting
from mpq.calibrate import calibrate as run_calibration
from mpq.certainty import certainty, unknown
from mpq.config import known, load_config
from mpq.data.sources import read_set
from mpq.evaluate import Reference, score
from mpq.export import orbax, rules
from mpq.files import read_json
from mpq.formats import parse_scheme
from mpq.gguf.imatrix import stats_of, write_imatrix
from mpq.gguf.load import open_gguf
from mpq.gguf.reader import is_gguf
from mpq.guide import Guide
from mpq.inputs import Dataset, Tokens
from mpq.inspect import inspect as inspect_model
from mpq.inspect import parse_bpw, stored_bits
from mpq.models import FAMILIES, Model, load, resolve
from mpq.models.untied import TIED
from mpq.quantize import QUANTIZERS, Candidates
from mpq.request import Request
from mpq.trace import Trace
from mpq.types import LayerStats, MpqError

show_written = show.written
show_plan, show_evaluation, show_run = show.plan, show.evaluation, show.run


@dataclasses.dataclass(frozen=True)
class Data:
    """Data and how they are batched. `source`: a file, a folder, or `reference`, the texts shipped with that model."""

    source: str
    window: int | None
    max_windows: int
    batch_size: int

    def window_for(self, model: Model) -> int | None:
        """Tokens a window: as asked, else 256 or the model's context if that is shorter; None for images."""
        if not isinstance(model.inputs, Tokens):
            return None
        return min(256, model.inputs.context) if self.window is None else self.window

    def dataset(self, model: Model, reference_set: str) -> Dataset:
        """Rows for `model`.

        Raises:
          MpqError: no such source, it does not suit the model, or a window is longer than the context.
        """
        if self.batch_size < 1 or self.max_windows < 1:
            raise MpqError("batch-size and max-windows must be at least 1")
        return read_set(model, self.source, reference_set, window=self.window_for(model), limit=self.max_windows)

    def trace(self, model: Model) -> Trace:
        """The model's trace on batches of these data."""
        return model.trace(self.batch_size, self.window_for(model))


def inspect(model_source: str, *, strict: bool, bpw: tuple[str, ...] = ()) -> dict[str, Any]:
    """Weights, what was not taken, and what other sizes would take."""
    return inspect_model(model_source, strict=strict, bpw=parse_bpw(bpw))


def calibrate(
    model_source: str,
    text: Data,
    out: Path,
    of: str,
    keys_values: str,
    imatrix: Path | None = None,
    guide: Guide | None = None,
) -> dict[str, Any]:
    """Statistics of every weight's input, also as an importance matrix; or ranges of activations and KV cache."""
    known("kind of row", of, dict.fromkeys(("weights", *commands_activations.OF)))
    if of != "weights" and imatrix is not None:
        raise MpqError(f"an importance matrix is of weights: leave --imatrix out with --of {of}")
    if of != "weights" and guide is not None:
        raise MpqError(f"grams that the loss guides are of weights: leave --guided out with --of {of}")
    model = load(model_source)
    data = text.dataset(model, "calibration")
    traced = text.trace(model)
    if of != "weights":
        return commands_activations.calibrate(model, traced, data, text.batch_size, out, of, keys_values)
    weightings = None if guide is None else guide(model, traced, data, text.batch_size)
    stats = run_calibration(traced, model.params, data, text.batch_size, weightings)
    artifacts.save_stats(out, stats, model.digest, data)
    body = {"out": str(out), "weights": len(stats), "num_rows": len(data.inputs), "size_bytes": out.stat().st_size}
    if imatrix is None:
        return body
    return body | {"imatrix": str(imatrix), "imatrix_bytes": write_imatrix(imatrix, traced.weights, stats, text.source)}


def allocate(table_path: Path, out: Path, request: Request, picture: Path | None) -> dict[str, Any]:
    """One plan: from the exact frontier, or by mixed-integer programming where more than the size is limited."""
    table, body = artifacts.load_table(table_path)
    beside = int(body["other_bits"])
    matched = request.matched([w.path for w in table.weights])
    problem = request.problem(table, beside)
    if request.is_joint:
        joint = request.joint(problem, table)
        limits, problem = request.joint_limits(joint), joint.problem
    else:
        joint, limits = None, request.limits(problem)
    allocation = request.solve(problem, limits, table)
    if limits or request.interactions is not None:
        beside_it = "keeps to limits beside the size" if limits else "counts losses of pairs"
        sure = unknown(f"the plan {beside_it}, with which resamples are not solved")
    else:
        sure = certainty(problem, allocation.choice, allocation.budget_bits, seed=0)
    chosen, more = allocation, {}
    if joint is not None:
        chosen = dataclasses.replace(allocation, choice=joint.weights(allocation.choice))
        more = {"cache_bytes": joint.cache_bits(allocation.choice) // 8}
    plan = artifacts.plan_of_allocation(request.name, chosen, table, beside)
    plan = plan if joint is None else plan.with_activations(joint.activations(allocation.choice))
    files = request.rules_for(plan.choices, table.weights)
    artifacts.save_plan(out, plan)
    for path, written in files.items():
        rules.save(path, written)
    if picture is not None:
        from analysis.pareto import draw_prediction

        frontier = solve_frontier(problem)
        values = sum(w.size for w in table.weights)
        draw_prediction([int(b) / values for b in frontier.size_bits], frontier.loss.tolist(), plan.to_json(), picture)
    reached = [
        {"name": limit.name, "unit": limit.unit, "limit": limit.limit, "reached": limit.of(problem, allocation)}
        for limit in limits
    ]
    told = {"matched": matched, "limits": reached, "rules": [str(path) for path in files], "stability": sure, **more}
    return {"out": str(out), **plan.to_json(), **told}


def evaluate(model_source: str, text: Data, reference_source: str | None) -> dict[str, Any]:
    """Quality on a text."""
    model = load(model_source)
    data = text.dataset(model, "test")
    reference = None
    if reference_source is not None:
        original = load(reference_source)
        # A GGUF file's config is put together from what llama.cpp needs: with it, the same tokens have to do.
        if is_gguf(model_source) or is_gguf(reference_source):
            what, same = "tokens of this text", text.dataset(original, "test").digest == data.digest
        else:
            what, same = "configs", _computed(original.config) == _computed(model.config)
        if not same:
            raise MpqError(f"{reference_source} is no reference for {model_source}: their {what} differ")
        reference = Reference(original, data, text.batch_size)
    result = score(model, model.params, data, reference=reference, batch_size=text.batch_size).summary()
    body = result.to_json()
    size, bpw = _sizes(model, model_source)
    return {**body, "size_bytes": size, "bits_per_weight": bpw}


def run(config_path: str, overrides: list[str], root: Path) -> dict[str, Any]:
    """The main job. Imports the drawing only here: nothing else of `mpq` knows it."""
    from analysis.report import write_run
    from mpq import pipeline, results
    from mpq.hand_out import MADE_BETTER

    config = load_config(config_path, overrides)
    this = pipeline.prepare(config, root)
    command = " ".join(["mpq run", config_path, *(f"--set {o}" for o in overrides)])
    body = results.finish(this, command)
    write_run(this.folder)
    keep = (*body["reference"], "size_bytes", "bits_per_weight")
    rows = {
        kind: {f"{p['name']} {p['method']}": {k: p[k] for k in keep} for p in body["plans"] if p["kind"] == kind}
        for kind in ("mixed", "uniform", "heuristic", *MADE_BETTER.values())
    }
    return {"run": str(this.folder), "plans": rows.pop("mixed"), **rows, "results": body}


def make_candidates(
    model: Model,
    traced: Trace,
    method: str,
    data: Dataset | None,
    stats: Path | None,
    batch_size: int,
    weightings: Iterable[Weighting] | None = None,
) -> Candidates:
    """Quantized weights; statistics come from the file, else from the text; some algorithms need none."""
    wanted = stats is not None or QUANTIZERS[method].data_aware
    if wanted and stats is None and data is None:
        raise MpqError(f"method {method!r} needs calibration: give --data TEXT or --stats FILE")
    collected = collect(model, traced, data, stats, batch_size, weightings) if wanted else {}
    return Candidates(model.params, traced.weights, QUANTIZERS[method], collected)


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the dtype of its tensors, which an export changes to its scales', and the head's place."""
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", TIED)}


def read_stats(path: Path, model: Model, traced: Trace) -> tuple[dict[str, LayerStats], frozenset[str]]:
    """What `mpq calibrate` wrote, or an importance matrix of llama.cpp, which does not say what windows it saw."""
    if path.suffix == ".dat" or is_gguf(str(path)):
        return stats_of(path, traced.weights), frozenset()
    return artifacts.load_stats(path, model.digest)


def collect(
    model: Model,
    traced: Trace,
    data: Dataset | None,
    stats: Path | None,
    batch_size: int,
    weightings: Iterable[Weighting] | None = None,
) -> Mapping[str, LayerStats]:
    """Statistics from the file, else from the text: one of the two is there."""
    if stats is not None:
        return read_stats(stats, model, traced)[0]
    assert data is not None
    return run_calibration(traced, model.params, data, batch_size, weightings)


def read_plan(text: str, model: Model, traced: Trace, keys_values: str) -> artifacts.Plan:
    """The plan in a file, or a uniform one; `text` may name schemes of activations and of the KV cache beside it.

    `int8_token@int8` are the inputs of weights at int8 alone.
    """
    source, activations, kv = split_plan(text)
    activations, _, format_name = (activations or "").partition("@")
    rows = uniform_rows(traced, activations or None, kv, keys_values)
    if Path(source).exists():
        plan = artifacts.load_plan(Path(source), model, traced.weights)
    else:
        try:
            scheme = parse_scheme(source)
        except MpqError as error:
            raise MpqError(f"plan {source!r} is neither a file nor a scheme: {error}") from error
        plan = dataclasses.replace(artifacts.uniform_plan(scheme, model, traced.weights), name=text)
    chosen = rows_at(rows, format_name, plan.choices) if format_name else rows
    return plan.with_activations({**plan.activations, **chosen})


def read_ranges(path: Path, model: Model) -> Mapping[str, ActivationRange]:
    """Ranges of this model's activations, by path of the row.

    Raises:
      MpqError: no such file, or of another model.
    """
    file = load_ranges(path)
    artifacts.require_model(path, file.model_digest, model.digest)
    return file.ranges


def _sizes(model: Model, source: str) -> tuple[int, float]:
    """Bytes of the whole model, and bits per quantized weight (for an unquantized model: as stored)."""
    weights = model.trace().weights
    if is_gguf(source):
        opened = open_gguf(source, FAMILIES)
        bits = sum(8 * opened.stored[w.param].nbytes for w in weights)
        return opened.file.size_bytes, bits / sum(w.size for w in weights)
    manifest = resolve(source) / orbax.MANIFEST
    if manifest.exists():
        plan = read_json(manifest, "the quantized model's manifest")["plan"]
        return plan["size_bytes"], plan["bits_per_weight"]
    bits = stored_bits(model, weights)
    return (bits + artifacts.other_bits(model, weights)) // 8, bits / sum(w.size for w in weights)
