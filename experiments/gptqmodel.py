r"""GPTQ and AWQ folders of `mpq export` in the loaders of PyTorch, and GPTQModel's own with act-order read back.

Run:     python -m experiments.gptqmodel --python ENV/bin/python --test TEXT --out FILE
         (ENV is an environment of its own with gptqmodel, optimum and accelerate, whose pins are not ours; no GPU)
Expect:  KL below 1e-5, first choices equal at 99.7 % of the tokens and more; in float32 below 1e-6 and at 99.9 %
Writes:  one JSON object: by container, scheme and loader, KL in nats per token to the dequantized model in JAX and the
         share of equal first choices

The reference model, its linear layers rounded to nearest, embedding in float16. `gptqmodel` loads the folder as it is
in float16; its modules and buffers are then cast to float32, so that what differs is its reading of the codes.
`transformers` is `AutoModelForCausalLM.from_pretrained` and nothing else, with the kernels that it chooses. The rows
with `desc_act` are the other way round: GPTQModel rounds the model in the order of activations, JAX reads its folder.
"""

import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.kept import keep, named_options
from mpq.artifacts import make_plan
from mpq.data.text import plain_tokenizer
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.formats import parse_scheme
from mpq.hf.containers import CONTAINERS
from mpq.hf.export import save
from mpq.hf.load import load_codes
from mpq.models import load
from mpq.models.hub import resolve
from mpq.quantize import RTN, Candidates
from mpq.record import RunRecord
from mpq.types import Params

CASES = (
    ("gptq", "int4_g32"),
    ("gptq", "int8_g32"),
    ("gptq_v2", "int4_g32_zp"),
    ("gptq_v2", "int3_g32_zp"),
    ("gptq_v2", "int2_g32_zp"),
    ("awq", "int4_g32_zp"),
)
"""Containers and schemes."""

LOADERS = (("gptqmodel", "float32"), ("transformers", "float32"), ("transformers", "float16"))
"""Who loads a folder, and the dtype of what multiplies its weights."""

PROGRAM = """
import sys
import gptqmodel, numpy, torch, transformers
folder, loader, kernel, dtype, tokens, out = sys.argv[1:]
torch.set_num_threads(1)
if loader == "gptqmodel":
    model = gptqmodel.GPTQModel.load(folder, backend=gptqmodel.BACKEND(kernel), device="cpu", dtype=torch.float16).model
    model.to(getattr(torch, dtype))
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map="cpu")
kinds = {type(module).__name__ for module in model.modules() if type(module).__module__.startswith("gptqmodel.")}
with torch.no_grad():
    numpy.save(out, model(torch.as_tensor(numpy.load(tokens)).long()).logits.float().numpy())
print("RAN", gptqmodel.__version__, transformers.__version__, torch.__version__, *sorted(kinds))
"""
"""What the other environment runs: folder, loader, its kernel, dtype, file of tokens, file of logits."""

ROUND = """
import os, sys
os.cpu_count = lambda: 4  # gptqmodel 7.7 asks for two of its workers, and has one where there are two processors
import gptqmodel, numpy, torch
source, tokens, bits, symmetric, out = sys.argv[1:]
torch.set_num_threads(1)
how = dict(bits=int(bits), group_size=32, sym=symmetric == "True", desc_act=True, act_group_aware=False, device="cpu")
model = gptqmodel.GPTQModel.load(source, gptqmodel.QuantizeConfig(**how), dtype=torch.float32)
windows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in numpy.load(tokens).tolist()]
model.quantize(windows, batch_size=4)
model.save(out)
"""
"""What the other environment runs to round a model: its folder, file of tokens, bits, symmetric or not, folder."""

ROUNDED = ((4, True), (4, False), (8, True))
"""Bits, and whether they are symmetric, of what GPTQModel rounds; its groups are of 32."""


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


