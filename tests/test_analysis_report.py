"""The report: one page that needs nothing else, says the numbers, and escapes what others wrote."""

import ast
import dataclasses
import html.parser
import json
import re
import sys

import pytest
from matplotlib.figure import Figure

from analysis import html as html_pieces
from analysis import report
from analysis import sections as report_sections
from analysis.__main__ import main
from analysis.figure import render
from analysis.findings import headline
from analysis.load import StabilityInfo, Winner, parse_result
from analysis.measures import counted
from analysis.report import draw, report_html, write_report
from analysis.sections import mixing_section, prediction_section, weights_section
from analysis.text import significant, with_error
from mpq.files import write_json
from tests.analysis_cases import RECORD, SCHEMES, drawn, make_result, parsed


@pytest.fixture(scope="module")
def result():
    return parsed()


@pytest.fixture(scope="module")
def page(result):
    return report_html(result, RECORD, drawn())


@pytest.fixture(scope="module")
def small():
    return parsed(layers=1)


@pytest.fixture(scope="module")
def small_drawings():
    return drawn(layers=1)


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
        winners["3.5bpw"] = Winner("heuristic-int3_g64", {})
        section = "".join(mixing_section(dataclasses.replace(result, winners=winners), {}))
        rows = [re.findall(r"<td[^>]*>(?:<span[^>]*>)?([^<]*)", row) for row in section.split("<tr>")[2:]]
        assert [row[3] for row in rows] == ["mixed", "mixed", "heuristic-int3_g64", "int4_g64"]

    def test_prediction_and_measurement_of_what_is_handed_out(self, page, result):
        section = page[page.index('<section id="prediction">') : page.index('<section id="weights">')]
        rows = {row[0]: row[1:] for row in (re.findall(r">([^<]+)</t[hd]>", row) for row in section.split("<tr>")[2:])}
        plans = [plan for plan in result.plans if plan.handed_out]
        assert set(rows) == {plan.name for plan in plans}
        for plan in plans:
            predicted, corrected, measured, ratio = rows[plan.name]
            assert predicted == with_error(plan.predicted_kl, plan.predicted_stderr)
            assert corrected == significant(None)
            assert measured == with_error(plan.kl, plan.kl_stderr)
            assert "±" in predicted
            assert "±" in measured
            assert float(ratio) == pytest.approx(plan.kl / plan.predicted_kl, rel=0.05)  # two digits

    def test_a_corrected_prediction_is_what_measurement_is_held_against(self, result):
        plans = [dataclasses.replace(p, corrected_kl=1.1 * p.kl, corrected_stderr=0.01 * p.kl) for p in result.plans]
        section = "".join(
            prediction_section(dataclasses.replace(result, plans=tuple(plans)), {"agreement": render(Figure)})
        )
        rows = [re.findall(r">([^<]+)</t[hd]>", row) for row in section.split("<tr>")[2:]]
        by_name = {plan.name: plan for plan in plans if plan.handed_out}
        assert {row[0] for row in rows} == set(by_name)
        for name, _, corrected, _, ratio in rows:
            assert corrected == with_error(by_name[name].corrected_kl, by_name[name].corrected_stderr)
            assert ratio == significant(1 / 1.1, 2)
        assert "Corrected: what the other plans" in section

    def test_choices_that_are_not_distinguishable_are_marked(self, result):
        paths = [weight.path for weight in result.weights]
        share = dict.fromkeys(paths, 1.0) | {paths[2]: 0.625}
        stability = {
            "3.0bpw": StabilityInfo("mixed@3.0bpw", "one of them is unsure", share, (paths[2],)),
            "3.5bpw": StabilityInfo("mixed@3.5bpw", "nothing is known of them", None, ()),
        }
        section = "".join(weights_section(dataclasses.replace(result, stability=stability), drawn()))
        rows = re.findall(r'<tr><th scope="row">([^<]+)</th>(.*?)</tr>', section, flags=re.S)
        assert [path for path, cells in rows if "taken in 62 % of resamples" in cells] == [paths[2]]
        assert section.count("of resamples<") == 1
        assert "3.0bpw, mixed@3.0bpw: one of them is unsure." in section
        assert "3.5bpw, mixed@3.5bpw: nothing is known of them." in section
        assert "in more than 1 of 20 of them" in section
        assert "in more than 1 of 20" not in "".join(weights_section(result, drawn()))

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


class TestTasks:
    """What a page says of a run that is not of a language model."""

    @pytest.mark.parametrize(
        ("task", "words"),
        [
            (
                "classification",
                ("accuracy (%)", "92.00 ± 0.89", "same top-1 (%)", "on 932 examples", "over examples", "by example;"),
            ),
            (
                "embedding",
                ("Spearman correlation", "cosine to the original", "on 1379 sentence pairs, 2758 examples", "pairs."),
            ),
            ("regression", ("mean squared error", "likeness", "on 500 examples", "common to all plans and not drawn")),
        ],
    )
    def test_names_and_units_are_those_of_the_task(self, task, words):
        result = parsed(1, task)
        page = report_html(result, None, drawn(1, task))
        reader = PageReader(page)
        assert not reader.open
        assert result.task.quality in reader.text.lower() or task == "regression"
        for word in (*words, "nats per example", "a nat per example", f"task{task}"):
            assert word in reader.text
        for word in ("token", "perplexity", " text"):
            assert word not in reader.text.replace("embed_tokens", "")
        assert json.loads(reader.data)["unit"] == "example"
        assert json.loads(reader.data)["perplexity"] is False

    def test_only_a_language_model_has_a_perplexity_on_the_slider(self, page):
        data = json.loads(PageReader(page).data)
        assert (data["unit"], data["perplexity"]) == ("token", True)

    def test_without_labels_quality_leaves_no_hole(self):
        result = parsed(1, "classification", labels=False)
        drawings = drawn(1, "classification", labels=False)
        page = report_html(result, None, drawings)
        reader = PageReader(page)
        assert "accuracy (%)" not in reader.text
        assert "Without labels there is no accuracy: all numbers compare with the original." in reader.text
        assert page.count("<figure>") == len(drawings) == 4
        head, *rows = re.findall(r"<tr>(.*?)</tr>", page[page.index("Every plan, measured") :], flags=re.S)[:18]
        assert {row.count("</td>") + row.count("</th>") for row in rows} == {head.count("</th>")} == {6}

    def test_without_a_test_set_or_an_error_of_the_original(self):
        """Files that other programs wrote may lack both; the page then claims neither."""
        body = make_result(layers=1, task="classification")
        body["data"], body["reference"]["accuracy_stderr"] = {}, None
        result = parse_result(body)
        text = PageReader(report_html(result, None, drawn(1, "classification"))).text
        assert "Every plan, measured on the test set" in text
        assert "Accuracy on the same data." in text

    def test_embeddings_of_single_sentences_have_no_pairs(self):
        body = make_result(layers=1, task="embedding")
        body["data"]["test"]["num_documents"] = 100
        assert counted(parse_result(body)) == "100 documents, 2758 examples"


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
