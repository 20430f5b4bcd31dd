"""The best file for llama.cpp within a number of bytes: `mpq gguf`.

Losses of all weights under ggml's types are predicted, with the errors of GPTQ on the grids of these types; the
knapsack gives every weight its type, each on its own, for llama.cpp fuses none; the sizes are those of the file, to the
byte, alignment and metadata included. Do no harm: on windows that nothing before has seen, what was found is compared
with llama.cpp's largest mix that fits, rounded by the same GPTQ, and the largest single type that fits; the best is
written, read back from the file, and measured on further windows. Its weights are rounded in order as well, each making
up for those before it (`mpq.quantize.propagate`), and written so if that is better on the same windows.
"""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpq.allocate import Problem, Refine, solve_frontier
from mpq.calibrate import calibrate
from mpq.data import divide
from mpq.evaluate import DocumentScores, Reference, score
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.formats.ggml import GGML_SCHEMES
from mpq.gguf.container import aligned
from mpq.gguf.export import decoder_of, in_memory, kind_of, save, size_bytes
from mpq.gguf.layouts import row_bytes
from mpq.gguf.load import load_gguf
from mpq.gguf.mixes import MIXES, mix
from mpq.inputs import Dataset
from mpq.measure import PlanLoss
from mpq.models import FAMILIES, Model
from mpq.quantize import GPTQ, Candidates, apply_plan
from mpq.quantize.propagate import SUFFIX as PROPAGATE
from mpq.quantize.propagate import Propagation
from mpq.sensitivity import METRICS
from mpq.store import Store
from mpq.trace import Trace
from mpq.types import MpqError, QTensor, Scheme, SensitivityTable
from mpq.units import bpw_to_bits, parse_size

Choice = Mapping[str, Scheme]

K_QUANTS = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
WAYS = ("gptq", "gptq" + PROPAGATE)
"""How the weights of the best plan may be made."""

SMALL_BLOCKS = ("mxfp4", "q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")
"""Candidates of weights whose rows fill blocks of 256, and of the others."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What the file may take: exactly one of three.

    Attributes:
      size: of the file, such as `4.1GB`.
      bpw: bits per quantized weight.
      like: a mix of llama.cpp, whose file's bytes are the limit.
    """

    size: str | None = None
    bpw: float | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        given = {"size": self.size, "bpw": self.bpw, "like": self.like}
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) != 1:
            raise MpqError(f"give exactly one of --size, --bpw and --like (given: {', '.join(asked) or 'none'})")


