"""What a run found, in words: the headline, the verdict on mixing, and which differences are too small to tell."""

import math

from analysis.allocation import handed_out_plans
from analysis.load import MADE_BETTER, Comparison, Result, TableInfo
from analysis.text import MINUS, effective_bits, megabytes, significant, with_error

_SURE = 2.0  # standard errors


def headline(result: Result) -> str:
    """The finding in two sentences: the comparison at the middle budget."""
    main = [c for c in result.comparisons if c.method in (None, result.main_method)]
    compared = [c for c in main if c.baseline is not None]
    if not compared:
        plans = ", ".join(f"{p.name} loses {with_error(p.kl, p.kl_stderr)}" for p in handed_out_plans(result))
        return f"KL to the original in {result.task.nats}: {plans}; no uniform scheme fits a budget to compare with."
    comparison = sorted(compared, key=lambda c: c.bits_per_weight)[len(compared) // 2]
    plan = result.plan(comparison.plan, comparison.method)
    assert plan is not None  # the loader checked it
    baseline = result.plan(comparison.baseline or "", plan.method)
    assert baseline is not None
    return (
        f"At {significant(plan.bits_per_weight)} bits per weight ({megabytes(plan.size_bytes)}) the mixed plan loses "
        f"{with_error(plan.kl, plan.kl_stderr)} {result.task.nats} (KL to the original); the best uniform scheme that "
        f"fits, {baseline.name}, loses {with_error(baseline.kl, baseline.kl_stderr)}. {_verdict_sentence(comparison)}"
        f"{_made_better(result, comparison.budget)}"
    )


def _made_better(result: Result, budget: str | None) -> str:
    """What the way adds in which the plan that the budget ends with is made, if it is not plain rounding."""
    winner = result.winners.get(budget or "")
    plan = result.plan(winner.plan, winner.method) if winner is not None and winner.method is not None else None
    if plan is None or plan.kind not in MADE_BETTER:
        return ""
    return f" Handed out is {plan.name}, {plan.kind}, which loses {with_error(plan.kl, plan.kl_stderr)}."


def verdict(comparison: Comparison) -> str:
    """`better`, `worse` or `no difference shown`, at two standard errors; `no baseline fits`; `error unknown`."""
    if comparison.baseline is None:
        return "no baseline fits"
    if comparison.z is None:
        return "error unknown"
    if abs(comparison.z) < _SURE:
        return "no difference shown"
    return "better" if comparison.z < 0 else "worse"


def next_scheme_note(table_: TableInfo, path: str, scheme: str) -> str | None:
    """The next larger scheme, if this weight's predicted loss under it is not distinguishable from that under `scheme`.

    Not distinguishable: the loss would fall by less than two standard errors of the difference. The two errors are
    taken as independent; both come from the same documents, so the true error is smaller and the note errs on the side
    of caution.
    """
    order = sorted(table_.schemes, key=effective_bits)
    here = table_.at(path, scheme)
    if here is None or scheme == order[-1]:
        return None
    larger = order[order.index(scheme) + 1]
    there = table_.at(path, larger)
    assert there is not None  # `larger` is one of the table's schemes
    error = math.hypot(here[1] or 0.0, there[1] or 0.0)
    return larger if here[0] - there[0] < _SURE * error else None


def _verdict_sentence(comparison: Comparison) -> str:
    amount = with_error(abs(comparison.kl_difference or 0.0), comparison.stderr)
    z = z_score(comparison.z)
    return {
        "better": f"Mixing is better by {amount} (z = {z}).",
        "worse": f"Mixing is worse by {amount} (z = {z}).",
        "no difference shown": f"The difference, {amount}, is within two standard errors (z = {z}): none is shown.",
    }.get(verdict(comparison), f"The difference is {amount}; its standard error is not known.")


def z_score(value: float | None) -> str:
    """`−10.8`; a dash for None."""
    return significant(None) if value is None else f"{value:.1f}".replace("-", MINUS)
