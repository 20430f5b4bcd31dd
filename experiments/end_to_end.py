r"""How long `mpq run` takes from the first import to the report and the packed model, and what it spends it on.

Run:     python -m experiments.end_to_end --model DIR --data TEXT --out FILE
Expect:  a model of 1M parameters in less than 30 s, the reference model in less than 3 minutes
Writes:  one JSON object: by model, wall seconds and those of the processor, how many of them JAX traced, lowered and
         compiled, seconds by stage, and what came out

The run is the quickstart's with one metric, one budget and one rounding algorithm: what another tool does that is given
a model, a text and a size. A process measures one model, because a second would find its programs compiled.
"""

import time

START = time.perf_counter()

import dataclasses  # noqa: E402 - the clock starts before anything else does
import os  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import tyro  # noqa: E402

from experiments.kept import keep, rows_in  # noqa: E402
from mpq.commands import run  # noqa: E402
from mpq.files import read_json  # noqa: E402
from mpq.models.hub import model_name, resolve  # noqa: E402
from mpq.record import RunRecord  # noqa: E402

CONFIG = Path(__file__).parent / "configs" / "quickstart.py"
PARTS = {"jaxpr_trace": "traced", "jaxpr_to_mlir_module": "lowered", "backend_compile": "compiled"}
"""What JAX tells of, by the names that stand in a row."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
      model: a folder, or `reference`.
      data: text, or `reference`.
      out: JSON file.
      budget: of the plan that is handed out.
      settings: of the config, `name=value`, beside the model, the text and the budget.
    """

    model: str
    data: str
    out: Path
    budget: str = "3.5bpw"
    settings: tuple[str, ...] = (
        "schemes=int2_g32,int3_g32,int4_g32,int8_channel",
        "metrics=fisher",
        "allocate_by=fisher",
        "compare_methods=",
        "sensitivity_windows=fisher:16",
        "selection_windows=16",
        "test_windows=16",
        "batch_size=8",
    )


def measured(options: Options) -> dict[str, Any]:
    """The row of one model."""
    spent = dict.fromkeys(PARTS.values(), 0.0)

    def tell(event: str, duration_secs: float, **_: Any) -> None:
        for name, part in PARTS.items():
            if event.endswith(f"/{name}_duration"):
                spent[part] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(tell)
    own = (f"model={options.model}", f"data={options.data}")
    budget = (f"budgets={options.budget}", f"hand_out={options.budget}")
    with tempfile.TemporaryDirectory() as folder:
        body = run(str(CONFIG), [*options.settings, *own, *budget], Path(folder))
        seconds, cpu = time.perf_counter() - START, time.process_time()
        stages = read_json(Path(body["run"]) / "costs.json", "costs of a run")["seconds"]
    return {
        "model": model_name(options.model, resolve(options.model)),
        "budget": options.budget,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        **{part: round(value, 2) for part, value in spent.items()},
        "stages": {stage: round(value, 2) for stage, value in stages.items()},
        "plans": body["plans"],
    }


def main(options: Options) -> None:
    """Run, print, add to the file."""
    done = [row for row in rows_in(options.out) if row["model"] != model_name(options.model, resolve(options.model))]
    config = dataclasses.asdict(options) | {"out": options.out.name, "data": Path(options.data).name}
    config["model"] = model_name(options.model, resolve(options.model))
    record = RunRecord.collect(config, seeds={"run": 0}, inputs={}).to_json()
    keep([measured(options)], options.out, {"record": record}, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
