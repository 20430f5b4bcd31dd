r"""GPTQ and AWQ folders of `mpq export` in GPTQModel's own kernels, against the dequantized model in JAX.

Run:     python -m experiments.gptqmodel --python ENV/bin/python --test TEXT --out FILE
         (ENV is an environment of its own with gptqmodel, whose pins are not ours; no GPU is needed)
Expect:  KL below 1e-4, first choices equal at 99.9 % of the tokens and more
Writes:  one JSON object: by container and scheme, KL in nats per token and the share of equal first choices

The reference model, its linear layers rounded to nearest, embedding in float16. GPTQModel loads the folder as it is in
float16; its modules and buffers are then cast to float32, so that what differs is its reading of the codes.
"""

import dataclasses
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from mpq.artifacts import make_plan
from mpq.data.text import plain_tokenizer
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.files import canonical_json, write_json
from mpq.formats import parse_scheme
from mpq.hf.containers import CONTAINERS
from mpq.hf.export import save
from mpq.models import load
from mpq.quantize import RTN, Candidates
from mpq.record import RunRecord

CASES = (
    ("gptq", "int4_g32"),
    ("gptq", "int8_g32"),
    ("gptq_v2", "int4_g32_zp"),
    ("gptq_v2", "int3_g32_zp"),
    ("gptq_v2", "int2_g32_zp"),
    ("awq", "int4_g32_zp"),
)
"""Containers and schemes."""

PROGRAM = """
import sys
import gptqmodel, numpy, torch
folder, kernel, tokens, out = sys.argv[1:]
torch.set_num_threads(1)
model = gptqmodel.GPTQModel.load(folder, backend=gptqmodel.BACKEND(kernel), device="cpu", dtype=torch.float16)
model.model.float()
kinds = sorted({type(module).__name__ for module in model.model.modules() if "TorchLinear" in type(module).__name__})
with torch.no_grad():
    numpy.save(out, model.model(torch.as_tensor(numpy.load(tokens)).long()).logits.float().numpy())
print("RAN", gptqmodel.__version__, torch.__version__, *kinds)
"""
"""What the other environment runs: folder, kernel, file of tokens, file of logits."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      python: of an environment with gptqmodel.
      test: text.
      out: JSON file.
      windows: of the text, `window` tokens each.
    """

    python: Path
    test: Path
    out: Path
    windows: int = 8
    window: int = 504


def row_of(options: Options, container: str, scheme: str, folder: Path) -> dict[str, Any]:
    """One container and scheme."""
    model = load("reference")
    weights, count = model.trace(1, 16).weights, options.windows * options.window
    ids = plain_tokenizer(model.tokenizer).encode(options.test.read_text()[: 20 * count]).ids[:count]
    tokens = np.asarray(ids, np.int32).reshape(options.windows, options.window)
    choice = {w.path: parse_scheme("fp16" if "embedding" in w.kind else scheme) for w in weights}
    plan = make_plan("plan", choice, None, weights, 0, model.digest)
    qtensors = Candidates(model.params, weights, RTN()).choose(choice)
    orbax.save(folder / "plan", **export_arguments(model, weights, qtensors, plan))
    exported = orbax.load(folder / "plan")
    save(folder / "model", exported, CONTAINERS[container])
    np.save(folder / "tokens.npy", tokens)
    kernel = "awq_torch" if container == "awq" else "gptq_torch"
    files = [str(folder / name) for name in ("model", "tokens.npy", "logits.npy")]
    command = [str(options.python), "-c", PROGRAM, files[0], kernel, *files[1:]]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    said = next(line for line in ran.stdout.splitlines() if line.startswith("RAN")).split()[1:]
    want, got = np.asarray(jax.jit(model.apply)(exported.dequantized(), tokens)), np.load(folder / "logits.npy")
    p, q = (np.asarray(jax.nn.log_softmax(z), np.float64) for z in (want, got))
    return {
        "container": container,
        "scheme": scheme,
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "agreement": float((want.argmax(-1) == got.argmax(-1)).mean()),
        "tokens": count,
        "gptqmodel": said[0],
        "torch": said[1],
        "kernels": said[2:],
    }


def main(options: Options) -> None:
    """Compare, print, write."""
    rows = []
    for container, scheme in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of(options, container, scheme, Path(folder)))
        print(canonical_json(rows[-1]), end="", flush=True)
    config = dataclasses.asdict(options) | {key: getattr(options, key).name for key in ("python", "test", "out")}
    record = RunRecord.collect(config, seeds={}, inputs={"model": load("reference").digest})
    write_json(options.out, {"record": record.to_json(), "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Options))
