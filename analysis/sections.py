"""The sections of the report: each makes a list of HTML pieces from the result and the drawn figures."""

from collections.abc import Mapping
from typing import Any

from analysis.allocation import handed_out_plans, scheme_color
from analysis.figure import Drawing
from analysis.findings import next_scheme_note, verdict, z_score
from analysis.html import definitions, escape, figure, paragraph, table
from analysis.load import Evaluation, PlanResult, Result, TableInfo, WeightInfo, Winner
from analysis.measures import AGREEMENTS, QUALITIES, counted, document_noun
from analysis.text import megabytes, significant, thin, with_error

Drawings = Mapping[str, Drawing]

_MAX_SLIDER_POINTS = 240
_MAX_WEIGHT_ROWS = 400


def frontier_section(result: Result, drawings: Drawings) -> list[str]:
    """The Pareto curve and the budget slider."""
    caption = (
        "KL to the original over size. Line: predicted for the best plan of every size. Points: measured on "
        f"{result.task.material} that neither calibration nor selection saw. Filled: rounded by the method of the "
        "plans handed out."
    )
    start = _middle(result)
    slider = (
        f'<div class="slider" id="budget" data-start="{start}" hidden>'
        '<label for="budget-input">Drag a budget along the frontier</label>'
        '<input id="budget-input" type="range" min="0" max="1" step="1" value="0">'
        '<output for="budget-input"></output></div>'
    )
    label = "Accuracy-size Pareto curve; the numbers are in the tables below"
    return [figure(drawings["frontier"], "frontier", label, caption), slider]


def mixing_section(result: Result, drawings: Drawings) -> list[str]:
    """What mixing bought, budget by budget."""
    rows = []
    for c in result.comparisons:
        plan = result.plan(c.plan, c.method)
        assert plan is not None  # the loader checked it
        baseline = result.plan(c.baseline, plan.method) if c.baseline else None
        word = verdict(c)
        mark = {"better": '<span class="good">▼ better</span>', "worse": '<span class="bad">▲ worse</span>'}
        winner = result.winners.get(c.budget or "")
        ends_with = _handed_out(plan, winner) if plan.method == result.main_method else significant(None)
        rows.append(
            [
                escape(c.budget or c.plan),
                escape(plan.method.upper()),
                escape(c.baseline or "none fits"),
                mark.get(word, f'<span class="keep">{escape(word)}</span>'),
                escape(ends_with),
                significant(plan.bits_per_weight),
                with_error(plan.kl, plan.kl_stderr),
                with_error(baseline.kl, baseline.kl_stderr) if baseline else significant(None),
                with_error(c.kl_difference, c.stderr),
                z_score(c.z),
            ]
        )
    head = [
        "budget",
        "rounding",
        "best uniform",
        "mixing is",
        "handed out",
        "bits/weight",
        "KL mixed",
        "KL uniform",
    ]
    noun = document_noun(result.task, result.data.get("test"))
    note = (
        f"KL in {result.task.nats}, ± one standard error over {noun}s. The difference is paired by {noun}; below zero "
        "mixing loses less. A verdict needs two standard errors. A budget ends with the best, on other "
        f"{result.task.material}, of the mixed plan, the uniform schemes that fit, and a fixed heuristic in the manner "
        "of llama.cpp's K-quants."
    )
    title = "Mixed plans against the best uniform scheme that fits the same budget"
    return [table(title, [*head, "difference", "z"], rows, 5), _note(note)]


def plans_section(result: Result, drawings: Drawings) -> list[str]:
    """Every plan and baseline with its numbers; quality has a column and a figure where the data has labels."""
    quality, agreement = QUALITIES[result.task.quality], AGREEMENTS[result.task.agreement]

    def quality_cell(model: PlanResult | Evaluation) -> list[str]:
        if not result.has_quality:
            return []
        bounded = quality.higher_is_better
        return [quality.shown(model.quality, model.quality_stderr) if bounded else significant(model.quality, 4)]

    final = {plan.name: plan.method for plan in result.plans if plan.handed_out}  # plain rounding comes first
    rows = []
    if result.reference is not None:
        size = megabytes(result.model.reference_size_bytes)
        dash = significant(None)
        rows.append(["original", dash, size, dash, "0", *quality_cell(result.reference), str(agreement.scale)])
    for plan in sorted(result.plans, key=lambda p: (p.bits_per_weight, p.name, p.method)):
        word = "handed out" if final.get(plan.name) == plan.method else "wins"
        tag = f' <span class="tag">{word}</span>' if plan.handed_out else ""
        rows.append(
            [
                f"{escape(plan.name)}, {escape(plan.method.upper())}{tag}",
                significant(plan.bits_per_weight),
                megabytes(plan.size_bytes),
                significant(plan.predicted_kl if plan.method == result.main_method else None),
                with_error(plan.kl, plan.kl_stderr),
                *quality_cell(plan),
                agreement.shown(plan.agreement, plan.agreement_stderr),
            ]
        )
    columns = [quality.column] * result.has_quality + [agreement.column]
    head = ["plan", "bits/weight", "size", "predicted KL", "KL", *columns]
    note = f"The prediction is of errors by {result.main_method.upper()}, hence for plans rounded by it only."
    if not result.has_quality and result.task.unit != "token":
        note += f" Without labels there is no {quality.title}: all numbers compare with the original."
    content = [table(f"Every plan, measured on {counted(result)}", head, rows), _note(note)]
    return (
        [*content, f'<div class="small">{_quality_drawing(result, drawings)}</div>'] if result.has_quality else content
    )


