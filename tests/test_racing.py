"""Racing spends at most its share and loses at most a percent, on problems whose noise is known and on a tiny model."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest
from scipy import integrate, stats

from mpq.allocate import Problem, solve_frontier
from mpq.data.dataset import by_document, new_dataset
from mpq.formats import parse_scheme
from mpq.sensitivity import MeasuredKL, MemoryStore
from mpq.sensitivity.race_field import expected_regret
from mpq.sensitivity.racing import Race
from mpq.types import MpqError
from tests import sensitivity_cases, tiny
from tests.allocate_cases import table, weight
from tests.command import exit_code
from tests.sensitivity_cases import SHAPES, Shifted, make_model, random_data, traced

SCHEMES = tuple(map(parse_scheme, ("int2_g64", "int3_g64", "int4_g64", "int6_g64", "int8_channel")))
BITS = np.array([2, 3, 4, 6, 8])
BATCH = 4


@dataclasses.dataclass(frozen=True)
class World:
    """KL of every window, weight and scheme: windows differ in hardness, weights in what they make of them."""

    weights: tuple
    kl: np.ndarray
    document: np.ndarray
    counts: np.ndarray

    def measure(self, spec, scheme, first, last):
        return self.kl[first:last, self.weights.index(spec), SCHEMES.index(scheme)]

    def race(self, race):
        return race.of(self.measure, self.weights, SCHEMES, self.document, self.counts, BATCH)

    def problem(self, mean):
        return Problem.from_table(table(self.weights, mean, schemes=SCHEMES))

    @functools.cached_property
    def mean(self):
        return self.kl.sum(axis=0) / self.counts.sum()


@functools.cache
def world(seed, windows=64, weights=24, hardness=0.5, noise=0.4, documents=None):
    """Log-normal: `hardness` of a window for all, `noise` of a window for a weight, a third of that for a scheme."""
    rng = np.random.default_rng(seed)
    shapes = rng.choice([64, 128, 256], (weights, 2))
    group = [f"g{i // 2}" if i % 4 < 2 else None for i in range(weights)]  # every other pair is fused
    specs = tuple(weight(f"w{i}", *map(int, shapes[i]), group[i]) for i in range(weights))
    size = shapes.prod(axis=1)[:, None] / 1e4
    true = size * np.exp(rng.normal(0, 1.5, (weights, 1)) + rng.normal(0, 0.3, (weights, 5))) * 4.0**-BITS
    log = rng.normal(0, hardness, (windows, 1, 1)) + rng.normal(0, noise, (windows, weights, 1))
    log = log + rng.normal(0, noise / 3, (windows, weights, 5))
    counts = rng.integers(40, 64, windows)
    return World(specs, true * np.exp(log) * counts[:, None, None], np.arange(windows) % (documents or windows), counts)


def regret(full, raced, bits):
    """Loss by the full table of the plan from the raced one, over that of the full table's plan, minus 1."""
    choice = solve_frontier(raced).choice_within(bits)
    return full.loss[np.arange(len(choice)), choice].sum() / solve_frontier(full).lower_bound(bits) - 1


@pytest.mark.parametrize("options", [{}, {"noise": 0.2}, {"hardness": 0.8}, {"documents": 16}, {"windows": 128}])
@pytest.mark.parametrize("bpw", [2.6, 3.2, 4.2])
def test_a_third_of_the_passes_loses_at_most_a_percent(options, bpw):
    for seed in range(3):
        this = world(seed, **options)
        full = this.problem(this.mean)
        bits = int(bpw * full.num_weights)
        raced = this.race(Race((bits,)))
        assert raced.windows_of_all == this.kl.size
        assert raced.windows_run == raced.seen.sum() <= this.kl.size / 3
        assert regret(full, this.problem(raced.mean), bits) <= 0.01


