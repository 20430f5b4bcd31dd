"""The numbers in the paper's prose: a macro each, from the committed results."""

import re
from collections.abc import Iterable, Mapping

from analysis import codebooks, qat, weight_peers
from analysis.activation_tables import judged
from analysis.bakeoff import mean_tau
from analysis.load import PlanResult
from analysis.paper_sources import Sources, only
from analysis.paper_systems import files, kernels
from analysis.paper_tables import peer_results
from analysis.paper_tex import parse
from analysis.text import with_error

Numbers = dict[str, str]


def allocation(sources: Sources) -> Numbers:
    """The reference model, its plans, and the solver."""
    run = sources.run("quickstart")
    plan = lambda name, method=None: _found(run.plan(name, method))
    compared = {(c.method, c.budget): c for c in run.comparisons}
    equal, plain = compared["gptq", "int3_g64"], compared["rtn", "int3_g64"]
    test, stable = run.data["test"], run.stability["3.5bpw"]
    largest = sources.file("bench_allocate")["rows"][3]
    milp = only(sources.file("bench_allocate")["rows"], solver="HiGHS, one budget")
    shape = re.search(r"\((\d+) x (\d+)\)", largest["instance"])
    assert shape, "the instance names its groups and schemes"
    assert milp["exact"] == milp["loss"], "the text says that both find the same optimum"
    kl = lambda found: with_error(found.kl, found.kl_stderr)
    summed = plan("mixed@3.0bpw").predicted_kl or 0.0
    return {
        "RefParameters": f"{run.model.parameters / 1e6:.2f}",
        "RefWeights": str(len(run.weights)),
        "RefGroups": str(len({weight.group for weight in run.weights})),
        "RefPoints": str(len(run.frontier.size_bytes)),
        "TestTokens": f"{test.num_outputs:,}",
        "TestDocuments": str(test.num_documents),
        "MixedKl": kl(plan("mixed@3.5bpw")),
        "MixedPropagatedKl": kl(plan("mixed@3.5bpw", "gptq+propagate")),
        "UniformKl": kl(plan("int3_g64", "gptq")),
        "HeuristicKl": kl(plan("heuristic-int3_g64")),
        "EqualMixedKl": kl(plan("mixed@int3_g64")),
        "EqualLower": _percent(1 - plan("mixed@int3_g64").kl / plan("int3_g64", "gptq").kl),
        "EqualZ": f"{equal.z:.1f}",
        "NearestDifference": with_error(plain.kl_difference, plain.stderr),
        "NearestZ": f"{plain.z:.1f}",
        "UnsureChoices": str(len(stable.unsure)),
        "SumShare": _percent(summed / plan("mixed@3.0bpw").kl),
        "MilpGroups": re.findall(r"\d+", milp["instance"])[0],
        "AllocateGroups": f"{int(shape[1]):,}",
        "AllocateSchemes": shape[2],
        "AllocatePoints": f"{largest['points']:,}",
        "AllocateSeconds": f"{largest['cpu_s']:.1f}",
        **_quadratic(sources),
    }


def _quadratic(sources: Sources) -> Numbers:
    rows = sources.file("quadratic/resnet20_cifar10")["rows"]
    gaps = [row["gap_percent"] for of in sources.folder("quadratic").values() for row in of["rows"]]
    return {
        "GapLargest": f"{max(gaps):.1f}",
        "GapCases": str(len(gaps)),
        "GapClosed": str(sum(gap == 0 for gap in gaps)),
        "GapByPairs": f"{rows[0]['gap_percent_by_pairs']:.0f}",
        "GapByPairsLast": f"{rows[-1]['gap_percent_by_pairs']:,.0f}",
    }