@dataclasses.dataclass(frozen=True)
class Options:
    """How it is searched.

    Attributes:
      types: candidates; those of `K_QUANTS` and `SMALL_BLOCKS` that fit where there are none.
      pins: pattern of the paths of weights -> the type they must have.
      metric: that predicts losses; on `windows` windows, `statistics_windows` others make the grams of GPTQ.
      refine_rounds: most rounds of a search on measured plans after the exact solution.
      window: tokens.
      selection_windows: that the file is chosen on; `test_windows`: that it is measured on.
      batch_size: windows a pass.
      seed: of random numbers.
    """

    types: tuple[str, ...] = ()
    metric: str = "fisher"
    windows: int = 32
    statistics_windows: int = 64
    refine_rounds: int = 0
    window: int | None = None
    selection_windows: int = 32
    test_windows: int = 64
    batch_size: int = 8
    seed: int = 0
    pins: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def limits(self) -> dict[str, int]:
        """Most windows of every set."""
        calibration = self.windows + self.statistics_windows
        return {"calibration": calibration, "selection": self.selection_windows, "test": self.test_windows}


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """One model and its text; what is computed is kept.

    Attributes:
      model: what is quantized.
      sets: calibration, selection and test; no row is in two of them.
      name: of the file's model, for a person.
      options: how it is searched.
      store: of finished scores.
    """

    model: Model
    sets: Mapping[str, Dataset]
    name: str
    options: Options
    store: Store

    @functools.cached_property
    def traced(self) -> Trace:
        """On batches of the sets' shape."""
        batch = min(self.options.batch_size, len(self.sets["calibration"].inputs))
        return self.model.trace(batch, self.sets["calibration"].inputs.shape[1])

    @functools.cached_property
    def types(self) -> tuple[Scheme, ...]:
        """Candidates.

        Raises:
          MpqError: one that is no type of ggml.
        """
        fills = [w.k % 256 == 0 for w in self.traced.weights]
        usual = (*(K_QUANTS if any(fills) else ()), *(SMALL_BLOCKS if not all(fills) else ()))
        found = tuple(map(parse_scheme, dict.fromkeys(self.options.types or usual)))
        if wrong := [str(s) for s in found if s.blocks is None and s.has_scale]:
            raise MpqError(f"type {wrong[0]!r} is none of ggml: allowed are {', '.join(GGML_SCHEMES)}, f16 and bf16")
        return found

    @functools.cached_property
    def divided(self) -> tuple[Dataset, Dataset]:
        """What losses are measured on, and what GPTQ's grams are made of."""
        return divide(self.sets["calibration"], self.options.windows)

    @functools.cached_property
    def candidates(self) -> Candidates:
        """Weights under the types, by GPTQ."""
        stats = calibrate(self.traced, self.model.params, self.divided[1], self.options.batch_size)
        return Candidates(self.model.params, self.traced.weights, GPTQ(), stats)

    @functools.cached_property
    def propagation(self) -> Propagation:
        """Plans by GPTQ, each weight making up for those before it."""
        data = self.divided[1]
        size = min(self.options.batch_size, len(data.inputs))
        return Propagation(self.traced, self.candidates, data, batch_size=size)

    @functools.cached_property
    def table(self) -> SensitivityTable:
        """Predicted losses."""
        data, key = self.divided[0], jax.random.key(self.options.seed)
        batch = min(self.options.batch_size, len(data.inputs))
        metric = METRICS[self.options.metric]
        arguments = (self.model, self.traced, self.types, self.candidates, data)
        return metric(*arguments, key=key, batch_size=batch, store=self.store)

    @functools.cached_property
    def problem(self) -> Problem:
        """The knapsack of the file's bytes."""
        return file_problem(self.table, self.bytes_beside, self.options.pins)

    @functools.cached_property
    def bytes_beside(self) -> int:
        """Of the file that hold no weight: header, metadata and what is not quantized, with what fills them up."""
        choice = dict.fromkeys((w.path for w in self.traced.weights), parse_scheme("f16"))
        return self.file_bytes(choice) - sum(aligned(2 * w.size) for w in self.traced.weights)

    def file_bytes(self, choice: Choice) -> int:
        """Of the file of a plan, to the byte."""
        return size_bytes(self._unquantized, self.name, choice)

    def mix(self, name: str) -> dict[str, Scheme]:
        """Of llama.cpp, for this model."""
        config = self.model.config
        return mix(name, self.traced.weights, decoder_of(config), str(config["model_type"]))

    def budget_bytes(self, target: Target) -> int:
        """Most bytes of the file.

        Raises:
          MpqError: less than the smallest file there is with these types, or the target is no size.
        """
        smallest = {w.path: min(_fitting(self.types, w.k), key=w.size_bits) for w in self.traced.weights}
        least, low_mix = self.file_bytes(smallest), next(iter(MIXES))
        if target.like is not None:
            budget = self.file_bytes(self.mix(target.like))
        elif target.size is not None:
            budget = parse_size(target.size) // 8
        else:
            assert target.bpw is not None
            values = sum(w.size for w in self.traced.weights)
            budget = self.bytes_beside + bpw_to_bits(target.bpw, values) // 8
        if budget < least:
            raise MpqError(
                f"the target of {budget:,} bytes is below the smallest file of this model, {least:,} bytes (llama.cpp's"
                f" {low_mix}: {self.file_bytes(self.mix(low_mix)):,}): ask for more, or allow smaller types"
            )
        return budget

    def plans(self, budget: int) -> dict[str, dict[str, Scheme]]:
        """What is considered, by name: the solution first, then what it must not be worse than."""
        problem = self.problem
        bits = min(8 * (budget - self.bytes_beside), problem.max_bits)
        found = solve_frontier(problem).at(bits=bits)
        plans = {"mpq": dict(found.choice)}
        if self.options.refine_rounds:
            refined = Refine(self.options.refine_rounds)(problem, found, self._plan_loss)
            plans["mpq, searched on"] = dict(refined.allocation.choice)
        mixes = {name: self.mix(name) for name in MIXES}
        single = {
            kind_of(s).upper(): {w.path: s for w in self.traced.weights}
            for s in sorted(self.types, key=lambda s: s.size_bits(256, 1))
            if all(s.fits(w.k) for w in self.traced.weights)
        }
        for others in (mixes, single):
            size = {name: self.file_bytes(choice) for name, choice in others.items()}
            if fitting := {name: size[name] for name in others if size[name] <= budget}:
                name = max(fitting, key=fitting.__getitem__)
                plans[f"{name} of llama.cpp" if others is mixes else f"all {name}"] = others[name]
        return plans

    def predicted(self, choice: Choice) -> tuple[float, float] | None:
        """KL and its standard error by the table; None where a type is none of its."""
        if not {str(s) for s in choice.values()} <= {str(s) for s in self.types}:
            return None
        _, fixed, stderr = self.problem.evaluate(self.problem.by_group(choice))
        return self.problem.to_loss(fixed), stderr

    def scores(self, params: Mapping[str, jax.Array], which: str) -> DocumentScores:
        """Quality of parameters on the selection or test set."""
        return score(self.model, params, self.sets[which], reference=self._reference(which), batch_size=0)

    def qtensors(self, choice: Choice, way: str = WAYS[0]) -> dict[str, QTensor]:
        """Path -> quantized weight of a plan, made one of the `WAYS`."""
        return (self.propagation if way.endswith(PROPAGATE) else self.candidates).choose(choice)

    def rounded(self, choice: Choice, way: str = WAYS[0]) -> dict[str, jax.Array]:
        """All parameters of a plan."""
        return apply_plan(self.model.params, self.traced.weights, self.qtensors(choice, way))

    def write(self, path: str | os.PathLike[str], choice: Choice, way: str = WAYS[0]) -> int:
        """The file of a plan, whole or not at all. Returns its bytes."""
        return save(path, in_memory(self.model, self.traced.weights, self.qtensors(choice, way)), self.name)

    @functools.cached_property
    def _unquantized(self) -> Exported:
        """What sizes are counted by."""
        return in_memory(self.model, self.traced.weights, {})

    @functools.cached_property
    def _plan_loss(self) -> PlanLoss:
        data = self.divided[0]
        reference = Reference(self.model, data, min(self.options.batch_size, len(data.inputs)))
        return PlanLoss(self.model, self.traced, self.candidates, reference, self.store)

    @functools.cache  # noqa: B019  # a search lives as long as the process
    def _reference(self, which: str) -> Reference:
        return Reference(self.model, self.sets[which], min(self.options.batch_size, len(self.sets[which].inputs)))


