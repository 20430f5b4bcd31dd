"""The committed results of the kernels: what was aimed at, and on an H200 the page that is made of them."""

import pytest

from analysis import kernels
from kernels_pallas.tables import file_name, read_table
from mpq.files import read_json


@pytest.fixture(scope="module")
def results(root):
    return kernels.load(root)


def test_the_page_is_made_of_them(root, results):
    assert (root / kernels.FOLDER / "h200.md").read_text(encoding="utf-8") == kernels.page(*results)


def test_the_picture_has_every_format(results):
    (axes,) = kernels.roofline_figure(results[0]).axes
    assert sum(len(line.get_xdata()) for line in axes.lines[2:]) == len(kernels.fastest(results[0]))


def test_few_tokens_are_as_fast_as_was_aimed_at(results):
    """Times the dense dot of the same run, for layers of 70 billion parameters."""
    rows = kernels.fastest(results[0])
    least = {
        "w4a16_g128-1x": 2.8,
        "w4a16_g128-16x": 2.8,
        "w8a16_channel-16x": 1.6,
        "w2a16_g128-16x": 3,
        "nf4a16_g128-16x": 2,
    }
    for start, ratio in least.items():
        for shape in ("8192x57344", "28672x8192"):
            assert rows[f"{start}{shape}-bfloat16"]["speedup"] >= ratio


def test_the_table_chooses_what_was_fastest(root, results):
    path = root / "kernels_pallas" / "tuned" / file_name("NVIDIA H200")
    best = {}
    for entry in read_table(path.read_text(encoding="utf-8")).entries:
        problem = entry.problem
        key = (problem.format, problem.group_size, problem.m, problem.k, problem.n)
        if key not in best or entry.microseconds < best[key].microseconds:
            best[key] = entry
    chosen = sorted((entry.backend, entry.microseconds) for entry in best.values())
    found = {name: (row["backend"], row["p50"]) for name, row in kernels.fastest(results[0]).items()}
    for case, (_, later) in kernels.latest_parts(results[2]).items():
        rows = [row for row in results[0]["rows"] if row["case"] == case and row["backend"] == "dense"]
        measured = [("hopper", row["sum"]) for row in later if row["config"] != "dense"]
        found[case] = min([*measured, *((row["backend"], row["p50"]) for row in rows)], key=lambda pair: pair[1])
    assert chosen == sorted(found.values())


@pytest.mark.parametrize(
    ("case", "ratio"),
    [
        ("w8a8_channel-256x8192x57344", 1.7),
        ("w8a8_channel-2048x8192x57344", 1.6),
        ("w8a8_channel-2048x8192x8192", 1.6),
        ("w4a8_g128-64x8192x57344", 2.8),
        ("w4a8_g128-256x8192x57344", 1.5),
        ("w4a8_g128-2048x8192x57344", 1.3),
        ("w4a16_g128-8x16x4096x14336", 2.9),
    ],
)
def test_many_tokens_and_experts_are_as_fast_as_was_aimed_at(results, case, ratio):
    """Times the dense dot of the same run."""
    _, rows = kernels.latest_parts(results[2])[f"{case}-bfloat16"]
    dense = min(row["sum"] for row in rows if row["config"] == "dense")
    assert dense / min(row["sum"] for row in rows if row["config"] != "dense") >= ratio


def test_every_form_equalled_the_contract_on_the_card(results):
    assert results[2]["conformance"] == {"forms": 49, "failed": 0}


def test_peers_were_measured_on_the_same_kind_of_card(root, results):
    assert results[0]["environment"]["device"] == results[1]["environment"]["device"]
    versions = read_json(root / kernels.FOLDER / "h200_versions.json", "results")["versions"]
    assert [version["commit"] for version in versions.values()] == ["5f622ba", "28db0a0"]


def on_a_cpu(root, file):
    """Of the kernels in C, times the dense dot of the same run, by format and tokens, of weights of 4096 x 4096."""
    rows = read_json(root / kernels.FOLDER / file, "results")["rows"]
    return {
        (row["format"], row["m"]): row["speedup"]
        for row in rows
        if row["backend"] == "native" and row["shape"] == "4096x4096"
    }


def test_packed_weights_are_never_slower_on_a_cpu_than_dense_ones(root):
    found = on_a_cpu(root, "cpu.json")
    assert {m for _, m in found} == {1, 8, 16, 128, 512}
    assert min(found.values()) >= 1
    assert min(ratio for (form, m), ratio in found.items() if m == 512 and form[2:4] == "a8") >= 3


def test_one_token_takes_a_quarter_of_the_dense_time_on_a_cpu(root):
    """Many matmuls in one compiled function, as in a model."""
    found = on_a_cpu(root, "cpu_chained.json")
    assert len(found) == 8
    assert min(found.values()) >= 4