def _quality_drawing(result: Result, drawings: Drawings) -> str:
    quality = QUALITIES[result.task.quality]
    name = quality.title[0].upper() + quality.title[1:]
    label = f"{name} of every plan over size; the table has the same numbers"
    caption = f"{name} on the same {result.task.material}"
    if not quality.higher_is_better:
        caption += "; its own standard error is common to all plans and not drawn."
    elif result.reference is not None and result.reference.quality_stderr:
        noun = document_noun(result.task, result.data.get("test"))
        caption += f"; the band is of the original. All plans see the same {noun}s: their differences are known better."
    else:
        caption += "."
    return figure(drawings[result.task.quality], result.task.quality, label, caption)


def prediction_section(result: Result, drawings: Drawings) -> list[str]:
    """How well the sum over weights predicted the measured loss."""
    plans = [p for p in result.plans if p.method == result.main_method and p.kl > 0 and p.predicted_kl]
    ratios = sorted(p.kl / p.predicted_kl for p in plans if p.predicted_kl)
    text = "The prediction adds up what each weight loses alone; the measurement has all of them quantized at once. "
    if ratios:
        low, high = significant(ratios[0], 2), significant(ratios[-1], 2)
        text += f"Measured over predicted lies between {low} and {high} over {len(ratios)} plans. "
    if any(plan.corrected_kl for plan in plans):
        text += "Corrected: what the other plans, measured on the selection set, say of sums of this size."
    label = "Predicted over measured KL of every plan"
    drawn = figure(drawings["agreement"], "agreement", label, "On the dashed line the prediction is right.")
    rows = [
        [
            escape(plan.name),
            with_error(plan.predicted_kl, plan.predicted_stderr),
            with_error(plan.corrected_kl, plan.corrected_stderr),
            with_error(plan.kl, plan.kl_stderr),
            significant(plan.kl / best if (best := plan.corrected_kl or plan.predicted_kl) else None, 2),
        ]
        for plan in handed_out_plans(result)
    ]
    head = ["plan handed out", "predicted KL, summed", "corrected", "measured KL", "measured / predicted"]
    title = f"KL of what is handed out, {result.task.nats}, ± one standard error"
    return [paragraph(text), table(title, head, rows), f'<div class="small">{drawn}</div>']


def weights_section(result: Result, drawings: Drawings) -> list[str]:
    """The scheme of every weight in the plans handed out."""
    plans = handed_out_plans(result)
    table_ = result.allocation_table
    label = "Scheme of every weight in every plan handed out; the table below has the same content"
    drawn = figure(drawings["allocation"], "allocation", label, "A cell: code width and group size of one weight.")
    shown = _most_sensitive(result, plans)
    rows = [
        [
            escape(w.path),
            f'<span class="keep">{w.k} × {w.n}</span>',
            escape(w.kind),
            *(_choice(table_, w.path, plan) + _unsure(result, w.path, plan) for plan in plans),
        ]
        for w in shown
    ]
    head = ["weight", "k × n", "read by", *(plan.name for plan in plans)]
    note = (
        f"Below a scheme: the loss predicted for this weight alone, in thousandths of a nat per {result.task.unit}. "
        "≈: not distinguishable from the next larger scheme, under which the loss is less than two standard errors "
        "lower."
    )
    if result.stability:
        note += (
            " A share of resamples: in more than 1 of 20 of them, drawn of the sensitivities with their standard "
            "errors, another scheme would be taken, so that the choice is not distinguishable from others."
        )
    sure = [_note(f"{budget}, {info.plan}: {info.statement}.") for budget, info in result.stability.items()]
    if len(shown) < len(result.weights):
        note += f" The {len(shown)} weights of {len(result.weights)} with the largest predicted loss are listed."
    content = table("Scheme and predicted loss of every weight", head, rows, len(head))
    return [drawn, *sure, _note(note), f"<details><summary>All weights, one by one</summary>{content}</details>"]


def sensitivity_section(result: Result, drawings: Drawings) -> list[str]:
    """The sensitivity tables and how well the metrics agree."""
    rows = [
        [escape(pair), significant(a.kendall_tau), significant(a.spearman)]
        for pair, a in sorted(result.agreement.items())
    ]
    head = ["metrics", "Kendall's tau", "Spearman's rho"]
    ranks = table("Do the metrics rank (weight, scheme) pairs alike?", head, rows) if rows else ""
    label = "Predicted loss increase of every weight under every scheme, by metric"
    return [figure(drawings["sensitivity"], "sensitivity", label, "Every weight quantized alone."), ranks]