def test_several_budgets_share_the_passes():
    this = world(0)
    full = this.problem(this.mean)
    budgets = tuple(int(bpw * full.num_weights) for bpw in (2.6, 3.2, 4.2))
    raced = this.race(Race(budgets, share=0.5))
    assert raced.windows_run <= this.kl.size / 2
    assert max(regret(full, this.problem(raced.mean), bits) for bits in budgets) <= 0.01


def test_it_loses_less_than_a_third_of_the_windows_for_every_entry():
    lost = np.zeros(2)
    for seed, bpw in itertools.product(range(6), (2.6, 3.2, 4.2)):
        this = world(seed)
        full = this.problem(this.mean)
        bits = int(bpw * full.num_weights)
        third = len(this.counts) // 3
        tables = this.race(Race((bits,))).mean, this.kl[:third].sum(axis=0) / this.counts[:third].sum()
        lost += [regret(full, this.problem(table), bits) for table in tables]
    assert lost[0] < lost[1] / 2


def test_what_plans_take_is_seen_most():
    this = world(0)
    bits = int(3.2 * this.problem(this.mean).num_weights)
    raced = this.race(Race((bits,)))
    chosen = solve_frontier(this.problem(raced.mean)).at(bits=bits).choice
    taken = np.array([[chosen[spec.path] == scheme for scheme in SCHEMES] for spec in this.weights])
    assert raced.seen[taken].mean() > 1.5 * raced.seen.mean()


def test_certain_plans_end_the_race():
    this = world(0, hardness=0.0, noise=0.0)
    full = this.problem(this.mean)
    bits = int(3.2 * full.num_weights)
    raced = this.race(Race((bits,)))
    assert raced.seen.max() <= BATCH * 2**2  # two rounds without a change; float64 sums leave errors of 1e-16
    assert regret(full, this.problem(raced.mean), bits) == pytest.approx(0, abs=1e-12)


def test_entries_that_left_early_do_not_profit_from_easy_windows():
    this = world(1, hardness=1.0, noise=0.0)
    bits = int(3.2 * this.problem(this.mean).num_weights)
    raced = this.race(Race((bits,), patience=99, share=0.5))
    most = raced.seen.max()
    want = this.kl[:most].sum(axis=0) / this.counts[:most].sum()
    early = raced.seen < most
    assert early.any()
    naive = [this.kl[:n, row, column].sum() / this.counts[:n].sum() for (row, column), n in np.ndenumerate(raced.seen)]
    assert np.abs(np.reshape(naive, want.shape) / want - 1)[early].min() > 0.05
    np.testing.assert_allclose(raced.mean, want, rtol=1e-12)  # hardness alone is a ratio, which the chain takes out


def test_expected_regret_is_the_mean_of_what_is_lost():
    for behind, error, documents in ((0.0, 1.0, 3), (0.5, 0.2, 4), (1e-3, 2e-3, 30)):
        posterior = stats.t(documents - 1, loc=behind, scale=error)
        want, _ = integrate.quad(lambda x, p=posterior: -x * p.pdf(x), -np.inf, 0)
        got = expected_regret(np.array([behind]), np.array([error]), np.array([documents]))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    unknown = expected_regret(np.zeros(4), np.array([np.nan, 1.0, 0.0, 0.0]), np.array([1, 2, 2, 9]))
    np.testing.assert_array_equal(unknown, [np.inf, np.inf, 0, 0])


def test_one_document_leaves_errors_unknown_and_the_share_is_spent():
    this = world(2, documents=1)
    raced = this.race(Race((int(3.2 * this.problem(this.mean).num_weights),)))
    assert np.isnan(raced.stderr).all()
    assert 0.2 < raced.windows_run / raced.windows_of_all <= 1 / 3


def test_windows_in_which_nothing_counts_do_not_end_the_first_round():
    this = world(0)
    empty = np.arange(len(this.counts)) < BATCH + 1
    this = World(
        this.weights, np.where(empty[:, None, None], 0.0, this.kl), this.document, np.where(empty, 0, this.counts)
    )
    raced = this.race(Race((int(3.2 * this.problem(this.mean).num_weights),)))
    assert raced.seen.min() == 2 * BATCH
    assert np.isfinite(raced.mean).all()