def sensitivity(sources: Sources) -> Numbers:
    """Which metric predicts whole plans, and what it costs."""
    results = sources.folder("bakeoff")
    smooth = [result for name, result in results.items() if not name.startswith("resnet20")]
    ranged = lambda metric, part=None, of=smooth: _range(mean_tau(result, metric, part) for result in of)
    text = [result for name, result in results.items() if name.startswith(("reference", "tiny1m"))]
    convolutional = results["resnet20-gptq"]
    reference = results["reference-gptq"]
    cost = sources.file("bench_sensitivity")
    halves = [band["halves"] for band in convolutional["bands"]]
    pairs = [(mean_tau(of, "kl"), mean_tau(of, "kl+interactions")) for of in results.values()]
    return {
        "BakeMetrics": str(len({name for result in results.values() for name in result["cost"]} - _NO_METRIC)),
        "BakePlans": f"{sum(result['plans'] * len(result['bands']) for result in results.values()):,}",
        "BakeFits": str(reference["fit_plans"]),
        "TauKl": ranged("kl"),
        "TauGaussNewton": ranged("gauss_newton"),
        "TauFisher": ranged("fisher"),
        "TauFisherRefitted": ranged("fisher", "refitted"),
        "TauModelopt": ranged("modelopt_gradient", of=text),
        "TauEmpirical": ranged("empirical_fisher", of=text),
        "TauTrace": ranged("hessian_trace"),
        "TauTraceRefitted": ranged("hessian_trace", "refitted"),
        "TauLayer": ranged("layer_error"),
        "TauLayerRefitted": ranged("layer_error", "refitted"),
        "TauNncf": ranged("nncf"),
        "TauImatrix": ranged("imatrix"),
        "TauFirst": f"{mean_tau(reference, 'first_order'):.2f}",
        "TauConvolution": f"{mean_tau(convolutional, 'kl'):.2f}",
        "TauConvolutionHalves": f"{sum(halves) / len(halves):.2f}",
        "InteractionsBetter": str(sum(together > alone for alone, together in pairs if alone and together)),
        "InteractionsCases": str(sum(None not in pair for pair in pairs)),
        "CostKl": f"{reference['cost']['kl']:.0f}",
        "CostGaussNewton": f"{reference['cost']['gauss_newton']:.0f}",
        "CostFisher": f"{reference['cost']['fisher']:.0f}",
        "FisherGradients": f"{cost['fisher_over_gradient']:.1f}",
        **_surrogates(sources),
    }


def _surrogates(sources: Sources) -> Numbers:
    """Plans of few bits: sums, a corrected table and a surrogate, of Fisher scores and the most plans."""
    bands = {name: only(result["bands"], bits=[2, 4]) for name, result in sources.folder("surrogate").items()}
    convolutional, encoder = bands["resnet20-rtn_mse-corrected"], bands["minilm-rtn-640"]
    few = [bands[name]["metrics"]["fisher"] for name in ("reference-rtn", "tiny1m-gptq", "tiny1m-rtn")]
    of_encoder, by_gptq = encoder["metrics"]["kl"], bands["minilm-gptq"]["metrics"]["kl"]
    few_rows = by_gptq["by_rows"][0]
    alone = convolutional["metrics"]["alone"]
    most = [of["fitted"][-1] for of in few]
    assert len({fitted["plans"] for fitted in most}) == 1, "the text names one number of plans"
    ranged = lambda name: _range(fitted[name]["tau"] for fitted in most)
    return {
        "SurrogatePlans": str(most[0]["plans"]),
        "SurrogateSum": _range(of["sum"]["tau"] for of in few),
        "SurrogateRefit": ranged("refit"),
        "SurrogateTau": ranged("surrogate"),
        "SurrogateWithin": f"{_range((100 * fitted['surrogate']['within'] for fitted in most), 0)} %",
        "EncoderPlans": str(of_encoder["fitted"][-1]["plans"]),
        "EncoderSum": f"{of_encoder['sum']['tau']:.2f}",
        "EncoderTau": f"{of_encoder['fitted'][-1]['surrogate']['tau']:.2f}",
        "EncoderGptqSum": f"{by_gptq['sum']['tau']:.2f}",
        "EncoderGptqTau": f"{by_gptq['fitted'][-1]['surrogate']['tau']:.2f}",
        "EncoderGptqPlans": str(by_gptq["fitted"][-1]["plans"]),
        "EncoderRows": str(sources.file("surrogate/minilm-gptq")["rows"][0]),
        "EncoderFewRows": str(few_rows["rows"]),
        "EncoderFewTau": f"{few_rows['surrogate']['tau']:.2f}",
        "CorrectedSum": f"{alone['sum']['tau']:.2f}",
        "CorrectedUnseen": f"{convolutional['metrics']['kl']['sum']['tau']:.2f}",
        "CorrectedTau": f"{alone['fitted'][-1]['surrogate']['tau']:.2f}",
        "CorrectedPlans": str(alone["fitted"][-1]["plans"]),
        "CorrectedHalves": f"{convolutional['halves']:.2f}",
    }


_NO_METRIC = {"kl+interactions", "marginal"}
"""Predictors in the comparison that are no metric of a single weight."""


def making(sources: Sources) -> Numbers:
    """Rounding algorithms, learned levels, distillation, and other tools."""
    rows = sources.file("rounding/tiny1m")["rows"]
    kl = lambda algorithm, scheme: only(rows, algorithm=algorithm, scheme=scheme, part="all")["kl"]
    ingredients = sources.file("distillation/tiny1m")["rows"]
    step = lambda name: only(ingredients, ingredient=name, budget=2.5)
    shares = [kl("qep", scheme) / kl("gptq", scheme) for scheme in ("int2_g32", "int3_g32", "int4_g32")]
    learned = [float(share) for share in re.findall(r", (\d+) %", _learned(sources))]
    return {
        "QepShares": _percents(shares),
        "AdaroundShares": _percents(kl("adaround", f"int{b}_g32") / kl("gptq", f"int{b}_g32") for b in (2, 3, 4)),
        "LearnedShares": f"{min(learned):.0f}–{max(learned):.0f} %",
        "StepUniform": with_error(step("uniform")["kl"], step("uniform")["kl_stderr"]),
        "StepDistilled": with_error(step("propagated_varied")["kl"], step("propagated_varied")["kl_stderr"]),
        "StepTimes": f"{step('uniform')['kl'] / step('propagated_varied')['kl']:.1f}",
        **_trellis(sources),
        **_peers(sources),
        **_training(sources),
    }


