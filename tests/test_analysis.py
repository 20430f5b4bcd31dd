"""Figures and report: drawn from a made-up run of plausible numbers, the same twice, escaped, checked on loading."""

import ast
import dataclasses
import html.parser
import itertools
import json
import math
import re
import struct
import sys
import xml.etree.ElementTree
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from analysis import html as html_pieces
from analysis import report
from analysis import sections as report_sections
from analysis.__main__ import main
from analysis.allocation import draw_allocation, draw_sensitivity, scheme_color
from analysis.axes import round_ticks
from analysis.figure import render, style
from analysis.findings import headline, next_scheme_note, verdict
from analysis.load import Comparison, TableInfo, Winner, load_result, parse_result
from analysis.measured import draw_agreement, draw_perplexity
from analysis.pareto import draw_frontier, draw_prediction
from analysis.report import FIGURES, draw, report_html, write_report
from analysis.sections import mixing_section
from analysis.text import code_width, effective_bits, layer_and_role, megabytes, significant, thin, with_error
from mpq.files import write_json
from mpq.types import MpqError

RECORD = {"schema": 1, "command": "mpq run quick.py", "commit": None, "config": {"name": "quick"}, "python": "3.11"}
SCHEMES = ("int2_g64", "int3_g64", "int4_g64", "int8_channel", "bf16")
ROLES = {
    "attention.q_proj": (256, 256, "attention_in"),
    "attention.k_proj": (256, 128, "attention_in"),
    "attention.v_proj": (256, 128, "attention_in"),
    "attention.o_proj": (256, 256, "attention_out"),
    "mlp.gate_proj": (256, 768, "mlp_in"),
    "mlp.up_proj": (256, 768, "mlp_in"),
    "mlp.down_proj": (768, 256, "mlp_out"),
}
OTHER_BYTES = 30_000
BUDGETS = {"3.0bpw": 3.0, "int3_g64": 3.25, "3.5bpw": 3.5, "int4_g64": 4.25}


def bits_of(scheme: str, k: int) -> float:
    return {"int2_g64": 2.25, "int3_g64": 3.25, "int4_g64": 4.25, "int8_channel": 8 + 16 / k, "bf16": 16.0}[scheme]


def make_weights(layers: int) -> list[dict[str, Any]]:
    weights = [{"path": "embed_tokens.embedding", "group": "embed", "k": 256, "n": 4096, "kind": "embedding+matmul"}]
    for layer in range(layers):
        for role, (k, n, group) in ROLES.items():
            path = f"layers.{layer}.{role}.kernel"
            weights.append({"path": path, "group": f"layers.{layer}.{group}", "k": k, "n": n, "kind": "matmul"})
    return [{**w, "macs": 2048 * w["k"] * w["n"], "size": w["k"] * w["n"]} for w in weights]


