"""Weights, activations and the KV cache in one problem: losses, bytes and BOPs by hand, and the best of all choices."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest

from mpq.activations import ACTIVATION_METRICS, activation_rows, calibrate_activations, kv_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation
from mpq.activations.joint import CACHE, joint_problem
from mpq.activations.table import ActivationTable
from mpq.allocate import Problem, solve_constrained, solve_frontier
from mpq.formats import parse_scheme
from mpq.types import MpqError, SensitivityTable
from tests import tiny
from tests.activation_cases import make_data, make_model, run, traced
from tests.command import exit_code

TOKENS = 10


@pytest.fixture(scope="module")
def tables():
    """Tables of random losses: of weights, of activations and of the cache."""
    model, rng = make_model(), np.random.default_rng(0)
    weights = tuple(w for w in traced(model).weights if w.path in ("query", "key", "value", "out", "up"))
    rows = tuple(row for row in activation_rows(traced(model)) if set(row.weights) <= {w.path for w in weights})
    draw = lambda n, s: (rng.uniform(0, 1, (n, s)), rng.uniform(0, 0.1, (n, s)))
    own = ("random", "rtn", model.digest, "data")
    weight_schemes = tuple(map(parse_scheme, ("int2_channel", "int8_channel")))
    row_schemes = tuple(map(parse_activation_scheme, ("int4_token", "int8_tensor_static")))
    cache_schemes = tuple(map(parse_activation_scheme, ("int4_head_asym",)))
    cache = kv_rows(traced(model), "key|value")
    return (
        SensitivityTable(weights, weight_schemes, *draw(5, 2), *own),
        ActivationTable(rows, row_schemes, *draw(len(rows), 2), *own),
        ActivationTable(cache, cache_schemes, *draw(2, 1), *own),
    )


def by_hand(tables, groups, caches):
    """Loss, bytes in bits and BOPs of one choice: `groups[g] = (w, a)` and `caches[c]`, -1: floating point."""
    table, activations, cache = tables
    loss = size = bops = 0
    names = list(dict.fromkeys(w.group for w in table.weights))
    for i, w in enumerate(table.weights):
        scheme, a = groups[names.index(w.group)]
        loss += table.loss_increase[i, scheme]
        size += w.size_bits(table.schemes[scheme])
        bops += w.macs * table.schemes[scheme].format.bits * (16 if a < 0 else activations.schemes[a].bits)
    for i, row in enumerate(activations.activations):
        (group,) = {names.index(w.group) for w in table.weights if w.path in row.weights}
        a = groups[group][1]
        loss += 0 if a < 0 else activations.loss_increase[i, a]
        size += 64 if a == 1 else 0
    for i, row in enumerate(cache.activations):
        loss += 0 if caches[i] < 0 else cache.loss_increase[i, caches[i]]
        size += TOKENS * (16 * 4 if caches[i] < 0 else row.size_bits(cache.schemes[caches[i]]))
    return loss, size, bops


def test_solutions_are_the_best_of_all_choices(tables):
    table, activations, cache = tables
    joint = joint_problem(Problem.from_table(table, overhead_bits=7), activations, cache, TOKENS)
    assert len(joint.problem.names) == 3 + 2
    assert joint.problem.num_weights == sum(w.size for w in table.weights)
    pairs = list(itertools.product((0, 1), (-1, 0, 1)))
    every = [
        by_hand(tables, groups, caches)
        for groups in itertools.product(pairs, repeat=3)
        for caches in itertools.product((-1, 0), repeat=2)
    ]
    frontier = solve_frontier(joint.problem)
    sizes = sorted({size for _, size, _ in every})
    for budget in sizes[:: len(sizes) // 7]:
        best = min(loss for loss, size, _ in every if size <= budget)
        found = frontier.at(bits=budget)
        assert found.loss == pytest.approx(best, rel=1e-12)
        limit = np.median([bops for *_, bops in every])
        solved = solve_constrained(joint.problem, budget, [joint.bops(limit)])
        within = min(loss for loss, size, bops in every if size <= budget and bops <= limit)
        assert solved.loss == pytest.approx(within, rel=1e-9)
    assert joint.cache_bits(found.choice) == TOKENS * sum(
        row.size_bits(cache.schemes[0]) if found.choice[row.path + CACHE].activation else 64
        for row in cache.activations
    )
    assert set(joint.weights(found.choice)) == {w.path for w in table.weights}
    for path, entry in joint.activations(frontier.at(bits=sizes[0]).choice).items():
        assert entry["scheme"] in ("int4_token", "int8_tensor_static", "int4_head_asym")
        assert RoundedActivation.from_json(entry).spec.path == path


def test_weights_and_one_table_alone_are_problems_too(tables):
    table, activations, cache = tables
    base = Problem.from_table(table, pins={"up": "int8_channel"})
    alone = joint_problem(base, None, cache, TOKENS)
    assert str(alone.problem.schemes[0]) == "int2_channel+float"
    least = solve_frontier(alone.problem).at(bits=alone.problem.min_bits)
    assert {str(s) for p, s in least.choice.items() if p.endswith(CACHE)} == {"cache int4_head_asym"}
    assert str(least.choice["up"]) == "int8_channel+float"
    without = joint_problem(base, activations, None, 0)
    assert without.problem.max_bits - without.problem.min_bits == base.max_bits - base.min_bits + 64 * 3


def test_what_does_not_go_together_is_refused(tables):
    table, activations, cache = tables
    base = Problem.from_table(table)
    with pytest.raises(MpqError, match=r"^a cache of 0 tokens: give a context and sequences of 1 or more$"):
        joint_problem(base, None, cache, 0)
    strange = dataclasses.replace(activations.activations[0], weights=("up", "out"))
    other = dataclasses.replace(activations, activations=(strange, *activations.activations[1:]))
    with pytest.raises(
        MpqError,
        match=r"^activation \{query,key,value\} is read by no single group of weights of the sensitivity table: score "
        r"both of the same model$",
    ):
        joint_problem(base, other, None, 0)
    with pytest.raises(MpqError, match=r"^limit of BOPs 0 is not a positive number: give for instance 1000$"):
        joint_problem(base, activations, None, 0).bops(0)


@pytest.mark.parametrize("metric", ACTIVATION_METRICS.values(), ids=ACTIVATION_METRICS.keys())
def test_static_schemes_are_scored_by_their_ranges(metric):
    """Of a single window whose range was calibrated on it, the static range is the dynamic one."""
    model, data = make_model(), make_data(1)
    rows = (activation_rows(traced(model))[0], *kv_rows(traced(model), "key"))
    ranges = calibrate_activations(model, traced(model), rows, data, batch_size=4)
    texts = ("int4_tensor_static_absmax_asym", "int4_tensor_asym", "int4_tensor_static_moving_average", "int4_tensor")
    schemes = tuple(map(parse_activation_scheme, texts))
    measure = functools.partial(metric, ranges=ranges)
    table = run(measure, "activations", model, data, schemes=schemes, rows=rows)
    assert table.quantizer == "dynamic and static"
    np.testing.assert_array_equal(table.loss_increase[:, [0, 2]], table.loss_increase[:, [1, 3]])
    assert (table.loss_increase > 0).all()
    with pytest.raises(
        MpqError, match=r"^\{query,key,value\} at int4_tensor_static_absmax_asym has no calibrated range"
    ):
        run(metric, "activations", model, data, schemes=schemes, rows=rows)


TEXT = ["--data", "text.txt", "--window", "16", "--batch-size", "4", "--max-windows", "8", "--metric", "fisher"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("joint")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text(seed=1))
    return root


def test_the_commands_choose_all_three_and_write_one_plan(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "150")

    def mpq(*arguments):
        code = exit_code(*arguments)
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 and "--json" in arguments else out, err

    mpq("sensitivity", "model", *TEXT, "--schemes", "int3_g16", "int8_channel", "-o", "w")
    score = ["sensitivity", "model", *TEXT, "--schemes"]
    mpq(*score, "int4_token", "int8_tensor_static", "--of", "activations", "-o", "a")
    mpq("sensitivity", "model", *TEXT, "--of", "kv", "--schemes", "int4_head", "-o", "k")
    ask = ["allocate", "w", "--activations", "a", "--kv", "k", "--context", "64", "--sequences", "2", "-o", "p"]
    code, body, _ = mpq(*ask, "--size", "18kB", "--max-bops", "1e8", "--json")
    assert code == 0
    plan = json.loads((place / "p").read_text())
    assert plan["activations"] == body["activations"]
    assert body["size_bytes"] + body["cache_bytes"] <= 18000
    assert body["cache_bytes"] <= 64 * 2 * 4 * 16 * 2
    assert mpq("quantize", "model", "p", "--method", "rtn", "--data", "text.txt", *TEXT[2:-2], "-o", "q")[0] == 0
    assert mpq("evaluate", "q", "--data", "text.txt", *TEXT[2:-2])[0] == 0
    code, body, _ = mpq("allocate", "w", "--activations", "a", "--for", "onnx", "--bpw", "8.47", "-o", "for", "--json")
    assert code == 0
    assert set(body["choices"].values()) == {"int8_channel"}
    told = mpq(*ask, "--bpw", "9")[1]
    assert "KV cache: " in told
    wrong = {
        ("--kv", "a"): "a is no table of kv: give what `mpq sensitivity --of kv` wrote",
        ("--rules", "qwix=x"): "--activations and --kv go with a size, --max-kl and --max-bops: leave out "
        "--interactions, --latency and --rules",
        ("--for", "gguf"): "format gguf holds weights only: leave out --activations and --kv, or use --for onnx",
        ("--for", "onnx", "--kv", "k"): "onnx has no form for layers.0.self_attn.k_proj.kernel at int4_head: the graph "
        "keeps no KV cache; leave it out",
    }
    for arguments, message in wrong.items():
        code, _, err = mpq("allocate", "w", "--activations", "a", *arguments, "--bpw", "9", "-o", "x")
        assert (code, err.strip()) == (2, f"mpq: {message}")
