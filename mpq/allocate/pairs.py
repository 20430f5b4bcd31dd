"""Losses that do not add up: a term for every group, and one for every pair of groups.

E(x) = sum_g loss[g, x_g] + sum_{g<h} pairs[g, x_g, h, x_h]        [nats per output]
"""

import dataclasses
import functools

import numpy as np

from mpq.allocate.problem import Problem
from mpq.types import MpqError


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The terms, as arrays.

    Attributes:
      loss: `float64[G, S]`, nats per output; infinite where a scheme is not allowed.
      pairs: `float64[G, S, G, S]`, symmetric, 0 within a group.
      size: `int64[G, S]`, bits.
      budget: bits.
    """

    loss: np.ndarray
    pairs: np.ndarray
    size: np.ndarray
    budget: int

    @classmethod
    def of(cls, problem: Problem, interactions: np.ndarray, budget: int) -> "Pairs":
        """Sums over fused groups.

        Args:
          problem: gives the losses of single weights, sizes and what is allowed.
          interactions: `float64[L, S, L, S]` nats, symmetric; weights in the order of `problem.paths`. A plan's
            loss has the sum of its entries over all ordered pairs of different weights; the others are not read.
          budget: bits.

        Raises:
          MpqError: another shape, an entry that is not finite, or no symmetry.
        """
        paths = problem.paths or tuple(spec.path for group in problem.members for spec in group)
        shape = (len(paths), len(problem.schemes)) * 2
        if interactions.shape != shape:
            raise MpqError(
                f"interactions have shape {list(interactions.shape)}: they must be {list(shape)}, [weights, schemes] "
                "twice, of the table that the problem was made from"
            )
        if not np.isfinite(interactions).all() or not np.allclose(interactions, interactions.transpose(2, 3, 0, 1)):
            raise MpqError("interactions are not finite and symmetric: compute them again")
        group = {spec.path: index for index, members in enumerate(problem.members) for spec in members}
        member = np.equal.outer(np.arange(len(problem.names)), [group[path] for path in paths]).astype(np.float64)
        alone = np.arange(len(paths))
        others = interactions.copy()
        others[alone, :, alone] = 0.0
        total = np.einsum("gl,lsmt,hm->gsht", member, others, member, optimize=True)
        total = (total + total.transpose(2, 3, 0, 1)) / 2
        within = np.einsum("gsgs->gs", total)
        loss = np.where(problem.allowed, problem.loss + within, np.inf)
        rows = np.arange(len(member))
        total[rows, :, rows] = 0.0
        return cls(loss, 2 * total, problem.size_bits, budget)

    @functools.cached_property
    def rounding(self) -> float:
        """What sums of the terms in float64 may be off by, generously: nats."""
        loss = np.where(np.isfinite(self.loss), np.abs(self.loss), 0.0).max(axis=1).sum()
        return 1e-12 * float(loss + np.abs(self.pairs).max(axis=(1, 3)).sum())

    @functools.cached_property
    def span(self) -> float:
        """Bits from the smallest option to the largest: what bounds count sizes in."""
        return float(np.ptp(self.size)) or 1.0

    def unit(self, known: float) -> float:
        """Mean loss of a group, nats: what bounds count losses in; `known` is E of a plan."""
        return max(abs(known), float(np.abs(self.loss).min(axis=1).sum())) / len(self.loss) or 1.0

    def energy(self, choice: np.ndarray) -> float:
        """E of one scheme index per group."""
        rows = np.arange(len(choice))
        return float(self.loss[rows, choice].sum() + self.pairs[rows, choice][:, rows, choice].sum() / 2)

    def bits(self, choice: np.ndarray) -> int:
        """Size of one scheme index per group."""
        return int(self.size[np.arange(len(choice)), choice].sum())

    def descend(self, choice: np.ndarray) -> np.ndarray:
        """Local search: the best change of one group or two at once that fits, until none is left.

        All `(G S)^2 / 2` changes are looked at in every step. The result depends on nothing but the start.

        Args:
          choice: within the budget.
        """
        rows, schemes = np.arange(len(choice)), self.loss.shape[1]
        energy = self.energy(choice)
        while True:
            to = self.pairs[:, :, rows, choice]  # [g, o, h]: g at o, h as it is
            alone = self.loss + to.sum(axis=2)
            alone = alone - alone[rows, choice][:, None]
            now = to[rows, choice]
            change = self.pairs - to[:, :, :, None] - to.transpose(2, 0, 1)[:, None] + now[:, None, :, None]
            change += alone[:, :, None, None] + alone
            change[rows, :, rows] = np.where(np.eye(schemes, dtype=np.bool_), alone[:, :, None], np.inf)
            extra = self.size - self.size[rows, choice][:, None]
            both = np.add.outer(extra, extra)
            both[rows, :, rows] = extra[:, :, None]
            change[both > self.budget - self.bits(choice)] = np.inf
            g, o, h, p = np.unravel_index(change.argmin(), change.shape)
            changed = choice.copy()
            changed[g], changed[h] = o, p
            if not (lower := self.energy(changed)) < energy - self.rounding:
                return choice
            choice, energy = changed, lower
