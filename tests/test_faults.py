"""Fault injection: ten faults that other tools shipped, each put into a run and caught by name; sound runs pass.

The runs are of a language model of 92 values with a tied embedding, and of an image classifier with two convolutions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq import checks, pipeline
from mpq.allocate import Frontier
from mpq.calibrate import calibrate
from mpq.config import RunConfig
from mpq.formats import parse_scheme
from mpq.hand_out import HandOut
from mpq.inputs import Arrays, Dataset
from mpq.models.model import Model
from mpq.quantize import GPTQ, QUANTIZERS
from mpq.sensitivity import METRICS
from mpq.tasks import Classification
from mpq.types import MpqError
from tests.sensitivity_cases import make_model, random_data

CONFIG = RunConfig(
    name="faults",
    schemes=("int2_g4", "int4_g4", "int8_channel"),
    metrics=("kl",),
    compare_methods=(),
    budgets=("10bpw",),
    hand_out="10bpw",
    window=6,
    batch_size=4,
    sensitivity_windows=(("kl", 8),),
    propagate=False,
)


def classify(p, x):
    """Two convolutions, the mean over positions, and a head."""
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID")
    layout = ("NHWC", "HWIO", "NHWC")
    h = jax.nn.relu(conv(x, p["conv1"], dimension_numbers=layout))
    h = jax.nn.relu(conv(h, p["conv2"], dimension_numbers=layout))
    return h.mean(axis=(1, 2)) @ p["head"]


@functools.cache  # as `make_model`
def image_model():
    shapes = {"conv1": (2, 2, 2, 4), "conv2": (2, 2, 4, 4), "head": (4, 3)}
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) / 2  # small enough that no class is certain: then nothing would count
    params = {name: jnp.asarray(draw(shape), jnp.float32) for name, shape in shapes.items()}
    stored = dict.fromkeys(params, "float32")
    return Model(classify, params, stored, "images", Arrays((5, 5, 2)), Classification())


def image_data(count, seed):
    rng, document = np.random.default_rng(seed), np.arange(count, dtype=np.int32)
    inputs, labels = rng.normal(size=(count, 5, 5, 2)).astype(np.float32), rng.integers(3, size=count)
    return Dataset(inputs, np.ones(count, bool), document, "noise", f"{count} images {seed}", labels)


@functools.cache  # what is compiled for a trace serves every run of it
def traced(model):
    return model.trace(CONFIG.batch_size, CONFIG.window)


def make_run(folder, make=make_model, seed=0, **changes):
    """A run whose parameters and data the seed decides."""
    data = random_data if make is make_model else image_data
    sizes = {"calibration": 22, "selection": 6, "test": 6}  # 8 for losses, 14 for statistics
    sets = {name: data(size, seed=3 * seed + i) for i, (name, size) in enumerate(sizes.items())}
    rng = np.random.default_rng(seed)
    params = {name: p * jnp.float32(rng.uniform(0.5, 1.5)) for name, p in make().params.items()}
    model = dataclasses.replace(make(), params=params)
    run = pipeline.Run(dataclasses.replace(CONFIG, seed=seed, **changes), model, sets, folder)
    run.__dict__["traced"] = traced(make())
    return run


def deaf_calibration(monkeypatch, run):
    """Calibration changed nothing for months (keras PR #23512): a rounding algorithm that never sees its statistics."""

    @dataclasses.dataclass(frozen=True)
    class Deaf:
        name = "gptq"
        data_aware = True

        def __call__(self, w, scheme, gram=None):
            return GPTQ()(w, scheme)

    monkeypatch.setattr(pipeline, "QUANTIZERS", {"gptq": Deaf()})
    return run


def dead_module(monkeypatch, run):
    """Scores were collected at a module that is never called (ModelOpt #641)."""

    def hooked(*arguments):
        stats = calibrate(*arguments)
        nothing = dataclasses.replace(
            stats["up"], gram=np.zeros_like(stats["up"].gram), absmax=np.zeros_like(stats["up"].absmax)
        )
        return stats | {"up": nothing}

    monkeypatch.setattr(pipeline, "calibrate", hooked)
    return run


def floor(monkeypatch, run):
    """Every budget got the smallest scheme (mlx-lm #1758)."""
    monkeypatch.setattr(Frontier, "at", lambda self, bits: self[0])
    return run


def overshoot(monkeypatch, run):
    """A target of 2.80 bits became 2.94 (AutoRound #2186)."""
    at = Frontier.at
    monkeypatch.setattr(Frontier, "at", lambda self, bits: at(self, bits=int(bits * 2.9364 / 2.80)))
    return run


def not_a_number(monkeypatch, run):
    """A metric that is NaN or infinite went into the linear program (Sony MCT #1682)."""

    def measure(*arguments, **options):
        table = METRICS["kl"](*arguments, **options)
        loss = table.loss_increase.copy()
        loss[1, 0] = np.nan
        return dataclasses.replace(table, loss_increase=loss)

    monkeypatch.setattr(pipeline, "METRICS", {"kl": measure})
    return run


def decaying_statistics(monkeypatch, run):
    """An average over batches in which earlier ones decay to nothing (NNCF, `HESSIAN_INPUT_ACTIVATION`)."""

    def decaying(traced, params, data, batch_size, weightings):
        found = {}
        for start in range(0, len(data.inputs), batch_size):
            rows = slice(start, start + batch_size)
            part = dataclasses.replace(
                data, inputs=data.inputs[rows], mask=data.mask[rows], document=data.document[rows]
            )
            for path, stats in calibrate(traced, params, part, batch_size, weightings).items():
                before = found.get(path, stats)
                gram = (before.gram + stats.gram) / 2
                found[path] = dataclasses.replace(stats, gram=gram, absmax=np.maximum(before.absmax, stats.absmax))
        return found

    monkeypatch.setattr(pipeline, "calibrate", decaying)
    return run


def unsigned_comparison(monkeypatch, run):
    """`uint64 delta_cost < 0` is never true, so the search never leaves its start (exllamav2, ext_quant.cpp)."""

    def anneal(self, bits):
        problem, rng = self.problem, np.random.default_rng(0)
        choice = problem.size_bits.argmin(axis=1)
        loss, fixed = problem.fixed_point[0], np.arange(len(choice))
        for _ in range(1000):
            proposal = choice.copy()
            proposal[rng.integers(len(choice))] = rng.integers(len(problem.schemes))
            if problem.size_bits[fixed, proposal].sum() > bits:
                continue
            delta = loss[fixed, proposal].sum() - loss[fixed, choice].sum()
            if delta.astype(np.uint64) < 0:
                choice = proposal
        return problem.allocation(choice, budget_bits=bits, lower_bound=-(2**60), solver="annealing")

    monkeypatch.setattr(Frontier, "at", anneal)
    return run


def stale_cache(monkeypatch, run):
    """Stages of another config were reused, for the folder's name did not depend on what was changed."""
    checks.check(HandOut(run))
    return make_run(run.folder, sensitivity_windows=(("kl", 12),))


def tied_twice(monkeypatch, run):
    """A tied embedding was counted as an embedding and as a head."""
    trace = run.traced
    table = next(spec for spec in trace.weights if spec.path == "table")
    assert [use.kind for use in table.uses] == ["embedding", "matmul"]
    run.__dict__["traced"] = dataclasses.replace(
        trace, weights=(*trace.weights, dataclasses.replace(table, path="head", group="head"))
    )
    return run


def fallback(monkeypatch, run):
    """A scheme that does not fit a row silently became another (llama.cpp's K-quants, width % 256 != 0)."""

    @dataclasses.dataclass(frozen=True)
    class Falling:
        name = "gptq"
        data_aware = True

        def __call__(self, w, scheme, gram=None):
            fits = scheme.group_size is None or w.shape[-2] % scheme.group_size == 0
            return GPTQ()(w, scheme if fits else parse_scheme("int8_channel"), gram)

    monkeypatch.setattr(pipeline, "QUANTIZERS", {"gptq": Falling()})
    return run


FAULTS = {
    deaf_calibration: "calibration changed nothing: gptq rounds all",
    dead_module: "weight up saw no input but zeros in calibration",
    floor: "bits unused although .* fits and loses less",
    overshoot: "bits more than its budget",
    not_a_number: "the loss increase of weight value at int2_g4 is nan",
    decaying_statistics: "when the calibration set is read backwards and in other batches",
    unsigned_comparison: "bits unused although .* fits and loses less|fit together and lose less",
    stale_cache: "the sensitivities by kl in .* are stale: they were made from other data",
    tied_twice: "parameter table of 28 values is counted as 56, in 2 weights",
    fallback: r"gives down of 6 rows int\d_g4, and it is stored as int8_channel",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_fault_is_caught_by_name(fault, tmp_path, monkeypatch):
    run = fault(monkeypatch, make_run(tmp_path / "run"))
    with pytest.raises(MpqError, match=FAULTS[fault]):
        checks.check(HandOut(run))


@pytest.mark.parametrize("make", [make_model, image_model], ids=["text", "images"])
@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("seed", range(5))
def test_a_sound_run_raises_no_alarm(make, method, seed, tmp_path):
    metric = ("kl", "weight_mse")[seed % 2]
    changes = {"method": method, "metrics": (metric,), "allocate_by": metric, "batch_size": 3 + seed % 2}
    changes |= {"budgets": ("8bpw", "int4_g4"), "hand_out": "8bpw"}
    assert len(checks.check(HandOut(make_run(tmp_path, make, seed, **changes)))) == 10


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"schemes": ("int2_g4", "int4_g4", "int4_channel")}, "sensitivities by kl .* from other schemes"),
        ({"method": "rtn"}, "sensitivities by kl .* from other rounding algorithm"),
        ({"seed": 1}, "was made for another model"),
    ],
)
def test_a_folder_of_another_run_is_named(change, what, tmp_path):
    run = make_run(tmp_path)
    checks.check(HandOut(run))
    if "method" in change:  # the name of the file says the algorithm: a fault that loses it
        (tmp_path / "sensitivity-kl-gptq.json").rename(tmp_path / "sensitivity-kl-rtn.json")
    with pytest.raises(MpqError, match=what):
        checks.check(HandOut(make_run(tmp_path, **change)))


def test_scores_of_other_data_are_named(tmp_path):
    run = make_run(tmp_path)
    checks.check(HandOut(run))
    again = make_run(tmp_path)
    other = dataclasses.replace(again, sets={**again.sets, "test": random_data(5, seed=99)})
    other.__dict__["traced"] = run.traced
    with pytest.raises(MpqError, match=r"the scores of .* are stale: they are not of this config's test set"):
        checks.check(HandOut(other))
