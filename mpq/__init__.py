"""Which number format should every weight get, what does it cost, how sure is that, and where is the model file?

The whole pipeline on the reference language model that ships with the package:

    import jax
    import mpq

    model = mpq.load("reference")
    sets = mpq.datasets(model, mpq.RunConfig(name="example", calibration_windows=16, test_windows=16))
    traced = model.trace(batch=8, window=256)
    scored, seen = mpq.divide(sets["calibration"], 8)  # what rounding saw would flatter it
    stats = mpq.calibrate(traced, model.params, seen, batch_size=8)
    candidates = mpq.Candidates(model.params, traced.weights, mpq.GPTQ(), stats)
    schemes = tuple(map(mpq.parse_scheme, ("int2_g64", "int3_g64", "int4_g64", "int8_channel")))
    metric = mpq.METRICS["fisher"]
    table = metric(model, traced, schemes, candidates, scored, key=jax.random.key(0), batch_size=8)
    plan = mpq.solve_frontier(mpq.Problem.from_table(table)).at(bpw=3.5)
    quantized = mpq.apply_plan(model.params, traced.weights, candidates.choose(plan.choice))
    result = mpq.score(model, quantized, sets["test"], reference=model.params, batch_size=8).summary()

Every stage is also a sub-command of `mpq` and a file on disk that the next stage reads.
"""

from mpq.allocate import SOLVERS, Frontier, Problem, solve_frontier
from mpq.calibrate import calibrate
from mpq.config import RunConfig
from mpq.data import divide, make_dataset, read_documents, require_disjoint, split_documents
from mpq.eval_result import EvalResult
from mpq.evaluate import DocumentScores, Reference, score
from mpq.formats import FORMATS, parse_scheme
from mpq.inputs import Arrays, Dataset, Images, Tokens
from mpq.models import FAMILIES, Model, functional, load
from mpq.pipeline import datasets
from mpq.quantize import GPTQ, QUANTIZERS, RTN, Candidates, apply_plan
from mpq.sensitivity import METRICS
from mpq.tasks import TASKS, CausalLM, Classification, Custom, Embedding, Regression
from mpq.trace import Trace, trace
from mpq.types import Allocation, LayerStats, MpqError, QTensor, Scheme, SensitivityTable, WeightSpec

__version__ = "0.1.0"

__all__ = [
    "FAMILIES",
    "FORMATS",
    "GPTQ",
    "METRICS",
    "QUANTIZERS",
    "RTN",
    "SOLVERS",
    "TASKS",
    "Allocation",
    "Arrays",
    "Candidates",
    "CausalLM",
    "Classification",
    "Custom",
    "Dataset",
    "DocumentScores",
    "Embedding",
    "EvalResult",
    "Frontier",
    "Images",
    "LayerStats",
    "Model",
    "MpqError",
    "Problem",
    "QTensor",
    "Reference",
    "Regression",
    "RunConfig",
    "Scheme",
    "SensitivityTable",
    "Tokens",
    "Trace",
    "WeightSpec",
    "apply_plan",
    "calibrate",
    "datasets",
    "divide",
    "functional",
    "load",
    "make_dataset",
    "parse_scheme",
    "read_documents",
    "require_disjoint",
    "score",
    "solve_frontier",
    "split_documents",
    "trace",
]
