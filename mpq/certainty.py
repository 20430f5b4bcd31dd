"""How sure the choices of a plan are, as plain data and in one sentence: for `mpq allocate`, results and the report."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpq.allocate import Problem, stability
from mpq.allocate.stability import SURE
from mpq.types import Scheme


def certainty(problem: Problem, choices: Mapping[str, Scheme], budget_bits: int, seed: int) -> dict[str, Any]:
    """In which part of the resamples of the sensitivities every weight takes the scheme that the plan gives it.

    Cost: 200 solves by the Lagrangian relaxation, of 300 groups less than a second. Where this takes another scheme
    than the plan although no loss is changed, the two lose about the same, and the choice counts as unsure.

    Args:
      problem: what the plan was solved from.
      choices: path -> scheme, of the plan.
      budget_bits: its limit.
      seed: of the resamples.

    Returns:
      `statement`: one sentence for a person. `share`: path -> part of the resamples, None where there can be none.
      `unsure`: the paths for which it is below 95 %: their schemes are not distinguishable from others.
    """
    if not problem.errors_known:
        return unknown(
            "the sensitivities have no standard errors (one document or probe), so nothing is known of how sure the "
            "choices are: measure on more documents"
        )
    if not problem.variance[problem.allowed].any():
        return unknown("the sensitivities have no sampling error, so resamples say nothing of how sure the choices are")
    found = stability(problem, budget_bits, np.random.default_rng(seed), exact=False)
    taken = found.share[np.arange(len(found.names)), problem.by_group(choices)].tolist()
    by_path = {spec.path: part for group, part in zip(problem.members, taken, strict=True) for spec in group}
    share = {path: by_path[path] for path in problem.paths or by_path}  # a plan from a file has another order
    unsure = [path for path, part in share.items() if part < SURE]
    statement = (
        f"{len(unsure)} of {len(share)} choices are not distinguishable from others: in more than 1 of 20 of "
        f"{found.num_resamples} resamples of the sensitivities another scheme would be taken"
    )
    return {"statement": statement, "share": share, "unsure": unsure}


def unknown(statement: str) -> dict[str, Any]:
    """What `certainty` returns where there are no resamples; `statement` says why."""
    return {"statement": statement, "share": None, "unsure": []}
