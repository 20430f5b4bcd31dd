"""`results.json` is checked on loading: what is wrong is named, and keys are those of the task."""

import math
import re
from typing import Any, get_args, get_type_hints

import pytest

from analysis.load import CAUSAL_LM, TaskInfo, load_result, parse_result
from analysis.measures import AGREEMENTS, QUALITIES
from mpq.eval_result import EvalResult
from mpq.files import write_json
from mpq.tasks import TASKS, Custom
from mpq.types import MpqError
from tests.analysis_cases import make_result, parsed


class TestLoading:
    def test_reads_what_it_says(self, tmp_path):
        body = make_result(layers=1)
        write_json(tmp_path / "results.json", body)
        loaded = load_result(tmp_path / "results.json")
        assert loaded.model.weights == body["model"]["weights"]
        assert loaded.plan("mixed@3.5bpw", "rtn").kl == body["plans"][-7]["kl"]
        assert loaded.plans[0].choices == body["plans"][0]["choices"]
        assert loaded.allocation_table is loaded.tables["kl"]
        assert loaded.main_method == "gptq"
        assert loaded.tables["kl"].at("layers.0.mlp.up_proj.kernel", "int4_g64") == (
            body["tables"]["kl"]["loss_increase"][6][2],
            body["tables"]["kl"]["stderr"][6][2],
        )
        assert loaded.tables["kl"].at("layers.0.mlp.up_proj.kernel", "int5_g64") is None
        assert loaded.tables["kl"].at("nowhere", "int4_g64") is None

    def test_optional_and_unknown_fields(self):
        body = make_result(layers=1) | {"later": 1}
        for key in ("reference", "seconds"):
            del body[key]
        del body["frontier"]["predicted_stderr"]
        assert parse_result(body).reference is None

    def test_truncated(self, tmp_path):
        (tmp_path / "results.json").write_text('{"schema": 1, ')
        with pytest.raises(MpqError, match=r"ends too early .*it should be results\.json, as 'mpq run' writes it"):
            load_result(tmp_path / "results.json")

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            ("schema", 2, "schema is 2, this version reads 1: run again"),
            ("model", None, "model is None, not an object"),
            ("model.name", ..., "model.name is missing"),
            ("model.weights", 1.5, "model.weights is 1.5, not a whole number"),
            ("model.weights", 7, "model.weights is not the sum of weights[].size"),
            ("data.test.digest", 5, "data.test.digest is 5, not text"),
            ("data", [], "data is [], not an object"),
            ("frontier.metric", ..., "frontier.metric is missing"),
            ("frontier.size_bytes", [1], "frontier.size_bytes has 1 numbers, bits_per_weight"),
            ("frontier.predicted_kl.0", "x", "frontier.predicted_kl[0] is 'x', not a number"),
            ("frontier.predicted_kl.0", math.nan, "frontier.predicted_kl[0] is nan, not a finite number"),
            ("frontier.bits_per_weight.0", 99.0, "frontier.bits_per_weight is not ascending"),
            ("plans", [], "plans is empty"),
            ("plans", {}, "plans is {}, not a list"),
            ("plans.0", 3, "plans[0] is 3, not an object"),
            ("plans.0.kl", ..., "plans[0].kl is missing"),
            ("plans.0.kl", True, "plans[0].kl is True, not a number"),
            ("plans.0.kind", "both", "plans[0].kind is 'both', not 'mixed' or 'uniform'"),
            ("plans.0.handed_out", 1, "plans[0].handed_out is 1, not true or false"),
            ("plans.1.name", "mixed@3.0bpw", "plans[1].name 'mixed@3.0bpw' occurs twice with method 'gptq'"),
            ("plans.5.scheme", None, "plans[5].scheme is missing: a uniform plan names its scheme"),
            ("plans.0.choices", {}, "plans[0].choices and weights differ in 'embed_tokens.embedding'"),
            ("tables.kl.stderr", [], "tables.kl.stderr has not the shape [8, 5]"),
            ("tables.kl.loss_increase.2", [0.1], "tables.kl.loss_increase has not the shape [8, 5]"),
            ("tables.kl.weights.0", "other", "tables.kl.weights names 'other', which is not in weights"),
            ("comparisons.0.plan", "p", "comparisons[0].plan 'p' is not a plan of this result"),
            ("comparisons.0.baseline", "b", "comparisons[0].baseline 'b' is not a plan of this result with method"),
            ("comparisons.0.kl_difference", None, "comparisons[0].kl_difference is missing though there is a baseline"),
            (
                "comparisons.1.kl_difference",
                0.5,
                "comparisons[1].kl_difference is not KL of 'mixed@int3_g64' less",
            ),
        ],
    )
    def test_a_wrong_field_is_named(self, place, value, message):
        body = make_result(layers=1)
        *parents, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
        target: Any = body
        for part in parents:
            target = target[part]
        if value is ...:
            del target[last]
        else:
            target[last] = value
        with pytest.raises(MpqError, match=re.escape(message)):
            parse_result(body)

    def test_an_empty_frontier(self):
        body = make_result(layers=1)
        body["frontier"] |= {"bits_per_weight": [], "size_bytes": [], "predicted_kl": [], "predicted_stderr": []}
        with pytest.raises(MpqError, match=r"frontier\.bits_per_weight is empty"):
            parse_result(body)

    def test_a_swapped_sign_is_seen(self):
        body = make_result(layers=1)
        body["comparisons"][0]["kl_difference"] *= -1
        with pytest.raises(MpqError, match=r"comparisons\[0\]\.kl_difference is not KL of"):
            parse_result(body)


