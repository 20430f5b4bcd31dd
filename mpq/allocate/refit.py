"""A table of single weights corrected by a few measured plans, so that it ranks plans and not only weights.

Sums over single weights misjudge plans in two ways: by a law common to all (`power_law`), and candidate by candidate,
as the error of a weight costs more or less within a plan than alone. With c the table, sigma(p) = sum_g c[g, x_g] for a
plan p of measured loss L_p, and a law L = A sigma^b, the second is a linear mixed model

    (L_p / A)^(1/b) / sigma(p)  =  1 + sum_g u[g, x_g] c[g, x_g] / sigma(p) + e_p

with u[g, s] ~ N(0, tau^2), relative corrections that are alike for all candidates, and e_p ~ N(0, s^2), what no sum can
see. b and tau^2 / s^2 maximise the restricted likelihood of log L (Patterson and Thompson 1971, Biometrika 58(3):545;
the power with its Jacobian as in Box and Cox 1964, J. R. Stat. Soc. B 26(2):211), A and s^2 follow from them. u is its
best linear unbiased prediction (Henderson 1975, Biometrics 31(2):423; Rasmussen and Williams 2006, section 2.7), and
the corrected table c (1 + u) stays one that every solver takes. The metric is the prior: without plans it stands, and
candidates that no plan took, or that cost little, keep its word.

Cost: one measurement a plan, and linear algebra of the number of plans.
Fails on: budgets far from the plans', where other candidates matter; interactions that do not average out over plans,
which stay in the spread.
"""

import dataclasses

import numpy as np

from mpq.allocate.power_law import PowerLaw, logarithms
from mpq.allocate.problem import Problem
from mpq.types import MpqError

MIN_PLANS = 8
RATIOS = np.geomspace(1e-3, 1e3, 61)
"""tau^2 over s^2 that are compared, for features of mean square one: from no corrections to no noise."""
EXPONENTS = np.geomspace(0.5, 2.0, 57)
"""b that are compared."""


@dataclasses.dataclass(frozen=True, eq=False)
class Refit:
    """A corrected problem, and what its sums mean.

    Attributes:
      problem: the given one with corrected losses; standard errors are scaled with them.
      law: from sums of these losses to the loss of a plan. `spread` is by leaving each plan out in turn.
      ratio: tau^2 / s^2: large where plans speak clearly about single candidates.
    """

    problem: Problem
    law: PowerLaw
    ratio: float

    def predict(self, plans: np.ndarray) -> np.ndarray:
        """Loss of plans `int[P, G]` of scheme indices: `float64[P]` nats per output."""
        return self.law(self.problem.parts(plans).sum(axis=1))


def refit(problem: Problem, plans: np.ndarray, measured: np.ndarray) -> Refit:
    """Correct the losses of `problem` by measured plans.

    Args:
      problem: losses of single weights.
      plans: `int[P, G]`, scheme index of every group; best near the budgets that will be asked for.
      measured: `[P]`, losses of these plans, nats per output.

    Raises:
      MpqError: fewer than 8 plans, or `logarithms` refuses their losses.
    """
    if len(plans) < MIN_PLANS:
        raise MpqError(f"{len(plans)} measured plans: correcting a table takes at least {MIN_PLANS}")
    parts = problem.parts(plans)
    total = parts.sum(axis=1)
    log_total, log_loss = logarithms(total, measured)
    taken = np.arange(len(problem.schemes))[:, None, None] == plans
    features = np.where(taken, parts / total[:, None], 0.0).transpose(1, 2, 0).reshape(len(plans), -1)
    scale = np.sqrt(np.square(features - features.mean(axis=0)).sum(axis=1).mean())
    features /= scale
    exponent, ratio = _most_likely(features, log_loss, log_total)
    power = np.asarray(measured, np.float64) ** (1 / exponent) / total
    mean, effects, left_out = _best_prediction(features, power, ratio)
    relative = 1 + effects.reshape(problem.loss.shape) / (mean * scale)
    relative = np.maximum(relative, 0.0)  # no candidate is corrected into a gain
    corrected = dataclasses.replace(
        problem, loss=problem.loss * relative, variance=problem.variance * np.square(relative)
    )
    spread = exponent * float(np.sqrt(np.square(left_out / power).mean()))
    return Refit(corrected, PowerLaw(mean**exponent, exponent, spread, len(plans)), ratio)


def _most_likely(features: np.ndarray, log_loss: np.ndarray, log_total: np.ndarray) -> tuple[float, float]:
    """The b and tau^2 / s^2 of largest restricted likelihood of the logarithm of the losses.

    Args:
      features: `[P, F]`.
      log_loss: `[P]`.
      log_total: `[P]`, logarithm of sigma(p).
    """
    eigenvalues, basis = np.linalg.eigh(features @ features.T)
    log_power = log_loss / EXPONENTS[:, None] - log_total
    log_power -= log_power.mean(axis=1, keepdims=True)  # A: so that powers of any exponent are of one size
    one, power = basis.sum(axis=0), np.exp(log_power) @ basis
    jacobian = log_power.sum(axis=1) - len(log_loss) * np.log(EXPONENTS)
    free = len(log_loss) - 1
    likelihood = np.empty((len(RATIOS), len(EXPONENTS)))
    for row, ratio in enumerate(RATIOS):
        variance = 1 + ratio * np.maximum(eigenvalues, 0.0)
        information = (np.square(one) / variance).sum()
        residual = power - one * (power @ (one / variance) / information)[:, None]
        squares = np.maximum((np.square(residual) / variance).sum(axis=1) / free, np.finfo(np.float64).tiny)
        likelihood[row] = jacobian - (np.log(variance).sum() + np.log(information) + free * np.log(squares)) / 2
    row, column = np.unravel_index(int(np.argmax(likelihood)), likelihood.shape)
    return float(EXPONENTS[column]), float(RATIOS[row])


def _best_prediction(features: np.ndarray, target: np.ndarray, ratio: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The model target = mean + features @ effects + residual, its effects shrunk by `ratio`.

    Returns:
      The mean, the effects `[F]`, and `[P]` how far every target is from its prediction by all others.
    """
    kernel, identity = ratio * features @ features.T, np.eye(len(target))
    inverse = np.linalg.inv(kernel + identity)
    weights = inverse.sum(axis=0) / inverse.sum()  # of the generalised least squares mean
    projected = inverse @ (identity - weights)
    smoother = weights + kernel @ projected
    left_out = (target - smoother @ target) / (1 - np.diag(smoother))
    return float(weights @ target), ratio * features.T @ (projected @ target), left_out
