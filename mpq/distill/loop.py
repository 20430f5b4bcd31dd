"""Distillation: a quantized model is trained to the outputs of the original, in the numbers that its file holds.

    minimize over codes, scales, zero points   1/N sum KL(original || quantized)      [nats per output, N that count]

All weights at once, end to end, so errors that a layer-by-layer method leaves can make up for each other. The format,
and so the size, stays what it was. With `rounding` the codes move too, as in AutoRound (Cheng et al. 2023,
arXiv:2309.05516), which learns them block by block from the block's output and by signs of gradients; without, it is
the scale distillation of MLX's DWQ. With `rank` only low-rank updates of the weights are trained and merged into codes
in the end, and with `beside` biases and norms too.

A little text is soon learned by heart. The labels are never read, so any input that the original can judge will do:
language models write it themselves (`mpq.generate`), beginning as the windows that are given do, and other text and
images are varied (`mpq.distill.vary`). Judge the result on other text, and by its KL: a lower loss can be the
calibration text's own words.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from mpq.activations.apply import RoundedActivation
from mpq.distill import checkpoint
from mpq.distill.beside import positive, reconstruct_beside, start_beside
from mpq.distill.latent import Latent, freeze, start
from mpq.distill.learned import Fixed, Learned, Student, optimizer
from mpq.distill.rows import freeze_rows, start_rows
from mpq.distill.shard import ONE, Devices
from mpq.distill.vary import moved, varied
from mpq.files import digest_arrays, digest_json
from mpq.generate import can_write, write
from mpq.inputs import Dataset, Images, Tokens
from mpq.models.model import Model
from mpq.progress import Watch, track
from mpq.quantize import apply_plan
from mpq.quantize.block_scales import applies
from mpq.trace import Trace
from mpq.types import MpqError, Params, QTensor


class Distilled(NamedTuple):
    """A distilled plan.

    Attributes:
      qtensors: path -> weight, of the schemes that came in.
      losses: `float32[steps]`, nats per output on the batch of each step, before the step.
      activations: the rows that came in, their static ranges learned.
      beside: path -> other parameters that were trained, of the values that their stored dtype has.
    """

    qtensors: dict[str, QTensor]
    losses: np.ndarray
    activations: tuple[RoundedActivation, ...] = ()
    beside: Mapping[str, jax.Array] = {}


@dataclasses.dataclass(frozen=True)
class Distill:
    """Adam on the KL to the original model, with warmup and cosine decay.

    Memory: beside both models' activations, five numbers for every quantized one (the latent value, its gradient, two
    moments, and the weight made of it); with `rank` two, and with FSDP each device's part.

    Attributes:
      steps: batches; each takes two forward passes and a backward one.
      batch_size: windows a batch; the windows of an epoch come in a random order.
      rounding: peak learning rate of codes, in steps of their grid; 0: codes stay.
      scale: of the logarithm of scales; 0: scales and zero points stay.
      zero_point: of zero points, in codes.
      ranges: of the logarithm of static ranges of activations; 0: they stay.
      beside: of biases and norms, relative to their size; 0: they stay.
      rank: of a low-rank update that is learned in the place of the codes' latent values; 0: these themselves.
      warmup: share of the steps over which the rates rise.
      written: windows that a language model writes itself to be trained on, no more than the steps take; 0, and where
        it has no cache to write with: the windows given, varied.
      noise: share of the tokens of a text that are exchanged for others.
      splice: let a window of text go on as another window does.
      mirror: mirror half of the images.
      shift: share of their height and width by which images are moved at most.
      save_every: steps between two states written to disk, where a folder is given.
      devices: what trains, `mpq.distill.shard`.
    """

    steps: int = 600
    batch_size: int = 8
    rounding: float = 0.006
    scale: float = 0.001
    zero_point: float = 0.006
    ranges: float = 0.003
    beside: float = 0.0
    rank: int = 0
    warmup: float = 0.05
    written: int = 640
    noise: float = 0.3
    splice: bool = True
    mirror: bool = True
    shift: float = 0.125
    save_every: int = 50
    devices: Devices = ONE

    def __post_init__(self) -> None:
        rates = (self.rounding, self.scale, self.zero_point, self.ranges, self.beside)
        if min(self.steps, self.batch_size, self.save_every) < 1:
            raise MpqError("steps, batch_size and save_every of a distillation must be at least 1")
        if not all(0 <= rate < float("inf") for rate in rates):
            raise MpqError(f"learning rates {rates} must be at least 0 and finite")
        if not (0 <= self.warmup <= 1 and 0 <= self.noise <= 1 and 0 <= self.shift <= 1):
            raise MpqError(f"warmup {self.warmup}, noise {self.noise} and shift {self.shift} must be in 0 .. 1")
        if not self.rounding and not self.scale:
            raise MpqError("with rates 0 for rounding and scale nothing is learned: give one of them, such as 0.003")
        if self.written < 0:
            raise MpqError(f"written is {self.written}: give a number of windows, or 0 to vary those that are given")
        if self.rank < 0:
            raise MpqError(f"the rank of a low-rank update is {self.rank}: give at least 1, or 0 for none")

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
        beside: Params | None = None,
    ) -> Distilled:
        """Train.

        Args:
          model: the original.
          traced: its weights.
          qtensors: quantized weights by path, to start from; those without a scale stay as they are, and so do ggml's
            with a minimum or integers of groups.
          data: windows; labels are not read.
          key: of the order of the windows.
          state: Orbax checkpoint that an interrupted training continues from, to the same bytes on as many devices; the
            caller removes it (`checkpoint.remove`).
          activations: rows that are rounded in the model that is trained: quantization-aware training of both. Static
            ones have their ranges, and none is smoothed.
          beside: parameters other than the weights where they start from others than the original's, such as norms
            that were estimated again.

        Raises:
          MpqError: no weight has a scale, fewer windows than a batch, devices that are not there or that the batch
            cannot be divided among, the loss is not finite, or `state` is damaged or of another training.
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
        self.devices.check(self.batch_size)
        rows = tuple(activations)
        if any(one.smooth is not None for one in rows):
            raise MpqError("smoothed activations cannot be trained: quantize without --smooth")
        if any(one.turn is not None for one in rows):
            raise MpqError("activations that are rotated online cannot be trained: quantize without --rotate-inputs")
        rest = {path: qtensor for path, qtensor in qtensors.items() if path not in scaled}
        params = apply_plan({**model.params, **(beside or {})}, traced.weights, rest)
        latents = {path: self._start(specs[path].read(model.params), q, key, path) for path, q in scaled.items()}
        learned = Learned(
            latents,
            start_rows(rows) if self.ranges else {},
            start_beside(params, traced.weights) if self.beside else {},
        )
        student = Student(model, traced, {path: specs[path] for path in scaled}, rows, positive(params, learned.beside))
        fixed = Fixed(model.params, params, scaled)
        learned, losses = self._train(student, learned, fixed, data, key, state)
        trained = {}
        for path, q in scaled.items():
            trained[path] = _freeze(learned.weights[path].merged(specs[path].read(model.params), q), q)
        return Distilled(
            {**rest, **trained},
            losses,
            freeze_rows(rows, learned.ranges) if self.ranges else rows,
            {**(beside or {}), **reconstruct_beside(learned.beside, params, model.stored, student.kept)},
        )

    def _start(self, w: jax.Array, qtensor: QTensor, key: jax.Array, path: str) -> Latent:
        own = jax.random.fold_in(key, int(digest_json([path])[:8], 16) & 0x7FFFFFFF) if self.rank else None
        return start(w, qtensor, rounding=self.rounding > 0, scale=self.scale > 0, rank=self.rank, key=own)

    def _train(
        self, student: Student, learned: Learned, fixed: Fixed, data: Dataset, key: jax.Array, state: Path | None
    ) -> tuple[Learned, np.ndarray]:
        adam = self._optimizer(learned)
        numbers: Any = learned  # Optax's type of parameters knows no dataclasses
        whole = self.devices.place((learned, adam.init(numbers)))
        told = {"of": self._digest(student, fixed, data, key)}
        begin, losses = 0, []
        if state is not None and checkpoint.exists(state):
            whole, losses = checkpoint.load(state, whole, told)
            begin = len(losses)
        writes = self.written > 0 and can_write(student.model)
        if writes and begin < self.steps:
            count = max(self.batch_size, min(self.written, self.steps * self.batch_size))
            data = write(student.model, data, count, key=jax.random.fold_in(key, _WRITTEN))
        held = None if self.devices.count == 1 else jax.tree.map(lambda leaf: leaf.sharding, whole)

        def step(whole: Any, fixed: Fixed, inputs: jax.Array, counted: jax.Array) -> tuple[Any, jax.Array]:
            learned, moments = whole
            value, gradient = jax.value_and_grad(student.loss)(learned, fixed, inputs, counted)
            with jax.numpy_dtype_promotion("standard"):  # Optax mixes its counts with floats
                updates, moments = adam.update(gradient, moments, learned)
            return (optax.apply_updates(learned, updates), moments), value

        run = jax.jit(step, donate_argnums=0, out_shardings=(held, None))
        fixed = self.devices.place(fixed)
        counted = np.asarray(student.model.task.counted(data.mask))
        watch = Watch("distill", int(counted[: self.batch_size].sum()))
        for number in track(range(begin, self.steps), "distill", self.steps - begin):
            rows = self._rows(key, number, len(data.inputs))
            own = jax.random.fold_in(key, number)
            inputs = data.inputs[rows] if writes else self._varied(student.model, data, rows, own)
            whole, value = run(whole, fixed, *map(self.devices.batch, (inputs, counted[rows])))
            losses.append(value)
            watch.tell(value)
            done = number + 1
            if done % self.save_every == 0 or done == self.steps:
                losses = _finite(losses, state)
                if state is not None:
                    checkpoint.save(state, whole, losses, told)
        return whole[0], np.asarray(losses, np.float32)

    def _rows(self, key: jax.Array, number: int, windows: int) -> np.ndarray:
        """Windows of one batch; every epoch has an order of its own, and leaves out what fills no batch."""
        epoch, place = divmod(number, windows // self.batch_size)
        order = np.asarray(_permutation(jax.random.fold_in(key, epoch), windows))
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def _varied(self, model: Model, data: Dataset, rows: np.ndarray, key: jax.Array) -> np.ndarray:
        """Inputs of one batch."""
        if not isinstance(model.inputs, Tokens | Images):
            return data.inputs[rows]
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        if isinstance(model.inputs, Images):
            return moved(data.inputs[rows], rng, mirror=self.mirror, shift=self.shift)
        return varied(data, rows, rng, noise=self.noise, splice=self.splice)

    def _optimizer(self, learned: Learned) -> optax.GradientTransformation:
        values = dict.fromkeys(("value", "left", "right"), self.rounding)
        rates = values | {"log_scale": self.scale, "zero_point": self.zero_point}
        warmup = min(round(self.warmup * self.steps), self.steps - 1)
        return optimizer(learned, rates | {"ranges": self.ranges, "beside": self.beside}, warmup, self.steps)

    def _digest(self, student: Student, fixed: Fixed, data: Dataset, key: jax.Array) -> str:
        arrays = {
            f"{path} {i}": np.asarray(leaf)
            for path, qtensor in fixed.qtensors.items()
            for i, leaf in enumerate(jax.tree.leaves(qtensor))
        }
        arrays |= {path: np.asarray(fixed.params[path]) for path in start_beside(fixed.params, student.traced.weights)}
        schemes = {path: str(qtensor.scheme) for path, qtensor in fixed.qtensors.items()}
        seed = np.asarray(jax.random.key_data(key)).tolist()
        rows = [[one.to_json(), one.low, one.high] for one in student.rows]
        options = dataclasses.replace(self, devices=ONE, save_every=1)  # on others the training is the same
        return digest_json(
            [repr(options), student.model.digest, data.digest, seed, schemes, digest_arrays(arrays), rows]
        )


def _finite(losses: list[Any], state: Path | None) -> list[float]:
    """The losses as numbers.

    Raises:
      MpqError: one is none; names the step.
    """
    losses = [float(x) for x in jax.device_get(losses)]
    if not np.isfinite(losses).all():
        first = int(np.argmin(np.isfinite(losses)))
        kept = "" if state is None or not checkpoint.exists(state) else f"; {state} holds the steps before it"
        raise MpqError(
            f"the distillation's loss is {losses[first]} at step {first + 1}: give smaller learning rates{kept}"
        )
    return losses


_WRITTEN = 0x80000000  # beside the numbers of steps and of epochs
_permutation = functools.partial(jax.jit, static_argnums=1)(jax.random.permutation)
_freeze = jax.jit(freeze)