def file_problem(table: SensitivityTable, bytes_beside: int, pins: Mapping[str, str] | None = None) -> Problem:
    """The knapsack of a file: every weight on its own, for llama.cpp fuses none, and sizes as they lie in the file."""
    weights = tuple(dataclasses.replace(w, group=w.path) for w in table.weights)
    alone = dataclasses.replace(table, weights=weights)
    problem = Problem.from_table(alone, pins=pins, overhead_bits=8 * bytes_beside)
    size = lambda w, s: 8 * aligned(w.n * row_bytes(s, w.k)) if s.fits(w.k) else 0
    sizes = np.array([[size(w, s) for s in table.schemes] for w in weights], np.int64)
    return dataclasses.replace(problem, size_bits=sizes)


def best_file(search: Search, target: Target, out: Path) -> dict[str, Any]:
    """Find the best plan, write its file, read that back and measure it; plain numbers of all that was considered.

    Raises:
      MpqError: the target is too small, or the disk is full or refuses.
    """
    budget = search.budget_bytes(target)
    plans = search.plans(budget)
    selection = {name: search.scores(search.rounded(choice), "selection").summary() for name, choice in plans.items()}
    winner = min(plans, key=lambda name: selection[name].kl or 0.0)
    propagated = search.scores(search.rounded(plans[winner], WAYS[1]), "selection").summary()
    ways = dict(zip(WAYS, (selection[winner].kl or 0.0, propagated.kl or 0.0), strict=True))
    way = min(ways, key=ways.__getitem__)
    size = search.write(out, plans[winner], way)
    measured = search.scores(load_gguf(str(out), FAMILIES).params, "test")
    rows = []
    for name, choice in plans.items():
        summary, predicted = selection[name], search.predicted(choice) or (None, None)
        rows.append(
            {
                "plan": name,
                "file_bytes": search.file_bytes(choice),
                "predicted_kl": predicted[0],
                "predicted_stderr": predicted[1],
                "selection_kl": summary.kl,
                "selection_stderr": summary.kl_stderr,
                "types": dict(Counter(kind_of(s) for s in choice.values())),
            }
        )
    values = sum(w.size for w in search.traced.weights)
    body = {"out": str(out), "budget_bytes": budget, "size_bytes": size, "plan": winner, "plans": rows}
    body |= {"method": way, "ways_kl": ways}
    body |= {"bits_per_weight": sum(w.size_bits(plans[winner][w.path]) for w in search.traced.weights) / values}
    body |= {"measured": measured.summary().to_json(), "choices": {p: kind_of(s) for p, s in plans[winner].items()}}
    if (rival := next((name for name in plans if name.endswith("llama.cpp")), None)) and rival != winner:
        theirs = search.scores(search.rounded(plans[rival], way), "test")
        difference, stderr = measured.difference(theirs)
        body["rival"] = {"plan": rival, "kl": theirs.summary().kl, "difference": difference, "stderr": stderr}
    return body


def _fitting(types: Sequence[Scheme], k: int) -> list[Scheme]:
    """Of the types, those whose blocks rows of `k` fill.

    Raises:
      MpqError: none does.
    """
    if not (found := [s for s in types if s.fits(k)]):
        raise MpqError(
            f"a weight has rows of {k}, which fill the blocks of none of {', '.join(map(str, types))}: add f16"
        )
    return found