def _learned(sources: Sources) -> str:
    return "".join(codebooks.rounding(sources.file(f"codebooks/{model}"), "all") for model in ("reference", "tiny1m"))


def _peers(sources: Sources) -> Numbers:
    """Budgets at which there is a peer, and at how many of them some ingredient halves its excess."""
    found: dict[str, dict[str, list[str]]] = {}
    rounded: dict[tuple[str, str], list[str]] = {}
    for model, result in peer_results(sources).items():
        for row in parse(weight_peers.goals(result)).rows:
            assert row[-1] != "yes" or model == "stories260k" or "distilled" in row[6] or "trellis" in row[6], (
                "the text says: without a trellis, not without training"
            )
            if "no peer" not in row[-1]:
                found.setdefault(model, {}).setdefault(row[0], []).append(row[-1])
                if "distilled" not in row[6]:
                    rounded.setdefault((model, row[0]), []).append(row[-1])
    halved = {model: ["yes" in words for words in of.values()] for model, of in found.items()}
    own = next(row for row in peer_results(sources)["reference"]["rows"] if row.get("ingredient") == "learned_written")
    best = weight_peers.best_peer(peer_results(sources)["reference"], own["budget"])
    assert best is not None, "there is a peer of this size"
    return {
        "PeerGoal": _percent(weight_peers.GOAL),
        "PeerCases": str(sum(map(len, halved.values()))),
        "PeerHalved": str(sum(map(sum, halved.values()))),
        "PeerRounded": str(sum("yes" in words for words in rounded.values())),
        "PeerTrellis": ", ".join(f"{ratio:.2f}" for ratio in _trellis_ratios(sources)),
        "PeerReference": str(len(halved["reference"])),
        "PeerReferenceHalved": str(sum(halved["reference"])),
        "PeerMissed": f"{own['budget']:g}",
        "PeerMissedRatio": f"{own['test']['excess'] / best['test']['excess']:.2f}",
    }


def _trellis_ratios(sources: Sources) -> list[float]:
    """KL of the reference model's plans with codes along a trellis over that of the best peer, sizes ascending."""
    rows = parse(weight_peers.goals(peer_results(sources)["reference"])).rows
    what = weight_peers.INGREDIENTS["trellis"]
    return [float(row[12]) for row in rows if row[6] == what and "no peer" not in row[-1]]


def _trellis(sources: Sources) -> Numbers:
    """What codes along a trellis leave of normal values, and of the KL of the best fixed table of their width."""
    widths = sources.file("codebooks/normal")["widths"]
    above = lambda name: [codebooks.above_bound(row, name) for row in widths]
    found = codebooks.merged(list(sources.folder("codebooks").values()))
    shares = []
    for result in found:
        for row in parse(codebooks.rounding(result, "blocks")).rows:
            if row[0].startswith("`tcq") and "channel" in row[0]:
                shares += [float(share) for cell in row[2:] for share in re.findall(r", (\d+) %", cell)]
    span = lambda values: f"{min(values):.1f}–{max(values):.1f}"
    return {
        "TrellisAbove": span(above("own")),
        "LevelsAbove": span(above("levels")),
        "TrellisShares": f"{min(shares):.0f}–{max(shares):.0f} %",
    }


def _training(sources: Sources) -> Numbers:
    reference, images = sources.file("qat/reference"), sources.file("qat/resnet20_cifar10")
    recovered = lambda result, plan: [_percent(share or 0.0) for share in qat.recovered(result, plan)]
    gradient = sources.file("bit_search/stories260k")["rows"]
    above = lambda budget: only(gradient, method="fisher", budget=budget)
    return {
        "QatReference": recovered(reference, "2.5 bpw")[1],
        "QatImages": recovered(images, "W2A4")[1],
        "QatImagesPlain": recovered(images, "W2A4")[0],
        "QatNothing": recovered(images, "2.5 bpw")[1],
        "SearchLow": f"{above(2.75)['budget']:g}",
        "SearchHigh": f"{above(3.5)['budget']:g}",
        "SearchAbove": with_error(above(2.75)["above_gradient"], above(2.75)["above_gradient_stderr"]),
        "SearchAboveHigh": with_error(above(3.5)["above_gradient"], above(3.5)["above_gradient_stderr"]),
        "SearchTimes": f"{only(gradient, method='gradient', budget=2.75)['seconds'] / above(2.75)['seconds']:.0f}",
    }