@pytest.mark.parametrize(
    ("budgets", "message"),
    [((), "a race needs the budgets that plans are asked for"), ((1000,), "is below the smallest reachable size")],
)
def test_budgets_out_of_reach_are_refused(budgets, message):
    with pytest.raises(MpqError, match=message):
        world(0).race(Race(budgets))


@pytest.fixture(scope="module")
def on_model():
    """A race on the tiny model, its store, and the whole table on the same windows."""
    model, data = make_model(), random_data(32)
    data = new_dataset(data.inputs, data.mask, np.arange(32) // 2, "noise")
    store, trace = MemoryStore(), traced(model, BATCH, data.inputs.shape[1])
    bits = sum(spec.size_bits(sensitivity_cases.SMALL) for spec in trace.weights) - 60
    arguments = (model, trace, sensitivity_cases.SCHEMES, Shifted(model), data)
    run = lambda: Race((bits,), share=0.6, tolerance=0.0)(*arguments, batch_size=BATCH, store=store)
    full = sensitivity_cases.run(MeasuredKL(), model, Shifted(model), by_document(data))
    return run, store, full, bits


def test_on_a_model_it_measures_what_measured_kl_does(on_model):
    run, _, full, bits = on_model
    result, raced = run()
    done = raced.seen == 32
    assert 0 < done.sum() < done.size
    np.testing.assert_allclose(result.loss_increase[done], full.loss_increase[done], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.stderr[done], full.stderr[done], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(result.loss_increase[:, 2], 0.0)  # the exact candidates, which cost nothing
    assert raced.windows_of_all == 2 * len(SHAPES) * 32
    assert raced.windows_run == raced.seen[:, :2].sum() <= 0.6 * raced.windows_of_all
    assert regret(Problem.from_table(full), Problem.from_table(result), bits) <= 0.01


def test_a_race_run_again_takes_everything_from_the_store(on_model):
    run, store, _, _ = on_model
    first, _ = run()
    before = dict(store.values)
    again, _ = run()
    assert store.values.keys() == before.keys()
    np.testing.assert_array_equal(again.loss_increase, first.loss_increase)


@pytest.fixture
def command(tmp_path, capsys):
    """`mpq sensitivity` on a tiny model; gives exit code, and what it printed."""
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(documents=100))
    here = [str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "-o", str(tmp_path / "table")]
    size = ["--window", "32", "--batch-size", "4", "--max-windows", "24", "--schemes", "int2_g16", "int4_g16"]

    def call(*options):
        return exit_code("sensitivity", *here, *size, *options), capsys.readouterr()

    return call


def test_the_command_races_for_the_plans_that_are_asked_for(command):
    code, printed = command("--metric", "kl", "--race", "4.0bpw", "--race", "int4_g16", "--json")
    assert code == 0
    body = json.loads(printed.out)
    assert body["metric"] == "kl(raced)"
    assert 0 < body["windows_run"] < body["windows_of_all"]
    code, printed = command("--metric", "kl", "--race", "4.0bpw", "--race", "int4_g16")
    assert f"raced: {body['windows_run']:,} windows ran" in printed.out


def test_other_metrics_are_not_raced(command):
    code, printed = command("--metric", "fisher", "--race", "4.0bpw")
    assert code == 2
    assert "metric 'fisher' cannot be raced" in printed.err


def test_windows_come_first_from_as_many_documents_as_there_are():
    inputs = np.arange(6)[:, None]
    data = by_document(new_dataset(inputs, inputs >= 0, np.array([5, 5, 5, 2, 2, 7]), "numbers"))
    assert data.document.tolist() == [5, 2, 7, 5, 2, 5]
    assert data.inputs[:, 0].tolist() == [0, 3, 5, 1, 4, 2]
