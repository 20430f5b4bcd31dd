"""Stage files: exact round trips, and a refusal by name of whatever is damaged, foreign or stale."""

import json

import numpy as np
import pytest

from mpq import artifacts
from mpq.data import new_dataset, row_digests
from mpq.evaluate import DocumentScores
from mpq.formats import parse_scheme
from mpq.models import load
from mpq.tasks import Classification
from mpq.types import Allocation, LayerStats, MpqError, SensitivityTable, Status
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(tiny.write_folder(tmp_path_factory.mktemp("artifacts") / "model")))


@pytest.fixture(scope="module")
def weights(model):
    return model.trace(2, 16).weights


@pytest.fixture
def table(model, weights):
    rng = np.random.default_rng(0)
    schemes = tuple(map(parse_scheme, ("int2_g32", "int4_g32_zp", "bf16")))
    shape = (len(weights), len(schemes))
    stderr = rng.random(shape)
    stderr[0, 0] = np.nan
    return SensitivityTable(weights, schemes, rng.random(shape), stderr, "kl", "rtn", model.digest, "data")


def damage(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_table_survives_the_disk_exactly(tmp_path, table):
    artifacts.save_table(tmp_path / "s.json", table, {"other_bits": 5})
    again, body = artifacts.load_table(tmp_path / "s.json")
    assert (again.weights, again.schemes, again.metric, again.quantizer) == (table.weights, table.schemes, "kl", "rtn")
    np.testing.assert_array_equal(again.loss_increase, table.loss_increase)
    np.testing.assert_array_equal(again.stderr, table.stderr)
    assert body["other_bits"] == 5


def test_sizes_of_a_uniform_plan_are_counted_by_hand(model, weights):
    plan = artifacts.uniform_plan(parse_scheme("int4_g32"), model, weights)
    values = sum(p.size for p in model.params.values() if p.ndim == 2)
    norms = sum(p.size for p in model.params.values() if p.ndim == 1)
    assert plan.num_weights == values
    assert plan.size_bits == values * 4 + values // 32 * 16
    assert plan.bits_per_weight == 4.5
    assert plan.size_bytes == plan.size_bits // 8 + 4 * norms


def test_a_plan_survives_the_disk_exactly(tmp_path, model, weights, table):
    choice = {w.path: table.schemes[i % 3] for i, w in enumerate(weights)}
    size = sum(w.size_bits(choice[w.path]) for w in weights)
    allocation = Allocation(choice, 0.1, 0.01, size, size + 3, 0.1, Status.OPTIMAL, "exact")
    plan = artifacts.plan_of_allocation("p", allocation, table, artifacts.other_bits(model, weights))
    artifacts.save_plan(tmp_path / "p.json", plan)
    again = artifacts.load_plan(tmp_path / "p.json", model, weights)
    assert again.to_json() == plan.to_json()
    assert again.choices == choice
    assert json.loads((tmp_path / "p.json").read_text())["status"] == "optimal"


def test_statistics_survive_the_disk_and_share_what_was_shared(tmp_path, model, weights):
    rng = np.random.default_rng(0)
    gram = rng.random((1, 4, 4), np.float32)
    shared = LayerStats(gram, rng.random((1, 4), np.float32), 10)
    own = LayerStats(gram + 1, shared.absmax, 12)
    path = tmp_path / "stats.safetensors"
    data = new_dataset(np.arange(12).reshape(3, 4), np.ones((3, 4), bool), np.arange(3), "text")
    artifacts.save_stats(path, {"a": shared, "b": shared, "c": own}, model.digest, data)
    again, windows = artifacts.load_stats(path, model.digest)
    assert windows == {*row_digests(data)}
    assert len(windows) == 3
    assert again["a"].gram is again["b"].gram
    np.testing.assert_array_equal(again["a"].gram, gram)
    np.testing.assert_array_equal(again["c"].gram, gram + 1)
    assert again["c"].num_tokens == 12
    with pytest.raises(MpqError, match="made for another model"):
        artifacts.load_stats(path, "other")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(MpqError, match="damaged or no file of statistics"):
        artifacts.load_stats(path, model.digest)
    path.write_bytes(content[:-8])
    with pytest.raises(MpqError, match="truncated or no file of statistics"):
        artifacts.load_stats(path, model.digest)


def test_scores_survive_the_disk_exactly(tmp_path):
    rng = np.random.default_rng(0)
    task, labels = Classification(), np.array([2, 0, 1], np.int32)
    sums = [rng.random(3), None, rng.random(3)]
    scores = DocumentScores(task, np.arange(3), rng.random(3), *sums, rng.random(3), labels, "digest")
    artifacts.save_scores(tmp_path / "x.json", scores)
    again = artifacts.load_scores(tmp_path / "x.json", task)
    assert (again.task, again.kl, again.data_digest) == (task, None, "digest")
    for name in ("document", "counts", "nll", "agree", "evidence", "labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name))


def test_a_plan_for_another_model_is_refused(tmp_path, model, weights):
    path = tmp_path / "p.json"
    artifacts.save_plan(path, artifacts.uniform_plan(parse_scheme("int4_g32"), model, weights))
    with pytest.raises(MpqError, match="also names"):
        artifacts.load_plan(path, model, weights[1:])
    other = load(str(tiny.write_folder(tmp_path / "other", weights=tiny.tensors(seed=9))))
    with pytest.raises(MpqError, match="same names but other values"):
        artifacts.load_plan(path, other, weights)
    with pytest.raises(MpqError, match="made for another model"):
        artifacts.require_model(path, model.digest, other.digest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: damage(p, "int4_g32", "int3_g32"), "its checksum differs"),
        (lambda p: p.write_text(p.read_text()[:-20]), "not JSON|truncated|JSON"),
        (lambda p: damage(p, '"kind": "plan"', '"kind": "song"'), "is no plan file .it is 'song'"),
        (lambda p: damage(p, '"schema": 1', '"schema": 99'), "has schema 99"),
        (lambda p: p.write_text("[]"), "JSON list, not a dict; it should be a plan file"),
        (lambda p: p.unlink(), "p.json"),
    ],
)
def test_a_bad_stage_file_is_refused(tmp_path, model, weights, change, message):
    path = tmp_path / "p.json"
    artifacts.save_plan(path, artifacts.uniform_plan(parse_scheme("int4_g32"), model, weights))
    change(path)
    with pytest.raises(MpqError, match=message):
        artifacts.load_plan(path, model, weights)