def rounded(sources: Sources) -> Numbers:
    """Rounded activations."""
    texts = sources.folder("activations")
    change = lambda model, setting: only(texts[model]["rows"], setting=setting)["test"]["change_percent"]
    held = []
    for _, found, limit, unit in judged(list(texts.values()), list(sources.folder("activations/images").values())):
        held.append(max(change if unit == "%" else -change for _, change in found) <= limit)
    worst = change("tiny1m", "W8A8 static, MSE")
    return {
        "AskedModels": str(len(held)),
        "AskedHolds": str(sum(held)),
        "DynamicChange": f"{change('reference', 'W8A8 dynamic'):+.2f} %",
        "StaticWorst": f"{worst:+.1f} %",
        "StaticOnline": f"{change('tiny1m', 'W8A8 static, MSE, online'):+.2f} %",
        **_beside(sources),
        **_outliers(sources),
        "FourBits": f"{change('reference', 'W4g32A4 dynamic'):+.1f} %",
        "FourBitsOnline": f"{change('reference', 'W4g32A4 dynamic, online'):+.1f} %",
        "FourBitsBest": f"{change('reference', 'W4g32A4 dynamic, groups, online'):+.1f} %",
        "FourBitsBestTiny": f"{change('tiny1m', 'W4g32A4 dynamic, groups, online'):+.1f} %",
    }


def _beside(sources: Sources) -> Numbers:
    """Other libraries' rounded activations, corrected convolutions, and the time on packed kernels."""
    theirs = sources.file("activations/peers/tiny1m")["rows"]
    smooth = only(theirs, peer="ModelOpt W8A8 static, SmoothQuant")
    kl = lambda of: with_error(of["kl"], of["kl_stderr"])
    worse = [name for row in theirs for name, of in row["ours"].items() if of["kl"] > row["theirs"]["kl"]]
    assert worse == ["W8A8 static, MSE, smoothed"], "the text says: with this exception"
    images = sources.file("corrections/resnet20_cifar10")["rows"]
    plain = only(images, plan="W4A4 static", method="gptq", correction="none")
    corrected = only(images, plan="W4A4 static", method="gptq", correction="biases and norms")
    times = {}
    for name, of in sources.folder("activations/cost").items():
        times[name] = [row["seconds"] / of["rows"][0]["seconds"] for row in of["rows"][1:]]
    return {
        "SmoothTheirs": kl(smooth["theirs"]),
        "SmoothOurs": kl(smooth["ours"]["W8A8 static, MSE, smoothed"]),
        "SmoothOnline": kl(smooth["ours"]["W8A8 static, MSE, smoothed, online"]),
        "CorrectedFrom": kl(plain),
        "CorrectedTo": kl(corrected),
        "PackedText": f"{min(times['reference']):.2f}–{max(times['reference']):.2f}",
        "PackedImages": f"{min(times['resnet20_cifar10']):.1f}–{max(times['resnet20_cifar10']):.1f}",
    }


def _outliers(sources: Sources) -> Numbers:
    """LLM.int8 on dynamic W8A8, and rotation instead of it."""
    of = lambda file, setting: only(sources.file(file)["rows"], setting=setting)["test"]
    plain, apart = (of("outliers/tiny1m", f"W8A8 dynamic{more}") for more in ("", ", outliers apart"))
    turned = of("activations/tiny1m", "W8A8 dynamic, online")
    assert turned["kl"] < apart["kl"] < plain["kl"], "the text says: in this order"
    names = {"OutliersIn": plain, "OutliersApart": apart, "OutliersTurned": turned}
    return {name: with_error(found["kl"], found["kl_stderr"]) for name, found in names.items()}


def _found(plan: PlanResult | None) -> PlanResult:
    assert plan is not None, "the run has the plans that the text is about"
    return plan


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _percents(shares: Iterable[float]) -> str:
    *first, last = [f"{100 * share:.0f}" for share in shares]
    return f"{', '.join(first)} and {last} %"


def _range(values: Iterable[float | None], decimals: int = 2) -> str:
    known = [value for value in values if value is not None]
    low, high = f"{min(known):.{decimals}f}", f"{max(known):.{decimals}f}"
    return low if low == high else f"{low}–{high}"


def numbers(sources: Sources) -> Mapping[str, str]:
    """All macros, by name."""
    recorded, total = sources.recorded()
    return {"RecordFiles": str(recorded), "RecordTotal": str(total)} | {
        name: text
        for part in (allocation, sensitivity, making, rounded, kernels, files)
        for name, text in part(sources).items()
    }
