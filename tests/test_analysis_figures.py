"""Figures: drawn from made-up runs of plausible numbers, every point where it belongs, the same twice."""

import dataclasses
import itertools
import math
import struct
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from analysis.allocation import (
    allocation_figure,
    draw_allocation,
    draw_sensitivity,
    scheme_color,
    sensitivity_figure,
)
from analysis.axes import legend_entries
from analysis.figure import render, style
from analysis.load import parse_result
from analysis.measured import agreement_figure, draw_agreement, draw_quality, quality_figure
from analysis.pareto import draw_frontier, draw_prediction, frontier_figure
from analysis.report import draw, figures, report_html
from analysis.text import megabytes, significant
from mpq.types import MpqError
from tests.analysis_cases import ROLES, drawn, make_result, parsed


@pytest.fixture(scope="module")
def result():
    return parsed()


@pytest.fixture(scope="module")
def drawings():
    return drawn()


@pytest.fixture(scope="module")
def small():
    return parsed(layers=1)


@pytest.fixture(scope="module")
def small_drawings():
    return drawn(layers=1)


class TestFigures:
    @pytest.mark.parametrize("name", ["frontier", "perplexity", "agreement", "allocation", "sensitivity"])
    def test_same_bytes_twice_and_whatever_the_users_own_style(self, small, small_drawings, name):
        first = small_drawings[name]
        with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
            assert render(lambda: figures(small)[name](small)) == first
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
            figure = frontier_figure(result)
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

    def test_a_corrected_frontier_is_drawn_over_the_sums(self, result):
        frontier = dataclasses.replace(
            result.frontier,
            corrected_kl=tuple(1.5 * loss for loss in result.frontier.predicted_kl),
            corrected_stderr=(0.01,) * len(result.frontier.predicted_kl),
        )
        with style():
            ax = frontier_figure(dataclasses.replace(result, frontier=frontier)).axes[0]
        for label, column in (("predicted frontier", "corrected_kl"), ("sum over weights", "predicted_kl")):
            exact = dict(zip(frontier.bits_per_weight, getattr(frontier, column), strict=True))
            curve = next(line for line in ax.lines if line.get_label() == label).get_xydata()
            assert len(curve) > 1
            assert all(exact[x] == y for x, y in curve)
        assert any("corrected by plans of the selection set" in text.get_text() for text in ax.texts)

    def test_a_heuristic_has_a_series_of_its_own(self):
        body = make_result(layers=1)
        plan = next(p for p in body["plans"] if p["name"] == "int3_g64" and p["method"] == "gptq")
        body["plans"].append(plan | {"name": "heuristic-int2_g64", "kind": "heuristic", "scheme": None})
        result = parse_result(body)
        with style():
            axes = [make(result).axes[0] for make in (frontier_figure, quality_figure, agreement_figure)]
        heights = [(plan["bits_per_weight"], plan["kl"]), (plan["bits_per_weight"], plan["perplexity"])]
        for ax, point in zip(axes, [*heights, (plan["kl"], plan["predicted_kl"])], strict=True):
            drawn = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "^"]
            assert drawn == [[list(point)]]
            assert "heuristic, GPTQ" in legend_entries(ax)[1]

    def test_plans_made_better_in_two_ways_are_named_once(self):
        body = make_result(layers=1)
        plan = next(p for p in body["plans"] if p["name"] == "int3_g64" and p["method"] == "gptq")
        for method in ("gptq+correct", "gptq+propagate+correct"):
            body["plans"].append(plan | {"method": method, "kind": "corrected"})
        with style():
            ax = frontier_figure(parse_result(body)).axes[0]
        names = legend_entries(ax)[1]
        assert names.count("corrected") == 1
        assert len(names) == len(set(names))

    def test_error_bars_are_two_standard_errors(self, result):
        with style():
            ax = frontier_figure(result).axes[0]
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
            ax = frontier_figure(result).axes[0]
        [top] = [child for child in ax.child_axes if child.get_xlabel() == "size of the whole model (MB)"]
        ax.figure.draw_without_rendering()
        for plan in result.plans:
            # Sizes are whole bytes: half a millionth of a megabyte for each of two roundings.
            pixel = ax.transData.transform((plan.bits_per_weight, 1))[0]
            shown = top.transData.inverted().transform((pixel, 0))[0]
            assert abs(shown - plan.size_bytes / 1e6) < 2e-6

    def test_labels_do_not_lie_on_each_other(self, result):
        with style():
            figure = frontier_figure(result)
            figure.draw_without_rendering()
            for ax in figure.axes:
                boxes = [text.get_window_extent() for text in ax.texts if isinstance(text, Annotation)]
                assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))

    def test_perplexity_beyond_the_axis_is_written(self):
        body = make_result(layers=1)
        rtn = next(p for p in body["plans"] if (p["name"], p["method"]) == ("int2_g64", "rtn"))
        rtn["perplexity"] = 5432.1
        with style():
            ax = quality_figure(parse_result(body)).axes[0]
        drawn = {y for line in ax.lines if line.get_marker() in "os" for y in line.get_ydata()}
        assert drawn == {p["perplexity"] for p in body["plans"]} - {5432.1}
        assert "above: int2_g64 RTN (5430)" in {text.get_text() for text in ax.texts}

    def test_allocation_has_a_cell_for_every_weight_in_its_schemes_colour(self, result):
        with style():
            axes = allocation_figure(result).axes
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
            ax = sensitivity_figure(result).axes[0]
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
            ax = allocation_figure(parse_result(body)).axes[0]
        assert len(ax.patches) == 24
        assert not ax.texts

    @pytest.mark.parametrize(
        ("name", "function"),
        [
            ("frontier", draw_frontier),
            ("perplexity", draw_quality),
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


def points(ax):
    """Coordinates of all markers of plans."""
    return {tuple(xy) for line in ax.lines if line.get_marker() in "os" for xy in line.get_xydata().tolist()}


class TestQuality:
    """Quality over size, for tasks where higher is better and where lower is."""

    def test_accuracy_rises_to_the_original(self):
        result = parsed(3, "classification")
        with style():
            ax = quality_figure(result).axes[0]
        assert ax.get_yscale() == "linear"
        assert ax.get_ylabel() == "accuracy on the test set (%)"
        low, high = ax.get_ylim()
        main = {(p.bits_per_weight, 100 * p.quality) for p in result.plans if p.method == "gptq"}
        assert main <= points(ax)
        assert all(low < y < high for _, y in points(ax))
        [original] = [line for line in ax.lines if line.get_label() == "original"]
        assert set(original.get_ydata()) == {100 * result.reference.quality}
        [band] = [patch for patch in ax.patches if patch.get_label() == "± 2 standard errors"]
        box = band.get_extents().transformed(ax.transData.inverted())
        error = 200 * math.sqrt(0.92 * 0.08 / 932)
        np.testing.assert_allclose([box.y0, box.y1], [92 - error, 92 + error], rtol=1e-12)
        # The best uniform scheme that fits gets no worse with more bits.
        [steps] = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
        assert list(steps.get_ydata()) == sorted(steps.get_ydata())
        assert max(steps.get_ydata()) == 92

    def test_accuracy_below_the_axis_is_written(self):
        """Another method's plan far below, and the main method's where it would crowd the mixed plans together."""
        body = make_result(layers=1, task="classification")
        for plan in body["plans"]:
            plan["accuracy"] = 0.9 if plan["kind"] == "mixed" else plan["accuracy"]
            if plan["name"] == "int2_g64":
                plan["accuracy"] = {"gptq": 0.25, "rtn": 0.1}[plan["method"]]
        with style():
            ax = quality_figure(parse_result(body)).axes[0]
        assert not {25.0, 10.0} & {y for _, y in points(ax)}
        assert {90.0, 92.0} <= {y for _, y in points(ax)}
        [note] = [text for text in ax.texts if text.get_text().startswith("below: ")]
        assert "int2_g64 GPTQ (25.0)" in note.get_text()
        assert "int2_g64 RTN (10.0)" in note.get_text()
        assert note.get_position()[1] < 0.1  # at the bad end of the axis

    @pytest.mark.parametrize("task", ["classification", "embedding", "regression"])
    def test_names_lie_inside_and_not_on_each_other(self, task):
        with style():
            figure = quality_figure(parsed(3, task))
            figure.draw_without_rendering()
            ax = figure.axes[0]
            frame = ax.get_window_extent()
            boxes = [text.get_window_extent() for text in ax.texts if isinstance(text, Annotation)]
        assert len(boxes) >= 6
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)

    def test_correlation_may_be_negative_or_unknown(self):
        body = make_result(layers=1, task="embedding")
        worst, second = [p for p in body["plans"] if p["name"] == "int2_g64"]
        worst["spearman"], second["spearman"] = None, -0.2
        for plan in body["plans"]:
            if plan["kind"] == "mixed":
                plan["spearman"] = -0.1
        with style():
            figure = quality_figure(parse_result(body))
            figure.draw_without_rendering()
            ax = figure.axes[0]
        assert -0.1 in {y for _, y in points(ax)}
        assert any(label.get_text().startswith("\N{MINUS SIGN}") for label in ax.get_yticklabels())
        assert any("below: int2_g64 GPTQ (\N{EN DASH})" in text.get_text() for text in ax.texts)

    def test_no_plan_of_the_main_method_has_a_quality(self):
        body = make_result(layers=1, task="embedding")
        for plan in body["plans"]:
            plan["spearman"] = None if plan["method"] == "gptq" else plan["spearman"]
        result = parse_result(body)
        with style():
            ax = quality_figure(result).axes[0]
        assert {y for _, y in points(ax)} == {p.quality for p in result.plans if p.method == "rtn"}

    def test_squared_error_is_on_a_log_axis_unless_it_is_zero(self):
        body = make_result(layers=1, task="regression")
        with style():
            ax = quality_figure(parse_result(body)).axes[0]
            body["reference"]["mse"] = 0.0
            other = quality_figure(parse_result(body)).axes[0]
        assert (ax.get_yscale(), other.get_yscale()) == ("log", "linear")
        assert not [patch for patch in ax.patches if patch.get_label() == "± 2 standard errors"]
        assert other.get_ylim()[0] < 0

    def test_without_labels_there_is_none(self):
        assert list(figures(parsed(1, "classification"))) == [
            "frontier",
            "accuracy",
            "agreement",
            "allocation",
            "sensitivity",
        ]
        assert "accuracy" not in figures(parsed(1, "classification", labels=False))


def test_units_are_those_of_the_task(tmp_path):
    result = parsed(1, "classification")
    for name, make in figures(result).items():
        with style():
            figure = make(result)
            axes = [text for ax in figure.axes for text in (ax.get_xlabel(), ax.get_ylabel())]
        assert not [text for text in axes if "token" in text]
        assert (name in ("accuracy", "allocation")) != any("nats per example" in text for text in axes)
    frontier = result.frontier
    plan = {"name": "p", "bits_per_weight": 3.0, "predicted_kl": 0.1, "size_bytes": 9, "num_weights": 8}
    draw_prediction(frontier.bits_per_weight, frontier.predicted_kl, plan, tmp_path / "f.svg", unit="example")
    assert "predicted KL (nats per example)" in (tmp_path / "f.svg").read_text()