class TestTasks:
    def test_a_file_that_names_no_task_is_a_causal_language_model(self):
        body = make_result(layers=1)
        del body["task"]
        loaded = parse_result(body)
        assert loaded.task == CAUSAL_LM
        assert loaded.plans[0].quality == body["plans"][0]["perplexity"]

    @pytest.mark.parametrize(
        ("task", "quality", "agreement", "agreement_stderr"),
        [
            ("causal_lm", "perplexity", "top1_agreement", "top1_stderr"),
            ("classification", "accuracy", "top1_agreement", "top1_stderr"),
            ("embedding", "spearman", "cosine", "cosine_stderr"),
            ("regression", "mse", "likeness", "likeness_stderr"),
        ],
    )
    def test_evaluations_are_read_under_the_names_of_the_task(self, task, quality, agreement, agreement_stderr):
        body = make_result(layers=1, task=task)
        loaded = parse_result(body)
        for plan, raw in zip(loaded.plans, body["plans"], strict=True):
            assert (plan.quality, plan.quality_stderr) == (raw[quality], raw[f"{quality}_stderr"])
            assert (plan.agreement, plan.agreement_stderr) == (raw[agreement], raw[agreement_stderr])
            assert plan.nll == raw["nll"]
        assert loaded.reference is not None
        assert loaded.reference.quality == body["reference"][quality]
        assert loaded.has_quality

    def test_without_labels(self):
        loaded = parsed(1, "classification", labels=False)
        assert not loaded.has_quality
        assert {(p.quality, p.nll) for p in loaded.plans} == {(None, None)}
        assert all(p.kl >= 0 and p.agreement > 0 for p in loaded.plans)

    @pytest.mark.parametrize(
        ("changes", "plan_without", "message"),
        [
            ({"quality": "f1"}, None, "task.quality is 'f1', not 'perplexity' or 'accuracy' or"),
            ({"agreement": "bleu"}, None, "task.agreement is 'bleu', not 'top1_agreement' or 'cosine' or 'likeness'"),
            ({"unit": None}, None, "task.unit is None, not text"),
            ({}, "accuracy", "plans[0].accuracy is missing"),
            ({}, "nll", "plans[0].nll is missing"),
            ({}, "top1_agreement", "plans[0].top1_agreement is missing"),
            ({}, "top1_stderr", "plans[0].top1_stderr is missing"),
            ({"quality": "spearman"}, None, "plans[0].spearman is missing"),
        ],
    )
    def test_a_wrong_field_is_named_by_its_key(self, changes, plan_without, message):
        body = make_result(layers=1, task="classification")
        body["task"] |= changes
        body["plans"][0].pop(plan_without, None)
        with pytest.raises(MpqError, match=re.escape(message)):
            parse_result(body)

    def test_a_task_names_all_four(self):
        body = make_result(layers=1, task="classification")
        del body["task"]["unit"]
        with pytest.raises(MpqError, match=r"task\.unit is missing"):
            parse_result(body)

    def test_every_task_of_the_library_can_be_shown(self):
        tasks = [*TASKS.values(), Custom(lambda reference, outputs: ((reference - outputs) ** 2).sum())]
        hints = get_type_hints(TaskInfo)
        assert set(get_args(hints["quality"])) == set(QUALITIES) == {task.quality_name for task in tasks}
        assert set(get_args(hints["agreement"])) == set(AGREEMENTS) == {task.agreement_name for task in tasks}

    @pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
    def test_keys_are_those_that_an_evaluation_writes(self, task):
        names = {"quality_name": task.quality_name, "agreement_name": task.agreement_name}
        numbers = {"quality": 1.5, "quality_stderr": 2.5, "agreement": 3.5, "agreement_stderr": 4.5}
        rest = dict.fromkeys(("nll", "nll_stderr", "kl", "kl_stderr", "num_documents", "num_outputs"), 0)
        written = EvalResult(**names, **numbers, **rest, data_digest="").to_json()
        info = TaskInfo(task.name, task.unit, task.quality_name, task.agreement_name)
        assert {field: written[key] for field, key in info.keys.items()} == numbers