def tokens_of(options: Options) -> np.ndarray:
    """`int32[windows, window]` of the text."""
    count = options.windows * options.window
    text = options.test.read_text()[: 20 * count]
    ids = plain_tokenizer(load("reference").tokenizer).encode(text).ids[:count]
    return np.asarray(ids, np.int32).reshape(options.windows, options.window)


def exported(container: str, scheme: str, folder: Path) -> Params:
    """The reference model's folder in a container, and the parameters that it stands for."""
    model = load("reference")
    weights = model.trace(1, 16).weights
    choice = {w.path: parse_scheme("fp16" if "embedding" in w.kind else scheme) for w in weights}
    plan = make_plan("plan", choice, None, weights, 0, model.digest)
    qtensors = Candidates(model.params, weights, RTN()).choose(choice)
    orbax.save(folder / "plan", **export_arguments(model, weights, qtensors, plan))
    read = orbax.load(folder / "plan")
    save(folder / "model", read, CONTAINERS[container])
    return read.dequantized()


def rounded(options: Options, bits: int, symmetric: bool, folder: Path) -> tuple[Params, int]:
    """GPTQModel's folder of the reference model, what JAX reads of it, and how many weights are in act-order."""
    arguments = [resolve("reference"), folder / "tokens.npy", bits, symmetric, folder / "model"]
    subprocess.run([str(options.python), "-c", ROUND, *map(str, arguments)], capture_output=True, check=True)
    read = load_codes(folder / "model")
    return read.dequantized(), sum(qtensor.row_group is not None for qtensor in read.qtensors.values())


def compared(options: Options, folder: Path, params: Params, awq: bool) -> Iterator[dict[str, Any]]:
    """One row a loader, of `folder / "model"` on `folder / "tokens.npy"`."""
    tokens, kernel = np.load(folder / "tokens.npy"), "awq_torch" if awq else "gptq_torch"
    want = np.asarray(jax.jit(load("reference").apply)(params, tokens))
    p = np.asarray(jax.nn.log_softmax(want), np.float64)
    for loader, dtype in LOADERS:
        files = [str(folder / name) for name in ("model", "tokens.npy", "logits.npy")]
        command = [str(options.python), "-c", PROGRAM, files[0], loader, kernel, dtype, *files[1:]]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        said = next(line for line in ran.stdout.splitlines() if line.startswith("RAN")).split()[1:]
        got = np.load(folder / "logits.npy")
        q = np.asarray(jax.nn.log_softmax(got), np.float64)
        yield {
            "loader": loader,
            "dtype": dtype,
            "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
            "agreement": float((want.argmax(-1) == got.argmax(-1)).mean()),
            "tokens": tokens.size,
            "versions": dict(zip(("gptqmodel", "transformers", "torch"), said, strict=False)),
            "kernels": said[3:],
        }


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """Of our folders, then of GPTQModel's."""
    tokens = tokens_of(options)
    with tempfile.TemporaryDirectory() as name:
        for index, (container, scheme) in enumerate(CASES):
            (folder := Path(name) / f"ours{index}").mkdir()
            np.save(folder / "tokens.npy", tokens)
            head: dict[str, Any] = {"container": container, "scheme": scheme, "desc_act": False}
            for row in compared(options, folder, exported(container, scheme, folder), container == "awq"):
                yield head | row
        for index, (bits, symmetric) in enumerate(ROUNDED):
            (folder := Path(name) / f"theirs{index}").mkdir()
            np.save(folder / "tokens.npy", tokens)
            params, ordered = rounded(options, bits, symmetric, folder)
            scheme = f"int{bits}_g32{'' if symmetric else '_zp'}"
            head = {"container": "gptq", "scheme": scheme, "desc_act": True, "ordered_weights": ordered}
            for row in compared(options, folder, params, awq=False):
                yield head | row


def main(options: Options) -> None:
    """Compare, print, write."""
    config = named_options(options, ("python", "test", "out"))
    record = RunRecord.collect(config, seeds={}, inputs={"model": load("reference").digest})
    keep(rows(options), options.out, {"record": record.to_json()}, [])


if __name__ == "__main__":
    main(tyro.cli(Options))
