"""What `mpq quantize` and `mpq qat` do: a plan's weights, rounded and perhaps trained, as a folder."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from mpq import artifacts
from mpq.activations import KEYS_AND_VALUES
from mpq.activations.apply import RoundedActivation
from mpq.activations.plans import calibrated
from mpq.activations.smooth import smooth_model
from mpq.activations.turn import turn_model
from mpq.calibrate import calibrate
from mpq.commands import Data, collect, make_candidates, read_plan, read_ranges
from mpq.commands_rotate import plan_after, told_of, warnings_of
from mpq.config import known
from mpq.distill import Distill, Distilled, checkpoint, distill_harmless
from mpq.equalize import awq, equalize, find_folds, find_shifts, rotate
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.guide import Guide
from mpq.inputs import Dataset
from mpq.models import Model, load
from mpq.quantize import QUANTIZERS, Candidates, apply_plan
from mpq.quantize.correction import correct_biases
from mpq.quantize.propagate import Propagation
from mpq.trace import Trace
from mpq.types import MpqError, QTensor


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
      method: name in `QUANTIZERS`.
      smooth: first, move outliers of activations into weights.
      awq: first, move scales of weights into the layers before.
      equalize: first, give channels and the weights that read them ranges alike, through convolutions too.
      propagate: round in order, each weight making up for those before.
      correct_bias: at last, take what layers give too much on average out of what is added to it.
      correct_norms: and what they spread too much, out of the scales of norms.
      rotate: before all that, mix features by orthogonal matrices.
      seed: of the rotations.
      turn: rotate inputs where they are rounded.
      guide: weights of tokens by the end loss, in all that is averaged over them.
    """

    method: str = "gptq"
    smooth: bool = False
    awq: bool = False
    equalize: bool = False
    propagate: bool = False
    correct_bias: bool = False
    correct_norms: bool = False
    rotate: bool = False
    seed: int = 0
    turn: bool = False
    guide: Guide | None = None

    @property
    def corrects(self) -> bool:
        """Whether anything is corrected."""
        return self.correct_bias or self.correct_norms

    def check(self, plan: artifacts.Plan, *, data: bool, stats: bool, ranges: bool, distill: bool) -> None:
        """Refuse what does not go together.

        Args:
          plan: what is rounded to.
          data: whether there is calibration data.
          stats: whether statistics come from a file.
          ranges: whether ranges come from a file.
          distill: whether the result is trained.

        Raises:
          MpqError: says what to leave out or to give.
        """
        if self.smooth and (not data or ranges or distill):
            raise MpqError("--smooth needs --data TEXT, from which ranges come too: leave out --ranges and --distill")
        if self.awq and (not data or plan.activations):
            raise MpqError("--awq needs --data TEXT and a plan of weights alone; for activations give --smooth")
        if self.rotate and (not data or stats or ranges):
            raise MpqError(
                "--rotate needs --data TEXT, from which statistics and ranges of the rotated model come: leave out "
                "--stats and --ranges"
            )
        if self.turn and (not data or not plan.activations or ranges or distill):
            raise MpqError(
                "--rotate-inputs needs --data TEXT, from which ranges come too, and a plan that rounds activations: "
                "leave out --ranges and --distill"
            )
        if self.equalize and (not data or ranges or stats or self.smooth or self.awq):
            raise MpqError(
                "--equalize needs --data TEXT, from which ranges and statistics come too, and moves the scales that "
                "--smooth and --awq move: leave out those, --ranges and --stats"
            )
        if self.propagate and (not data or self.smooth or self.turn):
            raise MpqError(
                "--propagate needs --data TEXT, and the inputs that --smooth and --rotate-inputs change: leave those "
                "out"
            )
        if self.guide is not None and (not data or stats):
            raise MpqError(
                "--guided needs --data TEXT; the grams of a file are what `mpq calibrate --guided` makes them: leave "
                "out --stats"
            )
        if self.corrects and not data:
            raise MpqError("--correct-bias and --correct-norms need --data TEXT, on which errors are averaged")


