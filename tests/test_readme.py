"""What the README and the package's docstring show is what runs."""

import re
import textwrap
from pathlib import Path

import pytest

import mpq
from analysis import readme

ROOT = Path(__file__).parent.parent


def example() -> str:
    """The pipeline in the package's docstring."""
    assert mpq.__doc__ is not None
    return textwrap.dedent(mpq.__doc__[mpq.__doc__.index("    import jax") : mpq.__doc__.index("\nEvery stage")])


def test_the_readme_shows_the_docstring_s_example():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert block[1].strip() == example().strip()
    assert len([line for line in example().splitlines() if line.strip()]) <= 16


def test_the_example_runs_and_keeps_its_budget():
    scope = {}
    exec(example(), scope)  # the point is to run what is shown
    assert scope["plan"].size_bits <= 3.5 * sum(w.size for w in scope["traced"].weights)
    assert 0 < scope["result"].kl < 0.2
    assert scope["result"].agreement > 0.7


def test_numbers_in_the_readme_are_those_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert readme.updated(text, readme.load_results(ROOT)) == text


def test_mixing_wins_on_the_reference_model():
    """What the project promises, on the committed run: judged on text that no earlier stage saw, paired by document."""
    result = readme.load_results(ROOT)["quickstart"]
    z = {c.budget: c.z for c in result.comparisons if c.method == result.main_method}
    assert z["3.0bpw"] < -2
    assert z["3.5bpw"] < -2
    plan = {(p.name, p.method): p for p in result.plans}
    for method in {p.method for p in result.plans if p.kind == "uniform"}:
        for scheme in ("int3_g64", "int4_g64"):
            assert plan[f"mixed@{scheme}", method].kl <= plan[scheme, method].kl


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:mpq|analysis|experiments)/[^`<]*)`", (ROOT / "README.md").read_text())
)
def test_files_named_exist(path):
    assert (ROOT / path).exists()
