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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpq.allocate import Problem, solve_frontier
from mpq.evaluate import Reference, score
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import Watch, track
from mpq.quantize.candidates import Candidates, apply_plan
from mpq.types import MpqError, Params, QTensor

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
    """

    steps: int = 300
    batch_size: int = 8
    rate: float = 0.1
    penalty: float = 10.0
    hot: float = 2.0
    cold: float = 0.2
    plans: int = 16

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.plans) < 1:
            raise MpqError("steps, batch_size and plans of a search by gradient must be at least 1")
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
    ) -> Mixed:
        """Search.

        Args:
          model: the original.
          problem: groups, schemes, what is allowed and sizes; its losses are not read.
          candidates: weights under all schemes.
          data: rows to search on; labels are not read.
          budget_bits: of the quantized weights.
          key: of noise and of the order of the rows.

        Raises:
          MpqError: the budget is out of reach, or there are fewer rows than a batch.
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
        logits, losses = self._search(model, problem, members, data, budget, key)
        shares = np.asarray(_shares(jnp.asarray(logits), problem.allowed, 1.0), np.float64)
        drawn = self._drawn(problem, shares, budget, jax.random.fold_in(key, self.steps))
        weights = [spec for group in problem.members for spec in group]
        reference = Reference(model, data, self.batch_size)

        def kl(choice: tuple[int, ...]) -> float:
            params = apply_plan(model.params, weights, candidates.choose(problem.by_path(choice)))
            value = score(model, params, data, reference=reference, batch_size=0).summary().kl
            assert value is not None  # there is a reference
            return value

        measured = {choice: kl(choice) for choice in track(drawn, "measure", len(drawn))}
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
        self, model: Model, problem: Problem, members: _Members, data: Dataset, budget: int, key: jax.Array
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
        counted = np.asarray(model.task.counted(data.mask))
        watch = Watch("search", int(counted[: self.batch_size].sum()))
        for number in track(range(self.steps), "search", self.steps):
            order, drawn = jax.random.split(jax.random.fold_in(key, number))
            rows = np.asarray(jax.random.choice(order, len(data.inputs), (self.batch_size,), replace=False))
            temperature = np.float32(self.hot * (self.cold / self.hot) ** (number / max(self.steps - 1, 1)))
            batch = data.inputs[rows], counted[rows]
            whole, value = step(whole, (model.params, members, relative), batch, temperature, drawn)
            losses.append(value)
            watch.tell(value)
        return np.asarray(whole[0]), np.asarray(jax.device_get(losses), np.float32)


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