@dataclasses.dataclass(frozen=True, eq=False)
class _Rounded:
    """A model whose parameters may have moved, and its weights."""

    model: Model
    plan: artifacts.Plan
    activations: tuple[RoundedActivation, ...]
    qtensors: dict[str, QTensor]
    told: dict[str, Any]


def quantize(
    model_source: str,
    plan_source: str,
    out: Path,
    text: Data | None,
    stats: Path | None,
    how: Rounding,
    distill: int,
    ranges: Path | None = None,
    keys_values: str = KEYS_AND_VALUES,
    training: Distill | None = None,
) -> dict[str, Any]:
    """The quantized model as an Orbax folder, after so many steps of distillation."""
    known("method", how.method, QUANTIZERS)
    if distill < 0:
        raise MpqError(f"distill is {distill}: it must be a number of steps, at least 0")
    if distill and text is None:
        raise MpqError("distillation needs text: give --data TEXT")
    model = load(model_source)
    traced = text.trace(model) if text else model.trace()
    plan = read_plan(plan_source, model, traced, keys_values)
    given = {"data": text is not None, "stats": stats is not None, "ranges": ranges is not None}
    how.check(plan, **given, distill=distill > 0)
    if out.exists():
        raise MpqError(f"{out} exists already: choose another folder or remove it")
    data, batch_size = (text.dataset(model, "calibration"), text.batch_size) if text else (None, 1)
    found, turned = None if ranges is None else read_ranges(ranges, model), None
    if how.rotate and data is not None:
        turned = rotate(model, traced, data, jax.random.key(how.seed))
        model, traced, plan = turned.model, turned.traced, plan_after(turned, plan)
    loaded = model
    if how.equalize and data is not None:
        model = _equalized(model, traced, plan, data, batch_size)
    chosen, warnings = calibrated(plan.activations, model, traced, data, found, batch_size)
    rounded = _round(how, model, traced, plan, chosen, data, stats, batch_size)
    model, plan, chosen, qtensors = rounded.model, rounded.plan, rounded.activations, rounded.qtensors
    told = {**rounded.told, **({"equalized": True} if how.equalize else {})}
    if turned is not None:
        told, warnings = {**told_of(turned), **told}, [*warnings, *warnings_of(turned)]
    original = model
    if how.corrects and data is not None:
        exact = loaded if how.smooth or how.turn else model  # then weights are those of other inputs
        model, told["corrected"] = _corrected(how, exact, model, traced, qtensors, chosen, data, batch_size)
    state = out.with_name(f"{out.name}.distill")  # an interrupted distillation goes on from here
    if distill and text is not None and data is not None:
        options = dataclasses.replace(training or Distill(), steps=distill)
        options = dataclasses.replace(options, batch_size=min(text.batch_size, len(data.inputs)))
        beside = {path: p for path, p in model.params.items() if p is not original.params[path]}
        given = {"key": jax.random.key(0), "state": state, "activations": chosen, "beside": beside}
        trained, judged = _trained(options, training is None, original, traced, qtensors, data, given)
        qtensors, losses, chosen, beside = trained
        model = dataclasses.replace(original, params={**original.params, **beside})
        told |= {"distill": distill, "first_loss": float(losses[0]), "last_loss": float(losses[-1]), **judged}
        if not judged.get("distilled", True):
            warnings = [*warnings, "training made the model worse on data that it did not see: the rounding stays"]
    written = orbax.save(out, **export_arguments(model, traced.weights, qtensors, plan, chosen))
    if distill:
        checkpoint.remove(state)
    return {
        "out": str(out),
        "plan": plan.name,
        "method": how.method,
        **told,
        "size_bytes": plan.size_bytes,
        "payload_bytes": written,
        "bits_per_weight": plan.bits_per_weight,
        **({"warnings": warnings} if warnings else {}),
    }