def make_tables(weights: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Loss falls four-fold a bit; groups differ by a log-normal factor; metrics differ by noise."""
    factor = {w["group"]: rng.lognormal(0, 1.1) for w in weights}
    base = np.array([[0.0 if s == "bf16" else 4.0 ** -bits_of(s, 512) for s in SCHEMES] for _ in weights])
    rows = np.array([0.05 * factor[w["group"]] * math.sqrt(w["size"] / 65536) for w in weights])
    tables = {}
    for metric, noise in {"kl": 0.05, "fisher": 0.35, "hessian_trace": 0.7}.items():
        loss = base * rows[:, None] * rng.lognormal(0, noise, base.shape)
        stderr = 0.06 * loss + 2e-6 * (base > 0)
        if metric == "kl" and len(loss) > 3:  # a measured increase may come out below zero
            loss[3, 3] = -1e-6
        tables[metric] = {
            "metric": f"{metric}(windows=8)",
            "weights": [w["path"] for w in weights],
            "schemes": list(SCHEMES),
            "loss_increase": loss.tolist(),
            "stderr": stderr.tolist(),
        }
    return tables


def hull(weights: list[dict[str, Any]], loss: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """(bits, loss, column of every weight) of the plans that some price of a bit selects, ascending."""
    bits = np.array([[w["size"] * bits_of(s, w["k"]) for s in SCHEMES] for w in weights])
    points: dict[float, tuple[float, float, np.ndarray]] = {}
    for price in np.geomspace(1e-14, 1e-5, 1200):
        choice = np.argmin(loss + price * bits, axis=1)
        rows = np.arange(len(weights))
        points[float(bits[rows, choice].sum())] = (bits[rows, choice].sum(), loss[rows, choice].sum(), choice)
    return [points[size] for size in sorted(points)]


def make_result(layers: int = 8, seed: int = 0) -> dict[str, Any]:
    """A result such as `mpq.results` writes: every key, with numbers of the size that a small language model gives."""
    rng = np.random.default_rng(seed)
    weights = make_weights(layers)
    values = sum(w["size"] for w in weights)
    tables = make_tables(weights, rng)
    loss, stderr = (np.array(tables["kl"][key]) for key in ("loss_increase", "stderr"))
    points = hull(weights, loss)
    rows = np.arange(len(weights))
    columns = {}
    for budget, bpw in BUDGETS.items():
        fitting = [point for point in points if point[0] <= bpw * values]
        columns[f"mixed@{budget}"] = max(fitting, key=lambda point: point[0])[2]
    columns |= {s: np.full(len(weights), i) for i, s in enumerate(SCHEMES)}
    plans, comparisons = [], []
    for method, worse in {"gptq": 1.12, "rtn": 1.9}.items():
        for name, choice in columns.items():
            size = sum(w["size"] * bits_of(SCHEMES[c], w["k"]) for w, c in zip(weights, choice, strict=True))
            kl = (
                worse
                * float(np.maximum(loss, 0)[rows, choice].sum())
                * (1 if name == "bf16" else rng.lognormal(0, 0.05))
            )
            plans.append(
                {
                    "name": name,
                    "kind": "mixed" if name.startswith("mixed") else "uniform",
                    "scheme": None if name.startswith("mixed") else name,
                    "method": method,
                    "handed_out": method == "gptq" and name.startswith("mixed"),
                    "predicted_kl": float(loss[rows, choice].sum()),
                    "predicted_stderr": float(np.sqrt((stderr[rows, choice] ** 2).sum())),
                    "perplexity": 7.9 * math.exp(kl),
                    "nll": math.log(7.9) + kl,
                    "nll_stderr": 0.031,
                    "kl": kl,
                    "kl_stderr": 0.05 * kl,
                    "top1_agreement": math.exp(-1.4 * math.sqrt(kl)),
                    "top1_stderr": 0.004,
                    "num_documents": 24,
                    "num_tokens": 16320,
                    "size_bytes": int(size) // 8 + OTHER_BYTES,
                    "bits_per_weight": size / values,
                    "choices": {w["path"]: SCHEMES[c] for w, c in zip(weights, choice, strict=True)},
                }
            )
    by_name = {p["name"]: p for p in plans if p["method"] == "gptq"}
    for budget, bpw in BUDGETS.items():
        plan = by_name[f"mixed@{budget}"]
        baseline = min((by_name[s] for s in SCHEMES if by_name[s]["bits_per_weight"] <= bpw), key=lambda p: p["kl"])
        difference, error = plan["kl"] - baseline["kl"], 0.04 * baseline["kl"]
        comparisons.append(
            {
                "budget": budget,
                "plan": plan["name"],
                "method": "gptq",
                "bits_per_weight": plan["bits_per_weight"],
                "baseline": baseline["name"],
                "kl_difference": difference,
                "stderr": error,
                "z": difference / error,
            }
        )
    return {
        "schema": 1,
        "name": "quickstart",
        "model": {
            "name": "reference",
            "digest": "5f" * 32,
            "parameters": values + 17 * 256,
            "weights": values,
            "reference_size_bytes": 2 * values + OTHER_BYTES,
        },
        "data": {
            name: {"source": f"reference ({name})", "digest": digest * 32, "num_documents": 24, "num_tokens": 16320}
            for name, digest in {"calibration": "a1", "selection": "b2", "test": "c3"}.items()
        },
        "reference": {"perplexity": 7.9, "nll": math.log(7.9), "nll_stderr": 0.03, "kl": 0.0, "kl_stderr": 0.0},
        "frontier": {
            "metric": "kl(windows=8)",
            "bits_per_weight": [p[0] / values for p in points],
            "size_bytes": [int(p[0]) // 8 + OTHER_BYTES for p in points],
            "predicted_kl": [float(p[1]) for p in points],
            "predicted_stderr": [float(np.sqrt((stderr[rows, p[2]] ** 2).sum())) for p in points],
        },
        "plans": plans,
        "comparisons": comparisons,
        "tables": tables,
        "weights": weights,
        "agreement": {"fisher vs kl": {"kendall_tau": 0.81, "spearman": 0.95}},
        "seconds": {"trace": 0.4, "calibrate": 6.1, "sensitivity kl": 48.0},
    }


@pytest.fixture(scope="module")
def result():
    return parse_result(make_result())


@pytest.fixture(scope="module")
def drawings(result):
    return draw(result)


@pytest.fixture(scope="module")
def page(result, drawings):
    return report_html(result, RECORD, drawings)


@pytest.fixture(scope="module")
def small():
    return parse_result(make_result(layers=1))


@pytest.fixture(scope="module")
def small_drawings(small):
    return draw(small)


class PageReader(html.parser.HTMLParser):
    """What a browser sees of a page: text, and which elements refer to what."""

    VOID = frozenset({"meta", "input", "br", "img", "link"})

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.text = ""
        self.data = ""
        self.scroll_without_focus = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [attributes[name] for name in ("href", "src", "xlink:href") if attributes.get(name)]
        if attributes.get("class") == "scroll" and attributes.get("tabindex") != "0":
            self.scroll_without_focus += 1

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.data = self.data or data
        elif "style" not in self.open:
            self.text += data


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


class TestText:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0312, "0.0312"),
            (12.345, "12.3"),
            (9.999, "10.0"),
            (1234567, "1230000"),
            (0.000123, "0.000123"),
            (4.1e-6, "4.10e-6"),
            (-0.5, "−0.500"),
            (0, "0"),
            (None, "–"),
            (math.nan, "–"),
            (math.inf, "–"),
        ],
    )
    def test_significant(self, value, text):
        assert significant(value) == text

    @pytest.mark.parametrize(
        ("value", "error", "text"),
        [
            (0.03123, 0.00212, "0.0312 ± 0.0021"),
            (-0.0312, 0.0104, "−0.031 ± 0.010"),
            (123.4, 12.0, "123 ± 12"),
            (12345.0, 678.0, "12345 ± 678"),
            (1.0, 0.0996, "1.00 ± 0.10"),  # the error rounds up into the next decade
            (-0.0001, 0.1, "0.00 ± 0.10"),  # no minus zero
            (-3.2e-8, 1.1e-8, "−3.2e-8 ± 1.1e-8"),
            (0.5, None, "0.500"),
            (0.5, 0.0, "0.500"),
            (None, 0.1, "–"),
        ],
    )
    def test_with_error(self, value, error, text):
        assert with_error(value, error) == text

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("layers.3.mlp.up_proj.kernel", (3, "mlp.up_proj")),
            ("layers.mlp.up_proj.kernel[3]", (3, "mlp.up_proj")),
            ("layers.mlp.experts.kernel[3, 1]", (1, "mlp.experts")),
            ("model/layers/12/attn/q/weight", (12, "attn.q")),
            ("embed_tokens.embedding", (None, "embed_tokens")),
            ("kernel", (None, "kernel")),
        ],
    )
    def test_layer_and_role(self, path, expected):
        assert layer_and_role(path) == expected

    @pytest.mark.parametrize(
        ("scheme", "width", "effective"),
        [
            ("int3_g64", 3, 3.25),
            ("int4_g32_zp", 4, 4.625),
            ("nf4_g64", 4, 4.25),
            ("int8_channel", 8, 8.0),
            ("bf16", 16, 16.0),
            ("q4_k", 4, 4.0),
            ("strange", 0, 0.0),
        ],
    )
    def test_schemes(self, scheme, width, effective):
        assert (code_width(scheme), effective_bits(scheme)) == (width, effective)

    def test_megabytes(self):
        assert (megabytes(4_056_000), megabytes(812_300)) == ("4.06 MB", "812 kB")

    @given(st.lists(st.floats(0, 100), min_size=1, max_size=60).map(sorted), st.integers(3, 40))
    def test_thinning_keeps_both_ends_and_the_limit(self, values, limit):
        kept = thin(values, limit)
        assert kept == sorted(set(kept))
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
        assert len(kept) <= max(limit, 1) or len(values) <= limit
        assert len(kept) == len(values) or len(values) > limit

    @given(st.floats(1e-6, 1e6), st.floats(1.3, 1e7))
    def test_ticks_are_few_inside_and_ascending(self, low, ratio):
        ticks = round_ticks(low, low * ratio)
        assert len(ticks) <= 9
        assert ticks == sorted(ticks)
        # Equal steps are multiples of a step; one may miss an end by a rounding.
        assert all(low * (1 - 1e-12) <= tick <= low * ratio * (1 + 1e-12) for tick in ticks)
        assert len(ticks) >= 2 or ratio < 2.6 or ratio > 4


class TestFindings:
    def compare(self, **changes):
        return dataclasses.replace(Comparison("p", "b", 3.0, -0.1, 0.01, -10.0), **changes)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({}, "better"),
            ({"z": 2.0}, "worse"),
            ({"z": -1.99}, "no difference shown"),
            ({"z": None}, "error unknown"),
            ({"baseline": None}, "no baseline fits"),
        ],
    )
    def test_verdict_at_two_standard_errors(self, changes, word):
        assert verdict(self.compare(**changes)) == word

    def test_headline_speaks_of_the_middle_budget(self, result):
        plan, baseline = result.plan("mixed@3.5bpw", "gptq"), result.plan("int3_g64", "gptq")
        text = headline(result)
        assert f"At {plan.bits_per_weight:.2f} bits per weight" in text
        assert f"loses {with_error(plan.kl, plan.kl_stderr)} nats per token" in text
        assert f"int3_g64, loses {with_error(baseline.kl, baseline.kl_stderr)}. Mixing is better by" in text

    @pytest.mark.parametrize(
        ("z", "words"), [(5.0, "Mixing is worse by"), (0.5, "none is shown"), (None, "standard error is not known")]
    )
    def test_headline_is_honest(self, result, z, words):
        changed = tuple(dataclasses.replace(c, z=z) for c in result.comparisons)
        assert words in headline(dataclasses.replace(result, comparisons=changed))

    def test_headline_without_a_baseline(self, result):
        text = headline(dataclasses.replace(result, comparisons=()))
        assert "mixed@3.0bpw loses 0.0983 ± 0.0049" in text
        assert "no uniform scheme fits" in text

    @pytest.mark.parametrize(
        ("losses", "errors", "scheme", "expected"),
        [
            ((0.10, 0.05), (0.01, 0.01), "int3_g64", None),  # falls by 3.5 errors
            ((0.10, 0.08), (0.01, 0.01), "int3_g64", "int4_g64"),  # by 1.4
            ((0.10, 0.12), (0.0, 0.0), "int3_g64", "int4_g64"),  # more bits are predicted to lose more
            ((0.10, 0.05), (None, None), "int3_g64", None),
            ((0.10, 0.05), (0.01, 0.01), "int4_g64", None),  # there is none larger
            ((0.10, 0.05), (0.01, 0.01), "int9_g64", None),
        ],
    )
    def test_next_scheme(self, losses, errors, scheme, expected):
        # Columns in the order of the table, which need not be that of the sizes.
        table = TableInfo(("w",), ("int4_g64", "int3_g64"), (losses[::-1],), (errors[::-1],))
        assert next_scheme_note(table, "w", scheme) == expected


class TestFigures:
    @pytest.mark.parametrize("name", FIGURES)
    def test_same_bytes_twice_and_whatever_the_users_own_style(self, small, small_drawings, name):
        first = small_drawings[name]
        with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
            assert render(lambda: FIGURES[name](small)) == first
        assert first.png.startswith(b"\x89PNG")
        assert xml.etree.ElementTree.fromstring(first.svg).tag.endswith("svg")
        for volatile in (b"Matplotlib v", b"<dc:date>", b"Software"):
            assert volatile not in first.svg
            assert volatile not in first.png

    def test_bitmap_is_wide_enough_to_read(self, drawings):
        width, height = struct.unpack(">II", drawings["frontier"].png[16:24])
        assert width >= 1200
        assert 0.4 < height / width < 0.8

    def test_frontier_shows_every_point_where_it_belongs(self, result):
        with style():
            figure = FIGURES["frontier"](result)
        whole, near = figure.axes[:2]
        drawn = [p for p in result.plans if p.kl > 0]
        for ax in (whole, near):
            points = {tuple(xy) for line in ax.lines if line.get_marker() in "os" for xy in line.get_xydata()}
            assert points == {(p.bits_per_weight, p.kl) for p in drawn}
            curve = next(line for line in ax.lines if line.get_label() == "predicted frontier").get_xydata()
            exact = dict(zip(result.frontier.bits_per_weight, result.frontier.predicted_kl, strict=True))
            assert all(exact[x] == y for x, y in curve)
        for p in drawn:
            assert whole.get_xlim()[0] < p.bits_per_weight < whole.get_xlim()[1]
            assert whole.get_ylim()[0] < p.kl < whole.get_ylim()[1]
            if p.kind == "mixed":
                assert near.get_xlim()[0] < p.bits_per_weight < near.get_xlim()[1]
        texts = {text.get_text() for text in whole.texts}
        assert {"int2_g64", "int3_g64", "int4_g64", "int8_channel"} <= texts
        assert any("14.71 MB at KL 0" in text and "not above 0 either: bf16" in text for text in texts)

    def test_error_bars_are_two_standard_errors(self, result):
        with style():
            ax = FIGURES["frontier"](result).axes[0]
        bars = {}
        for container in ax.containers:
            for x, segment in zip(
                container[0].get_xdata(), container[2][0].get_segments() if container[2] else (), strict=False
            ):
                bars[container.get_label(), x] = segment[:, 1]
        plan = result.plan("mixed@3.0bpw", "gptq")
        low, high = bars["mixed, GPTQ", plan.bits_per_weight]
        np.testing.assert_allclose([low, high], [plan.kl - 2 * plan.kl_stderr, plan.kl + 2 * plan.kl_stderr])

    def test_the_upper_axis_is_the_size_of_the_whole_model(self, result):
        with style():
            ax = FIGURES["frontier"](result).axes[0]
        [top] = [child for child in ax.child_axes if child.get_xlabel() == "size of the whole model (MB)"]
        ax.figure.draw_without_rendering()
        for plan in result.plans:
            # Sizes are whole bytes: half a millionth of a megabyte for each of two roundings.
            pixel = ax.transData.transform((plan.bits_per_weight, 1))[0]
            shown = top.transData.inverted().transform((pixel, 0))[0]
            assert abs(shown - plan.size_bytes / 1e6) < 2e-6

    def test_labels_do_not_lie_on_each_other(self, result):
        with style():
            figure = FIGURES["frontier"](result)
            figure.draw_without_rendering()
            for ax in figure.axes:
                boxes = [text.get_window_extent() for text in ax.texts if isinstance(text, Annotation)]
                assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))

    def test_perplexity_beyond_the_axis_is_written(self):
        body = make_result(layers=1)
        rtn = next(p for p in body["plans"] if (p["name"], p["method"]) == ("int2_g64", "rtn"))
        rtn["perplexity"] = 5432.1
        with style():
            ax = FIGURES["perplexity"](parse_result(body)).axes[0]
        drawn = {y for line in ax.lines if line.get_marker() in "os" for y in line.get_ydata()}
        assert drawn == {p["perplexity"] for p in body["plans"]} - {5432.1}
        assert "above: int2_g64 RTN (5430)" in {text.get_text() for text in ax.texts}

    def test_allocation_has_a_cell_for_every_weight_in_its_schemes_colour(self, result):
        with style():
            axes = FIGURES["allocation"](result).axes
        plans = [p for p in result.plans if p.handed_out]
        assert len(axes) == len(plans)
        for ax, plan in zip(axes, sorted(plans, key=lambda p: p.bits_per_weight), strict=True):
            cells = {(p.get_x(), p.get_y(), p.get_width()): to_hex(p.get_facecolor()) for p in ax.patches}
            assert len(cells) == len(result.weights)
            roles = list(ROLES)
            for path, scheme in plan.choices.items():
                if path == "embed_tokens.embedding":
                    place = (-0.5, -0.5, len(roles))  # a whole row above the layers
                else:
                    _, layer, role = path.removesuffix(".kernel").split(".", 2)
                    place = (roles.index(role) - 0.5, int(layer) + 0.5, 1)
                assert cells[place] == scheme_color(scheme)

    def test_schemes_of_other_widths_have_other_colours(self):
        schemes = ("int2_g64", "int3_g64", "int4_g64", "int6_g64", "int8_channel", "bf16", "strange")
        assert len({scheme_color(s) for s in schemes}) == len(schemes)
        assert scheme_color("int4_g64") == scheme_color("nf4_g128")

    def test_heat_map_hides_what_is_not_above_zero_and_marks_noise(self, result):
        with style():
            ax = FIGURES["sensitivity"](result).axes[0]
        assert ax.get_title(loc="left") == "kl"  # the metric that allocates comes first
        shown = ax.images[0].get_array()
        values, errors = (np.array(getattr(result.tables["kl"], f)) for f in ("loss_increase", "stderr"))
        np.testing.assert_array_equal(shown.mask, values <= 0)
        np.testing.assert_array_equal(shown.filled(0), np.where(values > 0, values, 0))
        dots = {(int(y), int(x)) for x, y in ax.lines[0].get_xydata()}
        assert dots == set(map(tuple, np.argwhere((values > 0) & (values < 2 * errors)).tolist()))

    def test_odd_results_are_drawn(self):
        """One plan, no baseline, nothing above zero, no errors, a model of one weight, perplexity that overflowed."""
        body = make_result(layers=0)
        body["plans"] = [{**body["plans"][0], "kl": 0.0, "kl_stderr": None, "perplexity": None, "predicted_kl": None}]
        body["comparisons"], body["agreement"], body["data"] = [], {}, {}
        body["reference"] = None
        for table in body["tables"].values():
            table["loss_increase"], table["stderr"] = [[0.0] * 5], [[None] * 5]
        page = report_html(parse_result(body), None, draw(parse_result(body)))
        assert "no table has a loss increase above zero" in page

    def test_roles_too_many_for_names(self):
        """A convolutional network: every layer has its own role."""
        body = make_result(layers=0)
        [weight] = body["weights"]
        body["weights"] = [{**weight, "path": f"stage.{i}.conv{i}.kernel"} for i in range(24)]
        paths = [w["path"] for w in body["weights"]]
        body["model"]["weights"] = 24 * weight["size"]
        for plan in body["plans"]:
            plan["choices"] = dict.fromkeys(paths, "int4_g64")
        for table in body["tables"].values():
            table |= {key: table[key] * 24 for key in ("loss_increase", "stderr")} | {"weights": paths}
        with style():
            ax = FIGURES["allocation"](parse_result(body)).axes[0]
        assert len(ax.patches) == 24
        assert not ax.texts

    @pytest.mark.parametrize(
        ("name", "function"),
        [
            ("frontier", draw_frontier),
            ("perplexity", draw_perplexity),
            ("agreement", draw_agreement),
            ("allocation", draw_allocation),
            ("sensitivity", draw_sensitivity),
        ],
    )
    def test_each_can_be_written_alone(self, small, small_drawings, tmp_path, name, function):
        function(small, tmp_path / "a.png", tmp_path / "a.SVG")
        assert (tmp_path / "a.png").read_bytes() == small_drawings[name].png
        assert (tmp_path / "a.SVG").read_bytes() == small_drawings[name].svg

    @pytest.mark.parametrize("name", ["frontier.pdf", "frontier"])
    def test_another_suffix_is_refused(self, small, tmp_path, name):
        with pytest.raises(MpqError, match=r"figures are written as \.png or \.svg"):
            draw_frontier(small, tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_a_predicted_frontier_alone(self, small, tmp_path):
        frontier, middle = small.frontier, len(small.frontier.size_bytes) // 2
        plan = {
            "name": "mixed@3.5bpw",
            "bits_per_weight": frontier.bits_per_weight[middle],
            "predicted_kl": frontier.predicted_kl[middle],
            "size_bytes": frontier.size_bytes[middle],
            "num_weights": small.model.weights,
        }
        draw_prediction(frontier.bits_per_weight, frontier.predicted_kl, plan, tmp_path / "f.svg")
        svg = (tmp_path / "f.svg").read_text()
        assert f"mixed@3.5bpw: {megabytes(plan['size_bytes'])}" in svg
        assert f"{significant(plan['bits_per_weight'])} bits per weight" in svg


class TestReport:
    def test_is_one_file_that_needs_nothing_else(self, page):
        assert len(page.encode()) < 2e6
        reader = PageReader(page)
        assert not reader.open  # every element is closed
        outside = [ref for ref in reader.references if not ref.startswith(("#", "data:image/png;base64,"))]
        assert not outside
        assert not {"link", "iframe", "object", "embed", "base"} & reader.tags
        assert "http" not in page
        assert "@import" not in page
        assert not re.findall(r"url\((?!#)", page)

    def test_every_link_and_id_resolves_once(self, page):
        reader = PageReader(page)
        assert len(reader.ids) == len(set(reader.ids))
        assert {ref[1:] for ref in reader.references if ref.startswith("#")} <= set(reader.ids)
        assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(reader.ids)

    def test_can_be_used_by_keyboard_and_in_the_dark(self, page):
        assert PageReader(page).scroll_without_focus == 0
        assert "prefers-color-scheme: dark" in page
        assert 'name="viewport"' in page
        assert '<html lang="en">' in page
        # Figures take the page's ink: none of the paper's black is left in them.
        assert "#1b1f24" not in page[page.index("<body>") :]

    def test_says_the_numbers(self, page, result):
        text = PageReader(page).text
        assert headline(result) in text
        for plan in result.plans:
            assert plan.name in text
            if plan.kl > 0:
                assert with_error(plan.kl, plan.kl_stderr) in text
        for weight in result.weights:
            assert weight.path in text
        for word in ("▼ better", "no difference shown", "GPTQ", "c3c3c3c3c3c3c3c3", "mpq run quick.py", "0.810"):
            assert word in text
        assert "≈ bf16" in text  # eight bits are within two standard errors of sixteen for some weights

    def test_the_slider_has_points_of_the_frontier(self, page, result):
        data = json.loads(PageReader(page).data)
        exact = dict(zip(result.frontier.size_bytes, result.frontier.predicted_kl, strict=True))
        assert len(data["frontier"]) > 100
        assert {p.size_bytes for p in result.plans if p.handed_out} <= {point[1] for point in data["frontier"]}
        assert all(exact[size] == kl for _, size, kl, _ in data["frontier"])
        assert [row[0] for row in data["uniform"]] == list(SCHEMES)
        start = int(re.search(r'data-start="(\d+)"', page)[1])
        assert data["frontier"][start][1] == result.plan("mixed@3.5bpw").size_bytes

    def test_what_a_budget_ends_with(self, result):
        winners = {"3.0bpw": Winner("mixed@3.0bpw", {}), "int4_g64": Winner("int4_g64", {})}
        section = "".join(mixing_section(dataclasses.replace(result, winners=winners), {}))
        rows = [re.findall(r"<td[^>]*>(?:<span[^>]*>)?([^<]*)", row) for row in section.split("<tr>")[2:]]
        assert [row[3] for row in rows] == ["mixed", "mixed", "mixed", "int4_g64"]

    def test_foreign_text_is_escaped(self, small, small_drawings):
        body = make_result(layers=1)
        evil = '<script>alert("x")</script><!-- & \'"</style>'
        old = "layers.0.mlp.up_proj.kernel"
        body = json.loads(json.dumps(body).replace(old, json.dumps(evil)[1:-1]))
        body["model"]["name"] = body["name"] = body["data"]["test"]["source"] = evil
        body["frontier"]["metric"] = body["tables"]["kl"]["metric"] = evil
        body["agreement"] = {evil: {"kendall_tau": None, "spearman": 1.0}}
        body["seconds"] = {evil: 1.0}
        hostile = parse_result(body)
        record = {"command": evil, "config": {evil: [evil]}, "versions": {evil: evil}}
        page = report_html(hostile, record, draw(hostile))
        clean = report_html(small, RECORD, small_drawings)
        assert "<script>alert" not in page
        assert page.count("<script") == clean.count("<script") == 2
        assert page.count("</style>") == clean.count("</style>")
        assert "<!--" not in page.removeprefix("<!DOCTYPE html>").replace("&lt;!--", "")
        reader = PageReader(page)
        assert not reader.open
        assert evil in reader.text

    def test_what_is_too_much_for_a_page_is_cut_and_said(self, small, small_drawings, monkeypatch):
        monkeypatch.setattr(html_pieces, "_MAX_FIGURE", 40_000)
        monkeypatch.setattr(report_sections, "_MAX_WEIGHT_ROWS", 3)
        page = report_html(small, RECORD, small_drawings)
        fits = {
            name: min(len(d.svg), len(d.png) * 4 // 3) <= 40_000 for name, d in small_drawings.items()
        }  # the page's SVG is a little smaller than the file; none of them lies so near to the limit
        assert {name: f"see {name}.png beside this page" not in page for name in fits} == fits
        assert set(fits.values()) == {True, False}
        assert len(page.encode()) < 5 * 40_000 + 30_000
        assert "The 3 weights of 8 with the largest predicted loss are listed." in page
        plans, table = [p for p in small.plans if p.handed_out], small.tables["kl"]
        loss = {w.path: sum(table.at(w.path, p.choices[w.path])[0] for p in plans) for w in small.weights}
        listed = re.findall(r'<th scope="row">([^<]+(?:kernel|embedding))</th>', page)
        assert set(listed) == set(sorted(loss, key=loss.get)[-3:])

    @pytest.mark.slow
    def test_a_large_model_stays_below_two_megabytes(self):
        large = parse_result(make_result(layers=280))  # 1,961 weights
        page = report_html(large, None, draw(large))
        assert len(page.encode()) < 2e6
        assert "The 400 weights of 1961 with the largest predicted loss are listed." in page

    def test_script_is_told_apart_from_its_data(self, page):
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.S)
        assert len(scripts) == 2
        json.loads(scripts[0])


class TestRunFolder:
    def test_everything_is_written_and_the_same_every_time(self, small, small_drawings, tmp_path):
        write_json(tmp_path / "results.json", make_result(layers=1))
        write_json(tmp_path / "record.json", RECORD)
        assert main([str(tmp_path)]) == 0
        expected = {f"{name}.png": drawing.png for name, drawing in small_drawings.items()}
        expected |= {f"{name}.svg": drawing.svg for name, drawing in small_drawings.items()}
        expected["report.html"] = report_html(small, RECORD, small_drawings).encode()
        made = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert set(made) == set(expected) | {"results.json", "record.json"}
        assert {name: made[name] for name in expected} == expected

    def test_without_a_record(self, small, small_drawings, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "draw", lambda _: small_drawings)
        write_report(small, None, tmp_path / "r.html")
        assert "No record of the run was given." in (tmp_path / "r.html").read_text()

    def test_a_folder_without_results(self, tmp_path, capsys):
        assert main([str(tmp_path)]) == 2
        assert re.match(r"cannot read .*results\.json: it does not exist; it should be", capsys.readouterr().err)
        assert not list(tmp_path.iterdir())

    def test_usage(self, capsys):
        assert main([]) == 2
        assert "usage: python -m analysis FOLDER" in capsys.readouterr().err


def test_analysis_computes_no_model(root):
    """Of `mpq` it may see files, types and units; of JAX nothing."""
    for path in sorted((root / "analysis").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                top = module.split(".")[0]
                allowed = top in sys.stdlib_module_names or top in ("analysis", "matplotlib", "numpy")
                assert allowed or module in ("mpq.files", "mpq.types", "mpq.units"), f"{path.name} imports {module}"
