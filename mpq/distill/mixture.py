"""Bit widths by gradient: every weight a mixture of its candidates, whose shares are learned within a budget.

Of each group g of weights, logits a_g over the schemes s that it may take. With Gumbel noise n and a temperature t that
falls, a step draws the shares and the weights

    p_gs = softmax_s((a_gs + n_gs) / t)        w = sum_s p_gs Q_s(w)

and descends KL(original || mixed) + penalty max(0, sum_gs softmax(a_g)_s size_gs / budget - 1). At low temperatures a
draw is nearly one candidate, so that the loss is that of plans, all weights' errors at once, where a table has those of
single weights. In the end plans are drawn that fit: the exact solutions (`mpq.allocate`) of the largest product of
shares, the first of the shares themselves, the others with noise again. They are measured, and the best one is taken.

It is the search of DNAS (Wu et al. 2018, arXiv:1812.00090), which draws and compares plans at last, too. Differences:
candidates are rounded once, by any algorithm, and not trained; what exceeds a budget costs, as in FracBits (Yang and
Jin 2020, arXiv:2007.02017), not every bit; what is drawn at last fits, whatever was learned.

Cost: for every step two forward passes and a backward one, and every candidate dequantized; for every plan that is
drawn a pass over the data; memory for all candidates' codes, and floats of a weight for each as it is mixed.
Fails on: too few steps, for shares that have not separated say little; and errors of candidates that are mixed cancel,
so that mixtures at a high temperature are better than any plan.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpq.allocate import Problem, solve_frontier
from mpq.allocate.refine import Measure
from mpq.distill import checkpoint
from mpq.evaluate import Reference, score
from mpq.files import digest_arrays, digest_json
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import Watch, track
from mpq.quantize.candidates import Candidates, apply_plan
from mpq.types import MpqError, Params, QTensor, Scheme

_Members = dict[str, dict[int, QTensor]]
"""Path of a weight -> column of a scheme -> the weight under it."""


class Mixed(NamedTuple):
    """What a search found.

    Attributes:
      choice: `int64[G]`, index of the scheme of every group.
      shares: `float64[G, S]`, learned shares, 0 where a scheme is not allowed.
      losses: `float32[steps]`, nats per output of the mixture of each step, without the penalty.
      measured: KL to the original on the data, nats per output, of the plans that were drawn; the choice is the best.
    """

    choice: np.ndarray
    shares: np.ndarray
    losses: np.ndarray
    measured: Mapping[tuple[int, ...], float]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The search.

    Attributes:
      steps: batches.
      batch_size: rows of each.
      rate: Adam's, of logits, which decays to 0 as a cosine.
      penalty: nats for a size of twice the budget.
      hot, cold: temperature at first and at last; it falls geometrically.
      plans: that are drawn and measured at last.
      save_every: steps between two states written to disk, where a folder is given.
    """

    steps: int = 300
    batch_size: int = 8
    rate: float = 0.1
    penalty: float = 10.0
    hot: float = 2.0
    cold: float = 0.2
    plans: int = 16
    save_every: int = 50
    name: str = dataclasses.field(default="gradient", init=False)

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.plans, self.save_every) < 1:
            raise MpqError("steps, batch_size, plans and save_every of a search by gradient must be at least 1")
        numbers = (self.rate, self.penalty, self.hot, self.cold)
        if not all(0 < number < float("inf") for number in numbers):
            raise MpqError(
                f"rate, penalty and temperatures {numbers} of a search by gradient must be above 0 and finite"
            )

    def __call__(
        self,
        model: Model,
        problem: Problem,
        candidates: Candidates,
        data: Dataset,
        budget_bits: int,
        *,
        key: jax.Array,
        measure: Measure | None = None,
        state: Path | None = None,
    ) -> Mixed:
        """Search.

        Args:
          model: the original.
          problem: groups, schemes, what is allowed and sizes; its losses are not read.
          candidates: weights under all schemes.
          data: rows to search on; labels are not read.
          budget_bits: of the quantized weights.
          key: of noise and of the order of the rows.
          measure: the loss of plans that are drawn, such as `mpq.measure.PlanLoss`; None: their KL on `data`.
          state: Orbax checkpoint that an interrupted search continues from, to the same plan; the caller removes it.

        Raises:
          MpqError: the budget is out of reach, there are fewer rows than a batch, or `state` is damaged or of another
            search.
        """
        budget = problem.check_budget(budget_bits)
        if len(data.inputs) < self.batch_size:
            raise MpqError(
                f"{len(data.inputs)} rows are fewer than a batch of {self.batch_size}: give more or a smaller batch"
            )
        members = {
            spec.path: {int(s): candidates.qtensor(spec, problem.schemes[s]) for s in np.flatnonzero(allowed)}
            for group, allowed in zip(problem.members, problem.allowed, strict=True)
            for spec in group
        }
        kept = None
        if state is not None:
            codes = {path: digest_arrays(_numbered(options)) for path, options in members.items()}
            sizes = digest_arrays({"bits": problem.size_bits, "allowed": problem.allowed})
            seed = np.asarray(jax.random.key_data(key)).tolist()
            kept = state, digest_json([repr(self), model.digest, data.digest, budget, seed, codes, sizes])
        logits, losses = self._search(model, problem, members, data, budget, key, kept)
        shares = np.asarray(_shares(jnp.asarray(logits), problem.allowed, 1.0), np.float64)
        drawn = self._drawn(problem, shares, budget, jax.random.fold_in(key, self.steps))
        weights = [spec for group in problem.members for spec in group]

        def kl(plan: Mapping[str, Scheme]) -> float:
            params = apply_plan(model.params, weights, candidates.choose(plan))
            value = score(model, params, data, reference=reference, batch_size=0).summary().kl
            assert value is not None  # there is a reference
            return value

        if measure is None:
            reference, measure = Reference(model, data, self.batch_size), kl
        measured = {choice: measure(problem.by_path(choice)) for choice in track(drawn, "measure", len(drawn))}
        return Mixed(np.array(min(measured, key=measured.__getitem__)), shares, losses, measured)

    def _drawn(self, problem: Problem, shares: np.ndarray, budget: int, key: jax.Array) -> list[tuple[int, ...]]:
        """Different plans that fit, the likeliest first."""
        likely = np.log(np.maximum(shares, np.finfo(np.float64).tiny))
        noise = np.asarray(jax.random.gumbel(key, (self.plans - 1, *shares.shape)), np.float64)
        found = []
        for one in (likely, *(likely + noise)):
            cost = np.where(problem.allowed, -one, 0.0)
            posed = dataclasses.replace(problem, loss=cost, variance=np.zeros_like(cost))
            found.append(tuple(solve_frontier(posed).choice_within(budget).tolist()))
        return list(dict.fromkeys(found))

    def _search(
        self,
        model: Model,
        problem: Problem,
        members: _Members,
        data: Dataset,
        budget: int,
        key: jax.Array,
        kept: tuple[Path, str] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        adam = optax.adam(optax.cosine_decay_schedule(self.rate, self.steps))
        logits = jnp.zeros(problem.loss.shape, jnp.float32)
        relative = jnp.asarray(np.where(problem.allowed, problem.size_bits / budget, 0.0), jnp.float32)
        loss = functools.partial(_loss, model, problem, self.penalty)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(whole: Any, fixed: Any, batch: Any, temperature: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
            logits, moments = whole
            noise = jax.random.gumbel(key, logits.shape)
            gradient, divergence = jax.grad(loss, has_aux=True)(logits, noise, temperature, *fixed, *batch)
            with jax.numpy_dtype_promotion("standard"):  # Optax mixes its counts with floats
                updates, moments = adam.update(gradient, moments, logits)
            return (optax.apply_updates(logits, updates), moments), divergence

        whole, losses = (logits, adam.init(logits)), []
        if kept is not None and checkpoint.exists(kept[0]):
            whole, losses = checkpoint.load(kept[0], whole, {"of": kept[1]})
        begin = len(losses)
        counted = np.asarray(model.task.counted(data.mask))
        watch = Watch("search", int(counted[: self.batch_size].sum()))
        for number in track(range(begin, self.steps), "search", self.steps - begin):
            order, drawn = jax.random.split(jax.random.fold_in(key, number))
            rows = np.asarray(jax.random.choice(order, len(data.inputs), (self.batch_size,), replace=False))
            temperature = np.float32(self.hot * (self.cold / self.hot) ** (number / max(self.steps - 1, 1)))
            batch = data.inputs[rows], counted[rows]
            whole, value = step(whole, (model.params, members, relative), batch, temperature, drawn)
            losses.append(value)
            watch.tell(value)
            if kept is not None and ((number + 1) % self.save_every == 0 or number + 1 == self.steps):
                losses = [float(x) for x in jax.device_get(losses)]
                checkpoint.save(kept[0], whole, losses, {"of": kept[1]})
        return np.asarray(whole[0]), np.asarray(jax.device_get(losses), np.float32)


def _numbered(options: Mapping[int, QTensor]) -> dict[str, np.ndarray]:
    """All arrays of a weight under its schemes."""
    arrays = {f"{s} {i}": leaf for s, qtensor in options.items() for i, leaf in enumerate(jax.tree.leaves(qtensor))}
    return {name: np.asarray(leaf) for name, leaf in arrays.items()}


def mixed(problem: Problem, members: _Members, shares: jax.Array, params: Params) -> dict[str, jax.Array]:
    """The parameters with every weight a mixture of its candidates.

    Args:
      problem: groups of weights.
      members: the candidates.
      shares: `float32[G, S]`.
      params: of the model.
    """
    out = dict(params)
    for share, group in zip(shares, problem.members, strict=True):
        for spec in group:
            parts = [share[s] * qtensor.dequantize() for s, qtensor in members[spec.path].items()]
            out = spec.write(out, functools.reduce(jnp.add, parts))
    return out


def _loss(
    model: Model,
    problem: Problem,
    penalty: float,
    logits: jax.Array,
    noise: jax.Array,
    temperature: jax.Array,
    params: Params,
    members: _Members,
    relative: jax.Array,
    inputs: jax.Array,
    counted: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What is minimized, and the divergence in it."""
    student = mixed(problem, members, _shares(logits + noise, problem.allowed, temperature), params)
    p, q = (model.task.distribution(model.apply(one, inputs)) for one in (params, student))
    total = jnp.sum(model.task.divergence(p, q), where=counted)
    divergence = total / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
    size = jnp.sum(_shares(logits, problem.allowed, 1.0) * relative)
    return divergence + penalty * jnp.maximum(size - 1.0, 0.0), divergence


def _shares(logits: jax.Array, allowed: np.ndarray, temperature: Any) -> jax.Array:
    return jax.nn.softmax(jnp.where(allowed, logits / temperature, -jnp.inf), axis=-1)