def _round(
    how: Rounding,
    model: Model,
    traced: Trace,
    plan: artifacts.Plan,
    chosen: tuple[RoundedActivation, ...],
    data: Dataset | None,
    stats: Path | None,
    batch_size: int,
) -> _Rounded:
    """What `how` asks for, in the order: scales, then weights."""
    told: dict[str, Any] = {} if how.guide is None else {"guided": True}
    if data is None or not (how.smooth or how.turn or how.awq or how.propagate):
        once = None if how.guide is None or data is None else how.guide(model, traced, data, batch_size)
        candidates = make_candidates(model, traced, how.method, data, stats, batch_size, once)
        return _Rounded(model, plan, chosen, candidates.choose(plan.choices), told)
    weigh = lambda model: None if how.guide is None else how.guide.kept(model, traced, data, batch_size)
    weightings = weigh(model)
    collected = collect(model, traced, data, stats, batch_size, weightings)
    if how.smooth:
        model, chosen, collected = smooth_model(model, traced, chosen, plan.choices, collected, data, batch_size)
        plan = plan.with_activations({one.spec.path: one.to_json() for one in chosen})
        told["smoothed"] = sum(one.smooth is not None for one in chosen)
    if how.turn:
        everything = (plan.choices, collected, data, batch_size, how.seed)
        model, chosen, collected = turn_model(model, traced, chosen, *everything)
        plan = plan.with_activations({one.spec.path: one.to_json() for one in chosen})
        told["rotated_inputs"] = sum(one.turn is not None for one in chosen)
    if how.awq:
        model, collected, strengths = awq(model, traced, find_folds(model, traced, data), plan.choices, collected)
        told["equalized"] = sum(alpha > 0 for alpha in strengths.values())
    candidates = Candidates(model.params, traced.weights, QUANTIZERS[how.method], collected)
    if how.propagate:
        if how.awq:  # scales that moved make other outputs
            weightings = weigh(model)
        in_order = Propagation(traced, candidates, data, batch_size=batch_size, weightings=weightings)
        return _Rounded(model, plan, chosen, in_order.choose(plan.choices), {**told, "propagated": True})
    return _Rounded(model, plan, chosen, candidates.choose(plan.choices), told)


def _trained(
    options: Distill,
    harmless: bool,
    model: Model,
    traced: Trace,
    qtensors: dict[str, QTensor],
    data: Dataset,
    given: dict[str, Any],
) -> tuple[Distilled, dict[str, Any]]:
    """What training leaves, or, if it shall do no harm, the better of that and what came in, and how that was told."""
    if not harmless:
        return options(model, traced, qtensors, data, **given), {}
    found = distill_harmless(options, model, traced, qtensors, data, **given)
    return found.distilled, {
        "held_out_kl": found.before,
        "held_out_kl_distilled": found.after,
        "distilled": found.helped,
    }


def _equalized(model: Model, traced: Trace, plan: artifacts.Plan, data: Dataset, batch_size: int) -> Model:
    """The same function with ranges alike."""
    folds, shifts = find_folds(model, traced, data, convs=True), find_shifts(model, traced, data)
    return equalize(model, traced, folds, shifts, plan.choices, calibrate(traced, model.params, data, batch_size))


def _corrected(
    how: Rounding,
    original: Model,
    model: Model,
    traced: Trace,
    qtensors: dict[str, QTensor],
    chosen: tuple[RoundedActivation, ...],
    data: Dataset,
    batch_size: int,
) -> tuple[Model, int]:
    """The model with its biases and norms corrected, and of how many layers."""
    shifts = find_shifts(original, traced, data)
    if not shifts:
        raise MpqError(
            f"{model.name} has no bias and no norm that what a layer gives is added to alone: leave out --correct-bias "
            "and --correct-norms"
        )
    rounded = apply_plan(model.params, traced.weights, qtensors)
    options: dict[str, Any] = {"activations": chosen, "norms": how.correct_norms, "batch_size": batch_size}
    params = correct_biases(original, traced, rounded, shifts, data, **options)
    vectors = {path for shift in shifts for path in shift.parameters}
    return dataclasses.replace(model, params={**model.params, **{p: params[p] for p in vectors}}), len(shifts)