def provenance_section(result: Result, record: Mapping[str, Any] | None) -> list[str]:
    """Model, data, versions and config."""
    sets = [
        [
            escape(name),
            escape(d.source),
            f"<code>{escape(d.digest[:16])}</code>",
            str(d.num_documents),
            str(d.num_outputs),
        ]
        for name, d in sorted(result.data.items())
    ]
    model = {
        "model": result.model.name,
        "task": result.task.name,
        "model digest": result.model.digest,
        "parameters": f"{result.model.parameters:,}",
        "in quantizable weights": f"{result.model.weights:,}",
        "original size": megabytes(result.model.reference_size_bytes),
    }
    parts = [
        definitions(model),
        table("Data", ["set", "source", "digest", "documents", f"{result.task.unit}s"], sets, 3),
    ]
    if result.seconds:
        parts.append(definitions({f"{stage} (s)": significant(s) for stage, s in sorted(result.seconds.items())}))
    if record is None:
        return [*parts, paragraph("No record of the run was given.")]
    brief = {key: record[key] for key in ("command", "commit", "dirty", "python", "platform") if key in record}
    rest = {key: record[key] for key in sorted(record) if key not in brief}
    return [*parts, definitions(brief), f"<details><summary>Full record</summary>{definitions(rest)}</details>"]


def slider_data(result: Result) -> dict[str, Any]:
    """What the page's script reads: frontier points and uniform baselines."""
    frontier = result.frontier
    errors = frontier.best_stderr or (None,) * len(frontier.bits_per_weight)
    chosen = {plan.size_bytes for plan in handed_out_plans(result)}
    kept = {*thin(frontier.bits_per_weight, _MAX_SLIDER_POINTS)}
    kept |= {i for i, size in enumerate(frontier.size_bytes) if size in chosen}
    points = [
        [round(frontier.bits_per_weight[i], 4), frontier.size_bytes[i], frontier.best_kl[i], errors[i]]
        for i in sorted(kept)
    ]
    uniform = [
        [p.name, round(p.bits_per_weight, 4), p.size_bytes, p.kl]
        for p in result.plans
        if p.kind == "uniform" and p.method == result.main_method
    ]
    perplexity = result.task.quality == "perplexity"
    return {"frontier": points, "uniform": uniform, "unit": result.task.unit, "perplexity": perplexity}


def _choice(table_: TableInfo | None, path: str, plan: PlanResult) -> str:
    """The scheme of a weight, its predicted loss in thousandths, and whether more bits would show."""
    scheme = plan.choices[path]
    chip = f'<span class="chip" style="background:{scheme_color(scheme)}"></span>{escape(scheme)}'
    entry = table_.at(path, scheme) if table_ else None
    if table_ is None or entry is None:
        return chip
    loss, error = entry
    shown = with_error(1e3 * loss, None if error is None else 1e3 * error)
    larger = next_scheme_note(table_, path, scheme)
    alike = f' <span class="sub">≈ {escape(larger)}</span>' if larger else ""
    return f'<span class="keep">{chip}{alike}</span><br><span class="sub">{shown}</span>'


def _unsure(result: Result, path: str, plan: PlanResult) -> str:
    """The part of the resamples that take the plan's scheme, if it is not nearly all."""
    shares = [s.share[path] for s in result.stability.values() if s.plan == plan.name and s.share and path in s.unsure]
    return f'<br><span class="sub">taken in {100 * min(shares):.0f} % of resamples</span>' if shares else ""


def _most_sensitive(result: Result, plans: list[PlanResult]) -> list[WeightInfo]:
    """All weights in their order; if they are too many for the page, those that lose most under `plans`."""
    weights, table_ = list(result.weights), result.allocation_table
    if len(weights) <= _MAX_WEIGHT_ROWS:
        return weights

    def loss(weight: WeightInfo) -> float:
        entries = [table_.at(weight.path, plan.choices[weight.path]) for plan in plans] if table_ else []
        return sum(entry[0] for entry in entries if entry)

    kept = {weight.path for weight in sorted(weights, key=loss, reverse=True)[:_MAX_WEIGHT_ROWS]}
    return [weight for weight in weights if weight.path in kept]


def _middle(result: Result) -> int:
    """Where the slider starts: at the plan in the middle of those handed out."""
    plans = handed_out_plans(result)
    wanted = plans[len(plans) // 2].size_bytes if plans else 0
    sizes = [point[1] for point in slider_data(result)["frontier"]]
    return min(range(len(sizes)), key=lambda i: abs(sizes[i] - wanted))


def _note(text: str) -> str:
    return paragraph(text, "note")


def _handed_out(plan: PlanResult, winner: Winner | None) -> str:
    """What the budget ends with: `mixed`, or the uniform scheme that was better on the selection set."""
    if winner is None:
        return "mixed" if plan.handed_out else "not mixed"
    return "mixed" if winner.plan == plan.name else winner.plan
