r"""How many measured plans buy how good a prediction: sums, corrected tables and surrogates of one model's plans.

Run:     python -m experiments.surrogate --model DIR --data FILE [--test FILE] --metrics kl fisher \
             --fit-plans 160 --out experiments/results/surrogate/NAME.json
Expect:  the files of that folder, which `python -m analysis.surrogate` joins to one page
Resume:  type the same command again; what is measured is kept in `--work`.

Plans are drawn and measured as `experiments.bakeoff` does, whose options these are. In each band every metric, and
`marginal`, is judged by the plans of the test set three ways: its sum; `refit`, the table corrected by the first N of
the further plans; `surrogate`, the Gaussian process through them. With `--corrected`, which metrics do not see, `alone`
is one more: groups one by one, all others exact, measured as plans are. Numbers are those of the bake-off, and

    cost       forward passes over the calibration set of the metric, `plan_cost` those of measuring one plan
    promised   median spread that the surrogate states
    within     share of the plans whose measured loss is within twice that spread of the prediction; 95 % if the
               spread is right and the sets that plans are fitted and judged on agree

`by_rows` is what the rows of these plans buy: the surrogate of most plans, fitted to their losses on whole documents
from the first rows of the set that they were measured on.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.bakeoff import BANDS, Bakeoff, agreement, rounded
from experiments.bakeoff import Options as Plans
from mpq.allocate import Problem, Surrogate, refit
from mpq.files import write_json
from mpq.progress import shown, track
from mpq.record import RunRecord
from mpq.types import MpqError


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      plans: model, data, plans and metrics, as of `experiments.bakeoff`.
      counts: how many of the further plans a prediction is fitted to.
      bands: which of the bands, by number.
      rows: of the set that plans are fitted on, how many are seen, beside all of them.
    """

    plans: Annotated[Plans, tyro.conf.arg(name="")]
    counts: tuple[int, ...] = (20, 40, 80, 160)
    bands: tuple[int, ...] = (0, 1, 2)
    rows: tuple[int, ...] = ()


def main(options: Options) -> None:
    """Score, measure, fit, compare, write."""
    run = Bakeoff(options.plans)
    scored = {metric.partition(":")[0]: run.table(metric) for metric in track(options.plans.metrics, "metrics")}
    problems = {name: Problem.from_table(table) for name, (table, _) in scored.items()}
    cost = {name: cost for name, (_, cost) in scored.items()}
    count, fit_set = options.plans.plans, options.plans.fit_set
    bands = []
    for band in [BANDS[index] for index in options.bands]:
        what = f"{band[0]}-{band[1]} bits"
        plans = run.plans(band, len(problems["kl"].names))
        choices = [problems["kl"].by_path(x) for x in plans]
        sums, counts = run.documents(fit_set, choices[count:], what)
        fit = sums.sum(axis=1) / counts.sum()
        made = {"marginal": run.marginal} | ({"alone": run.alone} if options.plans.corrected else {})
        around = {name: measure(band, problems["kl"]) for name, measure in made.items()}
        every = cost | {name: passes for name, (_, passes) in around.items()}
        measured, halves = run.measure("test", choices[:count], what)
        on_rows = {n: losses_on(n, sums, counts, run.sets[fit_set].document) for n in options.rows}
        entries = {}
        for name, problem in (problems | {name: one for name, (one, _) in around.items()}).items():
            entries[name] = {
                "sum": agreement(problem.parts(plans[:count]).sum(axis=1), measured),
                "cost": rounded(every[name]),
                "fitted": list(compare(problem, plans, fit, measured, options.counts)),
                "by_rows": [
                    {"rows": n, "surrogate": one["surrogate"]}
                    for n, some in on_rows.items()
                    for one in compare(problem, plans, some, measured, [max(options.counts)])
                ],
            }
        ceiling = {"halves": rounded(halves), "plan_cost": run.plan_cost(fit_set)}
        bands.append({"bits": list(band), "median": rounded(float(np.median(measured))), **ceiling, "metrics": entries})
    inputs = {"model": run.model.digest, **{name: data.digest for name, data in run.sets.items()}}
    named = {"data": run.description()["data"], "model": run.model.name, "out": "", "test": "", "work": ""}
    own = {"counts": options.counts, "bands": options.bands, "rows": options.rows}
    config = dataclasses.asdict(options.plans) | named | own
    record = RunRecord.collect(config, seeds={"seed": options.plans.seed}, inputs=inputs)
    write_json(options.plans.out, run.description() | {"bands": bands, "record": record.to_json()})


def compare(
    problem: Problem, plans: np.ndarray, fit: np.ndarray, measured: np.ndarray, counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """By N, agreement of what is fitted to the first N of the further plans with the measured ones.

    Args:
      problem: a metric's losses; nothing can be fitted where they sum to no more than 0.
      plans: `int[plans + fit_plans, G]`.
      fit: `[fit_plans]`, measured losses of the last ones.
      measured: `[plans]`, measured losses of the first ones on the test set.
      counts: the N.
    """
    judged, further = plans[: len(measured)], plans[len(measured) :]
    if (problem.parts(plans).sum(axis=1) <= 0).any():
        return
    for count in counts:
        corrected = refit(problem, further[:count], fit[:count]).predict(judged)
        predicted, spread = Surrogate(problem, further[:count], fit[:count]).predict(judged)
        within = np.abs(np.log(predicted / measured)) < 2 * spread
        promised = {"promised": rounded(float(np.median(spread))), "within": rounded(float(within.mean()))}
        yield {
            "plans": count,
            "refit": agreement(corrected, measured),
            "surrogate": agreement(predicted, measured) | promised,
        }


def losses_on(rows: int, sums: np.ndarray, counts: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Mean losses of plans on the first documents of a set, `float64[plans]`.

    Args:
      rows: at most so many, in whole documents.
      sums: `[plans, D]`, losses over each document.
      counts: `[D]`, what counts in it.
      document: `int[R]`, of every row of the set.

    Raises:
      MpqError: the first document has more rows.
    """
    taken = int((np.cumsum(np.unique(document, return_counts=True)[1]) <= rows).sum())
    if not taken:
        raise MpqError(f"{rows} rows are less than the first document has: take more")
    return sums[:, :taken].sum(axis=1) / counts[:taken].sum()


if __name__ == "__main__":
    with shown():
        main(tyro.cli(Options))
