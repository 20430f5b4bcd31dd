"""Distillation: a quantized model is trained to the outputs of the original, in the numbers that its file holds.

    minimize over codes, scales, zero points   1/N sum KL(original || quantized)      [nats per output, N that count]

All weights at once, end to end, so errors that a layer-by-layer method leaves can make up for each other. The format,
and so the size, stays what it was. With `rounding` the codes move too, as in AutoRound (Cheng et al. 2023,
arXiv:2309.05516), which learns them block by block from the block's output and by signs of gradients; without, it is
the scale distillation of MLX's DWQ.

A little text is soon learned by heart. The labels are never read, so any input that the original can judge will do, and
text is varied (`mpq.distill.vary`). Judge the result on other text, and by its KL: a lower loss can be the calibration
text's own words.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import replacing
from mpq.array_file import read_arrays, write_arrays
from mpq.distill.latent import Latent, freeze, reconstruct, start
from mpq.distill.rows import freeze_rows, start_rows, train_rounded
from mpq.distill.vary import varied
from mpq.files import digest_arrays, digest_json
from mpq.inputs import Dataset, Tokens
from mpq.models.model import Model
from mpq.progress import Watch, track
from mpq.quantize import apply_plan
from mpq.quantize.block_scales import applies
from mpq.trace import Trace
from mpq.types import MpqError, Params, QTensor, WeightSpec

State = dict[str, Latent]
KIND = "distillation"


class Distilled(NamedTuple):
    """A distilled plan.

    Attributes:
      qtensors: path -> weight, of the schemes that came in.
      losses: `float32[steps]`, nats per output on the batch of each step, before the step.
      activations: the rows that came in, their static ranges learned.
    """

    qtensors: dict[str, QTensor]
    losses: np.ndarray
    activations: tuple[RoundedActivation, ...] = ()


@dataclasses.dataclass(frozen=True)
class Distill:
    """Adam on the KL to the original model, with warmup and cosine decay.

    Memory: beside both models' activations, five numbers for every quantized one (the latent value, its gradient, two
    moments, and the weight made of it).

    Attributes:
      steps: batches; each takes two forward passes and a backward one.
      batch_size: windows a batch; the windows of an epoch come in a random order.
      rounding: peak learning rate of codes, in steps of their grid; 0: codes stay.
      scale: of the logarithm of scales; 0: scales and zero points stay.
      zero_point: of zero points, in codes.
      ranges: of the logarithm of static ranges of activations; 0: they stay.
      warmup: share of the steps over which the rates rise.
      noise: share of the tokens of a text that are exchanged for others.
      splice: let a window of text go on as another window does.
      save_every: steps between two states written to disk, where a file is given.
    """

    steps: int = 600
    batch_size: int = 8
    rounding: float = 0.02
    scale: float = 0.003
    zero_point: float = 0.02
    ranges: float = 0.003
    warmup: float = 0.05
    noise: float = 0.3
    splice: bool = True
    save_every: int = 50

    def __post_init__(self) -> None:
        rates = (self.rounding, self.scale, self.zero_point, self.ranges)
        if min(self.steps, self.batch_size, self.save_every) < 1:
            raise MpqError("steps, batch_size and save_every of a distillation must be at least 1")
        if not all(0 <= rate < float("inf") for rate in rates):
            raise MpqError(f"learning rates {rates} must be at least 0 and finite")
        if not (0 <= self.warmup <= 1 and 0 <= self.noise <= 1):
            raise MpqError(f"warmup {self.warmup} and noise {self.noise} must be in 0 .. 1")
        if not self.rounding and not self.scale:
            raise MpqError("with rates 0 for rounding and scale nothing is learned: give one of them, such as 0.003")

    def __call__(
        self,
        model: Model,
        traced: Trace,
        qtensors: Mapping[str, QTensor],
        data: Dataset,
        *,
        key: jax.Array,
        state: Path | None = None,
        activations: Sequence[RoundedActivation] = (),
    ) -> Distilled:
        """Train.

        Args:
          model: the original.
          traced: its weights.
          qtensors: quantized weights by path, to start from; those without a scale stay as they are, and so do ggml's
            with a minimum or integers of groups.
          data: windows; labels are not read.
          key: of the order of the windows.
          state: file that an interrupted training continues from, to the same bytes; the caller removes it.
          activations: rows that are rounded in the model that is trained: quantization-aware training of both. Static
            ones have their ranges, and none is smoothed.

        Raises:
          MpqError: no weight has a scale, fewer windows than a batch, the loss is not finite, or `state` is damaged or
            of another training.
        """
        specs = {spec.path: spec for spec in traced.weights}
        scaled = {path: q for path, q in qtensors.items() if q.scale is not None and not applies(q.scheme)}
        if not scaled:
            raise MpqError("no weight of the plan has a scale that can be trained: there is nothing to distill")
        if len(data.inputs) < self.batch_size:
            raise MpqError(
                f"{len(data.inputs)} windows are fewer than a batch of {self.batch_size}: give more text or a smaller "
                "batch"
            )
        rest = {path: qtensor for path, qtensor in qtensors.items() if path not in scaled}
        params = apply_plan(model.params, traced.weights, rest)
        latents = {
            path: start(specs[path].read(model.params), q, rounding=self.rounding > 0, scale=self.scale > 0)
            for path, q in scaled.items()
        }
        rows = tuple(activations)
        if any(one.smooth is not None for one in rows):
            raise MpqError("smoothed activations cannot be trained: quantize without --smooth")
        if any(one.turn is not None for one in rows):
            raise MpqError("activations that are rotated online cannot be trained: quantize without --rotate-inputs")
        start_of = start_rows(rows) if self.ranges else {}
        loss = functools.partial(_loss, model, traced, rows, {path: specs[path] for path in scaled})
        begin, fixed = (latents, start_of), (model.params, params, scaled)
        (latents, learned), losses = self._train(loss, begin, fixed, data, model, key, state, rows)
        trained = {path: _freeze(latents[path], q) for path, q in scaled.items()}
        return Distilled({**rest, **trained}, losses, freeze_rows(rows, learned) if self.ranges else rows)

    def _train(
        self,
        loss: Callable[..., jax.Array],
        latents: Any,
        fixed: tuple[Params, Params, Mapping[str, QTensor]],
        data: Dataset,
        model: Model,
        key: jax.Array,
        state: Path | None,
        rows: tuple[RoundedActivation, ...],
    ) -> tuple[Any, np.ndarray]:
        optimizer = self._optimizer(latents)
        whole = (latents, optimizer.init(latents))
        told = {"of": self._digest(model, fixed[2], data, key, rows)}
        begin, losses = 0, []
        if state is not None and state.exists():
            whole, losses = _load(state, whole, told)
            begin = len(losses)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(whole: Any, fixed: Any, inputs: jax.Array, counted: jax.Array) -> tuple[Any, jax.Array]:
            latents, moments = whole
            value, gradient = jax.value_and_grad(loss)(latents, *fixed, inputs, counted)
            with jax.numpy_dtype_promotion("standard"):  # Optax mixes its counts with floats
                updates, moments = optimizer.update(gradient, moments, latents)
            return (optax.apply_updates(latents, updates), moments), value

        counted = np.asarray(model.task.counted(data.mask))
        watch = Watch("distill", int(counted[: self.batch_size].sum()))
        for number in track(range(begin, self.steps), "distill", self.steps - begin):
            drawn_rows = self._rows(key, number, len(data.inputs))
            inputs = data.inputs[drawn_rows]
            if isinstance(model.inputs, Tokens):
                drawn = np.asarray(jax.random.key_data(jax.random.fold_in(key, number)))
                inputs = varied(data, drawn_rows, np.random.default_rng(drawn), noise=self.noise, splice=self.splice)
            whole, value = step(whole, fixed, inputs, counted[drawn_rows])
            losses.append(value)
            watch.tell(value)
            done = number + 1
            if done % self.save_every == 0 or done == self.steps:
                losses = [float(x) for x in jax.device_get(losses)]
                if not np.isfinite(losses).all():
                    first = int(np.argmin(np.isfinite(losses)))
                    kept = "" if state is None or not state.exists() else f"; {state} holds the steps before it"
                    raise MpqError(
                        f"the distillation's loss is {losses[first]} at step {first + 1}: give smaller learning rates"
                        f"{kept}"
                    )
                if state is not None:
                    _save(state, whole, losses, told)
        return whole[0], np.asarray(losses, np.float32)

    def _rows(self, key: jax.Array, number: int, windows: int) -> np.ndarray:
        """Windows of one batch; every epoch has an order of its own, and leaves out what fills no batch."""
        epoch, place = divmod(number, windows // self.batch_size)
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), windows))
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def _optimizer(self, latents: Any) -> optax.GradientTransformation:
        """Adam, with a rate of its own for each kind of number."""
        rates = {"value": self.rounding, "log_scale": self.scale, "zero_point": self.zero_point, "row": self.ranges}
        warmup = min(round(self.warmup * self.steps), self.steps - 1)
        adam = lambda peak: optax.adam(
            optax.warmup_cosine_decay_schedule(0.0, peak, warmup, self.steps), b2=0.99, eps=1e-12
        )
        kinds = jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "name", "row"), latents)
        return optax.multi_transform({kind: adam(peak) for kind, peak in rates.items()}, kinds)

    def _digest(
        self,
        model: Model,
        qtensors: Mapping[str, QTensor],
        data: Dataset,
        key: jax.Array,
        rows: Sequence[RoundedActivation],
    ) -> str:
        arrays = {
            f"{path} {i}": np.asarray(leaf)
            for path, qtensor in qtensors.items()
            for i, leaf in enumerate(jax.tree.leaves(qtensor))
        }
        schemes = {path: str(qtensor.scheme) for path, qtensor in qtensors.items()}
        seed = np.asarray(jax.random.key_data(key)).tolist()
        beside = [[one.to_json(), one.low, one.high] for one in rows]
        return digest_json([repr(self), model.digest, data.digest, seed, schemes, digest_arrays(arrays), beside])


def _loss(
    model: Model,
    traced: Trace,
    rows: tuple[RoundedActivation, ...],
    specs: Mapping[str, WeightSpec],
    learned: tuple[State, Mapping[str, jax.Array]],
    original: Params,
    params: Params,
    qtensors: Mapping[str, QTensor],
    inputs: jax.Array,
    counted: jax.Array,
) -> jax.Array:
    """Mean KL(original || quantized) of the outputs that count, nats."""
    (latents, factors), quantized = learned, dict(params)
    for path, spec in specs.items():
        quantized = spec.write(quantized, reconstruct(latents[path], qtensors[path]))
    specs_of = [one.spec for one in rows]
    fixed = start_rows(rows) if rows else {}

    def change(number: int, x: jax.Array) -> jax.Array:
        one = rows[number]
        return train_rounded(one, x, len(inputs), factors.get(one.spec.path, fixed.get(one.spec.path)))

    student = model.apply
    if rows:
        student = lambda params, x: traced.on(x.shape).evaluate(params, x, replacing(specs_of, change))
    p, q = model.task.distribution(model.apply(original, inputs)), model.task.distribution(student(quantized, inputs))
    return jnp.sum(model.task.divergence(p, q), where=counted) / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)


def _save(path: Path, whole: Any, losses: list[float], told: Mapping[str, str]) -> None:
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(whole))}
    write_arrays(path, KIND, {**told, "losses": losses}, arrays)


def _load(path: Path, like: Any, told: Mapping[str, str]) -> tuple[Any, list[float]]:
    """The state in `path`, in the form of `like`, and the losses of the steps that it has behind it."""
    header, arrays = read_arrays(path, KIND, "mpq quantize")
    if header["of"] != told["of"]:
        raise MpqError(
            f"{path} belongs to a distillation of another model, plan, text or options: remove it to start anew"
        )
    leaves, form = jax.tree.flatten(like)
    return form.unflatten([jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]), header["losses"]


_freeze = jax.jit(freeze)
