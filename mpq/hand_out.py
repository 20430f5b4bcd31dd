"""What leaves a run: at every budget the best plan, its weights made the best way, and the folder of one of them.

Plans are compared as the main rounding algorithm alone makes them; what follows costs more and is done for winners:

    +propagate    rounded in order, each weight making up for those before it (`mpq.quantize.propagate`)
    +correct      of the better of these, biases and norms corrected for what rounding does (`mpq.quantize.correction`)
    +distill      from the best of these, trained to the original's outputs (`mpq.distill`)

Nothing is taken on trust: each is measured on the selection set, and the plain rounding stays if it is better.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from mpq.artifacts import Plan
from mpq.distill import Distill, checkpoint
from mpq.equalize import find_shifts
from mpq.equalize.shifts import Shift
from mpq.evaluate import DocumentScores
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.models import Model
from mpq.pipeline import Run
from mpq.quantize.correction import SUFFIX as CORRECT
from mpq.quantize.correction import correct_biases
from mpq.quantize.propagate import SUFFIX as PROPAGATE
from mpq.quantize.propagate import Propagation
from mpq.types import Params, QTensor

DISTILL = "+distill"
"""Of the name of what was trained."""
MADE_BETTER = {PROPAGATE: "propagated", CORRECT: "corrected", DISTILL: "distilled"}
"""Suffix of a way -> what its plans are called, in the order in which suffixes are added."""


class HandOut:
    """The choices at the end of a run; what is computed is kept.

    Attributes:
      run: the run.
    """

    def __init__(self, run: Run):
        self.run = run

    @functools.cached_property
    def winners(self) -> dict[str, tuple[Plan, dict[str, float]]]:
        """Do no harm: the best of the solution, what it was searched from, every uniform plan that fits, the heuristic.

        Judged by the KL on the selection set; of equals the first in this order. By budget, the plan and the KL on the
        selection set of every plan that was considered.
        """
        return {budget: self._winner(budget) for budget in self.run.config.budgets}

    @functools.cached_property
    def ways(self) -> dict[str, dict[str, float]]:
        """By budget, KL on the selection set of the winner by how its weights are made, plain rounding first."""
        return {budget: self._ways(budget) for budget in self.winners}

    def _ways(self, budget: str) -> dict[str, float]:
        plan, config = self.winners[budget][0], self.run.config
        kl = self._untrained(plan)
        if config.distill_steps and budget == config.hand_out:
            way = _least(kl) + DISTILL
            kl[way] = self._kl(plan, way)
        return kl

    def _untrained(self, plan: Plan) -> dict[str, float]:
        config = self.run.config
        ways = (config.method, *([config.method + PROPAGATE] if config.propagate else []))
        kl = {way: self._kl(plan, way) for way in ways}
        if config.correct and self._shifts:
            way = _least(kl) + CORRECT
            kl[way] = self._kl(plan, way)
        return kl

    def way(self, budget: str) -> str:
        """The best of them."""
        return _least(self.ways[budget])

    @property
    def plan(self) -> Plan:
        """The winner of the budget that is handed out."""
        return self.winners[self.run.config.hand_out][0]

    @property
    def method(self) -> str:
        """How its weights are made."""
        return self.way(self.run.config.hand_out)

    def scores(self, plan: Plan, way: str, which: str) -> DocumentScores:
        """Quality on the selection or test set: of any plan by a rounding algorithm, of a winner by one of its ways."""
        run = self.run
        made = lambda: run.params(self.qtensors(plan, way), self.beside(plan, way))
        measured = lambda which: run.measured(f"{way}-{plan.name}", made, which)
        if way in run.methods:
            return measured(which)
        return {one: measured(one) for one in ("selection", "test")}[which]  # both while the weights are at hand

    def qtensors(self, plan: Plan, way: str) -> dict[str, QTensor]:
        """Path -> quantized weight, likewise."""
        if way.endswith(DISTILL):
            return self._distilled[0]
        way = way.removesuffix(CORRECT)
        return self.run.qtensors(plan, way) if way in self.run.methods else self._propagation.choose(plan.choices)

    def beside(self, plan: Plan, way: str) -> Params:
        """Path -> other parameters that are not the original's, likewise."""
        if way.endswith(DISTILL):
            return self._distilled[1]
        return self._corrected(plan, way) if way.endswith(CORRECT) else {}

    def stored(self) -> Plan:
        """The plan that is handed out, with the activations."""
        return self.plan.with_activations({one.spec.path: one.to_json() for one in self.run.activations})

    def export(self) -> Path:
        """Write what is handed out as an Orbax folder of packed weights."""
        path, run = self.run.folder / "quantized", self.run
        if not path.exists():
            model = self._model(self.beside(self.plan, self.method))
            made = self.qtensors(self.plan, self.method), self.stored(), run.activations
            orbax.save(path, **export_arguments(model, run.traced.weights, *made))
        return path

    def _model(self, beside: Params) -> Model:
        """The original with other values of what is beside its weights."""
        return dataclasses.replace(self.run.model, params={**self.run.model.params, **beside})

    def _winner(self, budget: str) -> tuple[Plan, dict[str, float]]:
        run, method = self.run, self.run.config.method
        mixed, separable = run.mixed[method][budget], run.separable[method][budget]
        fitting = [mixed, *(p for p in run.uniform.values() if p.size_bits <= run.bits(budget))]
        if separable.choices != mixed.choices:
            fitting.append(dataclasses.replace(separable, name=f"separable@{budget}"))
        if budget in run.heuristics:
            fitting.append(run.heuristics[budget])
        kl = {p.name: self._kl(p, method) for p in fitting}
        return min(fitting, key=lambda p: kl[p.name]), kl

    def _kl(self, plan: Plan, way: str) -> float:
        kl = self.scores(plan, way, "selection").summary().kl
        assert kl is not None  # every score of a run has the reference
        return kl

    @functools.cached_property
    def _propagation(self) -> Propagation:
        run, data = self.run, self.run.divided[1]
        size = min(run.config.batch_size, len(data.inputs))
        weightings = run.guide.kept(run.model, run.traced, data, size) if run.config.guided else None
        candidates = run.candidates[run.config.method]
        return Propagation(run.traced, candidates, data, batch_size=size, weightings=weightings)

    @functools.cached_property
    def _shifts(self) -> tuple[Shift, ...]:
        """Where biases and norms take up what layers give too much."""
        return find_shifts(self.run.model, self.run.traced, self.run.sets["calibration"])

    @functools.cached_property
    def _corrects(self) -> tuple[str, ...]:
        """The parameters that corrections change."""
        return tuple(sorted({path for shift in self._shifts for path in shift.parameters}))

    def _corrected(self, plan: Plan, way: str) -> Params:
        """Vectors of biases and norms that make up for the rounding of a winner, whose way is read more than once."""
        if (plan.name, way) not in self._vectors:
            run, data = self.run, self.run.sets["calibration"]
            size = min(run.config.batch_size, len(data.inputs))
            params = correct_biases(
                run.model,
                run.traced,
                run.params(self.qtensors(plan, way)),
                self._shifts,
                data,
                activations=run.activations,
                norms=True,
                batch_size=size,
            )
            self._vectors[plan.name, way] = {path: params[path] for path in self._corrects}
        return self._vectors[plan.name, way]

    @functools.cached_property
    def _vectors(self) -> dict[tuple[str, str], Params]:
        return {}

    @functools.cached_property
    def _distilled(self) -> tuple[dict[str, QTensor], Params]:
        """The plan that is handed out, trained on the calibration set from the best way without training."""
        run, plan, state = self.run, self.plan, self.run.folder / "distill.state"
        data = run.sets["calibration"]
        size = min(Distill.batch_size, len(data.inputs))
        options = Distill(steps=run.config.distill_steps, batch_size=size, ranges=0)  # all plans have these ranges
        way = _least(self._untrained(plan))

        def make() -> tuple[dict[str, QTensor], Params]:
            start, key = self.qtensors(plan, way), jax.random.key(run.config.seed)
            given = {"activations": run.activations, "beside": self.beside(plan, way)}
            found = options(run.model, run.traced, start, data, key=key, state=state, **given)
            return found.qtensors, found.beside

        def save(path: Path, made: tuple[dict[str, QTensor], Params]) -> None:
            orbax.save(path, **export_arguments(self._model(made[1]), run.traced.weights, made[0], plan))

        def read(path: Path) -> tuple[dict[str, QTensor], Params]:
            exported = orbax.load(path)
            dtypes = {name: run.model.params[name].dtype for name in (self._corrects if way.endswith(CORRECT) else ())}
            return exported.qtensors, {p: jnp.asarray(exported.params[p]).astype(of) for p, of in dtypes.items()}

        found = run.stage("distilled", read, make, save)
        checkpoint.remove(state)
        return found


def _least(kl: dict[str, float]) -> str:
    """The name of the smallest; of equals the first."""
    return min(kl, key=kl.__getitem__)
