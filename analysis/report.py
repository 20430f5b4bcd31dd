"""Everything that is drawn of a run: its figures, and one static page that says what the run found."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis import sections
from analysis.allocation import allocation_figure, sensitivity_figure
from analysis.figure import Drawing, render
from analysis.findings import headline
from analysis.html import escape, page, paragraph, section
from analysis.load import Result, load_result
from analysis.measured import agreement_figure, quality_figure
from analysis.pareto import frontier_figure
from analysis.range_section import ranges_of_run, ranges_section
from mpq.files import read_json, write_text

_SECTIONS = {
    "size": ("Size and loss", sections.frontier_section),
    "mixing": ("Did mixing help?", sections.mixing_section),
    "plans": ("Plans and baselines", sections.plans_section),
    "prediction": ("Was the prediction right?", sections.prediction_section),
    "weights": ("Which weight gets what", sections.weights_section),
    "metrics": ("Sensitivity", sections.sensitivity_section),
    "ranges": ("Ranges of activations", ranges_section),
}
_PROVENANCE = "Where this came from"


def write_run(folder: str | os.PathLike[str]) -> None:
    """Draw a run folder: every figure as .png and .svg, and `report.html`, from its `results.json` and `record.json`.

    Raises:
      MpqError: a file is missing or wrong, or one cannot be written.
    """
    folder = Path(folder)
    result = load_result(folder / "results.json")
    record = None
    if (folder / "record.json").exists():
        record = read_json(folder / "record.json", "record.json, as 'mpq run' writes it")
    drawings = draw(result)
    for name, drawing in drawings.items():
        drawing.write(folder / f"{name}.png")
        drawing.write(folder / f"{name}.svg")
    write_text(folder / "report.html", report_html(result, record, drawings))


def write_report(result: Result, record: Mapping[str, Any] | None, out_html: str | os.PathLike[str]) -> None:
    """Write the report: one file, nothing loaded from elsewhere, below 2 MB.

    Args:
      result: all numbers of the run.
      record: content of `record.json`; None leaves versions and config out.
      out_html: where to.

    Raises:
      MpqError: the file cannot be written.
    """
    write_text(out_html, report_html(result, record, draw(result)))


def figures(result: Result) -> dict[str, Callable[[Result], Figure]]:
    """File name -> what makes the figure; quality goes by its own name and is left out where the data has no labels."""
    return {
        "frontier": frontier_figure,
        **({result.task.quality: quality_figure} if result.has_quality else {}),
        "agreement": agreement_figure,
        "allocation": allocation_figure,
        "sensitivity": sensitivity_figure,
        **({"ranges": ranges_of_run} if result.ranges else {}),
    }


def draw(result: Result) -> dict[str, Drawing]:
    """All figures of a result, by file name without suffix."""
    return {name: render(lambda make=make: make(result)) for name, make in figures(result).items()}


def report_html(result: Result, record: Mapping[str, Any] | None, drawings: Mapping[str, Drawing]) -> str:
    """The page's text; equal arguments give equal text."""
    parts = {key: part for key, part in _SECTIONS.items() if key != "ranges" or result.ranges}
    links = {**{key: heading for key, (heading, _) in parts.items()}, "provenance": _PROVENANCE}
    nav = "".join(f'<li><a href="#{key}">{escape(heading)}</a></li>' for key, heading in links.items())
    title = f"mpq {result.name}: {result.model.name}"
    body = [
        f"<header>\n<h1>{escape(title)}</h1>",
        paragraph(headline(result), "lead"),
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav>\n</header>\n<main id="main">',
        *(section(key, heading, *make(result, drawings)) for key, (heading, make) in parts.items()),
        section("provenance", _PROVENANCE, *sections.provenance_section(result, record)),
        "</main>",
    ]
    return page(title, "\n".join(body), sections.slider_data(result))
