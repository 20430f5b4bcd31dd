"""What `mpq sensitivity` and `mpq interactions` do: everything that is scored. Plain data comes back."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpq import artifacts
from mpq.activations import (
    ACTIVATION_METRICS,
    activation_rows,
    calibrate_activations,
    kv_rows,
    parse_activation_scheme,
    save_activation_table,
)
from mpq.budget import budget_bits
from mpq.commands import Data, make_candidates, read_ranges, read_stats
from mpq.config import known
from mpq.data import divide, take, unseen
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models import Model, load
from mpq.quantize import QUANTIZERS, Candidates
from mpq.sensitivity import METRICS, Interactions
from mpq.sensitivity.racing import Race
from mpq.store import score_store
from mpq.trace import Trace
from mpq.types import MpqError

SCHEMES = {
    "weights": ("int2_g64", "int3_g64", "int4_g64", "int8_channel", "bf16"),
    "activations": ("int4_token", "int6_token", "int8_token", "int8_token_asym"),
    "kv": ("int2_head_asym", "int4_head", "int4_head_asym", "int8_head"),
}
"""What is scored, and by which schemes unless others are asked for."""

STATISTICS_WINDOWS = 64
"""Read beside those that are scored, for a rounding algorithm that needs statistics and is given none."""


def sensitivity(
    model_source: str,
    text: Data,
    out: Path,
    metric: str,
    method: str,
    stats: Path | None,
    schemes: tuple[str, ...],
    seed: int,
    race: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The table of predicted loss increases; finished scores lie by content in `scores` beside it.

    With `race`, budgets as in a config, measured KL is spent where their plans hang on it.
    """
    measure = known("metric", metric, METRICS)
    if race and metric != "kl":
        raise MpqError(f"metric {metric!r} cannot be raced: give --metric kl, or no --race")
    known("method", method, QUANTIZERS)
    parsed = tuple(parse_scheme(s) for s in schemes or SCHEMES["weights"])
    model = load(model_source)
    traced = text.trace(model)
    data, candidates = _apart(model, traced, text, method, stats)
    options = _options(text, out, seed)
    if race:
        uniform = {str(s): artifacts.uniform_plan(s, model, traced.weights) for s in parsed}
        budgets = tuple(budget_bits(budget, model, traced, uniform) for budget in race)
        del options["key"]
        table, raced = Race(budgets)(model, traced, parsed, candidates, data, **options)
        spent = {"windows_run": raced.windows_run, "windows_of_all": raced.windows_of_all}
    else:
        table, spent = measure(model, traced, parsed, candidates, data, **options), {}
    artifacts.save_table(out, table, {"other_bits": artifacts.other_bits(model, traced.weights)})
    return {
        "out": str(out),
        "weights": [w.path for w in table.weights],
        **_numbers(table),
        **spent,
    }


def interactions(
    model_source: str,
    text: Data,
    out: Path,
    method: str,
    stats: Path | None,
    schemes: tuple[str, ...],
    num_probes: int,
    seed: int,
) -> dict[str, Any]:
    """What the errors of two weights cost together; finished batches lie by content in `scores` beside it."""
    known("method", method, QUANTIZERS)
    parsed = tuple(parse_scheme(s) for s in schemes or SCHEMES["weights"])
    model = load(model_source)
    traced = text.trace(model)
    data, candidates = _apart(model, traced, text, method, stats)
    options = _options(text, out, seed)
    table = Interactions(num_probes)(model, traced, parsed, candidates, data, **options)
    artifacts.save_interactions(out, table)
    weights, columns = np.triu_indices(len(table.weights), 1)
    strongest = np.abs(table.correlation()).max(axis=(1, 3))[weights, columns]
    order = np.argsort(-strongest, kind="stable")[:10]
    return {
        "out": str(out),
        "shrinkage": table.shrinkage,
        "strongest": [
            {
                "weights": [table.weights[weights[i]].path, table.weights[columns[i]].path],
                "correlation": float(strongest[i]),
            }
            for i in order
        ],
    }


def activations(
    model_source: str,
    text: Data,
    out: Path,
    of: str,
    metric: str,
    schemes: tuple[str, ...],
    seed: int,
    keys_values: str,
    head_dim: int | None,
    ranges: Path | None = None,
) -> dict[str, Any]:
    """The table of activations (`of` is `activations`) or of the KV cache (`kv`); scores are kept as for weights."""
    known("kind of row", of, SCHEMES)
    measure = known("metric of activations", metric, ACTIVATION_METRICS)
    parsed = tuple(parse_activation_scheme(s) for s in schemes or SCHEMES[of])
    model = load(model_source)
    data = text.dataset(model, "calibration")
    traced = text.trace(model)
    rows = activation_rows(traced) if of == "activations" else kv_rows(traced, keys_values, head_dim)
    options = _options(text, out, seed)
    static = any(scheme.is_calibrated for scheme in parsed)
    if static and ranges is None:
        found = calibrate_activations(model, traced, rows, data, batch_size=text.batch_size)
    else:
        found = {} if ranges is None else read_ranges(ranges, model)
    table = measure(model, traced, rows, parsed, data, **options, ranges=found)
    save_activation_table(out, table)
    return {
        "out": str(out),
        "of": of,
        "activations": [row.path for row in rows],
        "values_per_token": [row.values for row in rows],
        "bytes_per_token": [[row.size_bits(s) / 8 for s in parsed] for row in rows],
        **_numbers(table),
    }


def _apart(model: Model, traced: Trace, text: Data, method: str, stats: Path | None) -> tuple[Dataset, Candidates]:
    """What to score on, and candidates: an algorithm that sees data sees other windows than those."""
    with_further = lambda windows: dataclasses.replace(text, max_windows=text.max_windows + windows)
    read = lambda windows: with_further(windows).dataset(model, "calibration")
    sees_data = QUANTIZERS[method].data_aware
    if sees_data and stats is not None:
        collected, seen = read_stats(stats, model, traced)
        data = take(unseen(read(len(seen)), seen, str(stats)), text.max_windows)
        return data, Candidates(model.params, traced.weights, QUANTIZERS[method], collected)
    if sees_data:
        data, rest = divide(read(STATISTICS_WINDOWS), text.max_windows)
    else:
        data = rest = read(0)
    return data, make_candidates(model, traced, method, rest, stats, text.batch_size)


def _options(text: Data, out: Path, seed: int) -> dict[str, Any]:
    """Of everything that scores; finished items lie by content in `scores` beside what is written."""
    return {"key": jax.random.key(seed), "batch_size": text.batch_size, "store": score_store(out.parent / "scores")}


def _numbers(table: Any) -> dict[str, Any]:
    body = artifacts.table_body(table)
    return {key: body[key] for key in ("metric", "schemes", "loss_increase", "stderr")}
