"""Quantizes a model with a peer's own code, in the peer's environment, for `experiments/weight_peers.py`.

Run:     ENV/bin/python experiments/weight_peer_worker.py JOB.json
Writes:  logits of every text as `float32[windows, time, vocabulary]`, and `made.json` beside them

Imports nothing of this repository: the environment need not have its packages. A job names `folder` (Hugging Face
layout), `method` (of `METHODS`), its `options`, files of tokens `int32[windows, time]` for `calibration` and for each
of `texts`, the folder `out`, `save`, where a method that makes a checkpoint leaves it, and `beside`, a checkpoint that
the same method is to read and run in turns. `made.json` has what was quantized, `layers`: name, rows, columns, bits of
a code, values that share a scale, bits of a scale and of a zero point, and whether a group may go on in the next row;
seconds, also of the processor; versions; with `beside` its `turns`: seconds of a batch, and those of the other.
"""

import copy
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("torch", "transformers", "auto-round", "hqq", "bitsandbytes", "nvidia-modelopt", "torchao", "GPTQModel")
BATCH = 8
REPEATS = 21
"""Of a batch that is timed."""

Job = Mapping[str, Any]
Layer = Sequence[Any]
Quantized = tuple[Any, Sequence[Layer]]


def loaded(folder: str, **options: Any) -> Any:
    """The model of a folder in float32."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    options = {"dtype": torch.float32, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def linear(model: Any) -> Iterator[tuple[str, Any]]:
    """Linear layers of the decoder's blocks."""
    torch = importlib.import_module("torch")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            yield name, module


def batches(tokens: np.ndarray) -> Iterator[Any]:
    """`int64[BATCH, time]`, tensors."""
    torch = importlib.import_module("torch")
    for start in range(0, len(tokens), BATCH):
        yield torch.from_numpy(np.asarray(tokens[start : start + BATCH], np.int64))


def checkpoint(folder: str) -> str:
    """The folder at or below this one that has the configuration."""
    return str(next(Path(folder).rglob("config.json")).parent)


def in_turns(models: Sequence[Any], batch: Any) -> list[float]:
    """Median seconds of a batch, of every model; each is run in every round."""
    spent: list[list[float]] = [[] for _ in models]
    for _ in range(REPEATS):
        for model, seconds in zip(models, spent, strict=True):
            start = time.perf_counter()
            model(batch)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in spent]


def nothing(job: Job, tokens: np.ndarray) -> Quantized:
    """The folder as it is, quantized or not."""
    del tokens
    return loaded(job["folder"], **job["options"]), []


def _auto_round(job: Job, options: Mapping[str, Any], tokens: np.ndarray) -> Any:
    """AutoRound with `options`: `bits`, or AutoScheme at `avg_bits` among `choices`; `group_size`, and `sym`."""
    torch, package = importlib.import_module("torch"), importlib.import_module("auto_round")
    model = loaded(job["folder"])
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(job["folder"])
    shared: dict[str, Any] = {"nsamples": len(tokens), "seqlen": tokens.shape[1], "batch_size": BATCH}
    shared |= {"device_map": "cpu", "enable_torch_compile": False, "amp": False}
    if "avg_bits" in options:
        text = Path(job["out"]) / "calibration.json"  # AutoScheme reads texts alone: windows and what follows them
        ids = [int(token) for window in tokens for token in window[1:]]
        starts = range(0, len(ids), tokens.shape[1] - 1)
        text.write_text(json.dumps([tokenizer.decode(ids[i : i + 2 * tokens.shape[1]]) for i in starts]))
        width = {"group_size": options["group_size"], "sym": options["sym"], "data_type": "int", "act_bits": 16}
        schemes = [package.QuantizationScheme.from_dict({"bits": b, **width}) for b in options["choices"]]
        scheme = package.AutoScheme(avg_bits=options["avg_bits"], options=schemes)
        return package.AutoRound(model, tokenizer, scheme=scheme, dataset=str(text), **shared)
    data = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches(tokens)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    return package.AutoRound(model, tokenizer, scheme="W4A16", dataset=loader, **options, **shared)


def auto_round(job: Job, tokens: np.ndarray) -> Quantized:
    """AutoRound as the options have it, its weights rounded in place."""
    model, config = _auto_round(job, job["options"], tokens).quantize()
    layers = []
    for name, module in linear(model):
        own = config[name]
        if own["bits"] < 16:
            size = own["group_size"], 16, 0 if own["sym"] else own["bits"]
            layers.append((name, *module.weight.shape, own["bits"], *size, False))
    return model, layers


def auto_round_folder(job: Job, tokens: np.ndarray) -> Quantized:
    """AutoRound's own folder in `format`, beside the options of `auto_round`, as stock transformers loads it."""
    options = {name: value for name, value in job["options"].items() if name != "format"}
    _auto_round(job, options, tokens).quantize_and_save(job["save"], format=job["options"]["format"])
    return loaded(checkpoint(job["save"])), []


def hqq(job: Job, tokens: np.ndarray) -> Quantized:
    """HQQ, without data: `bits`, `group_size`; scales and zero points count 16 bits."""
    del tokens
    torch, package = importlib.import_module("torch"), importlib.import_module("hqq.core.quantize")
    model, layers, (bits, group) = loaded(job["folder"]), [], (job["options"]["bits"], job["options"]["group_size"])
    config = package.BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    for name, module in linear(model):
        made = package.HQQLinear(
            copy.deepcopy(module), config, compute_dtype=torch.float32, device="cpu", initialize=True
        )
        module.weight.data = made.dequantize().reshape(module.weight.shape)
        layers.append((name, *module.weight.shape, bits, group, 16, 16, True))
    return model, layers


def bitsandbytes(job: Job, tokens: np.ndarray) -> Quantized:
    """NF4 or FP4 without data: `quant_type`, `blocksize`, `double`.

    Codes and scales are bitsandbytes', their product is taken here: its own kernel for CPUs goes wrong where a block is
    no part of a row.
    """
    del tokens
    torch, package = importlib.import_module("torch"), importlib.import_module("bitsandbytes.functional")
    model, layers, options = loaded(job["folder"]), [], job["options"]
    block, double = options["blocksize"], options["double"]
    for name, module in linear(model):
        shape = module.weight.shape
        packed, state = package.quantize_4bit(
            module.weight.data, blocksize=block, quant_type=options["quant_type"], compress_statistics=double
        )
        absmax = state.absmax
        if double:
            absmax = package.dequantize_blockwise(state.absmax, state.state2) + state.offset
        pairs = packed.reshape(-1).long()
        codes = torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1)[: shape.numel()]
        values = state.code[codes] * absmax.float().repeat_interleave(block)[: shape.numel()]
        module.weight.data = values.reshape(shape)
        layers.append((name, *shape, 4, block, 8 + 32 / 256 if double else 32, 0, True))
    return model, layers


def bitsandbytes_folder(job: Job, tokens: np.ndarray) -> Quantized:
    """Of transformers with bitsandbytes: `quant_type`, `double`; logits are those of its own layers."""
    del tokens
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job["options"]["quant_type"],
        bnb_4bit_use_double_quant=job["options"]["double"],
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = loaded(job["folder"], quantization_config=config)
    model.save_pretrained(job["save"])
    return model, []


def modelopt(job: Job, tokens: np.ndarray) -> Quantized:
    """ModelOpt's configuration `config`, its weights in `bits` with a scale of 16 bits for `group_size` values."""
    torch, package = importlib.import_module("torch"), importlib.import_module("modelopt.torch.quantization")
    model, options = loaded(job["folder"]), job["options"]
    config = copy.deepcopy(getattr(package, options["config"]))
    for entry in config["quant_cfg"]:
        if entry.get("quantizer_name") == "*weight_quantizer" and entry.get("cfg"):
            entry["cfg"] = {"num_bits": options["bits"], "block_sizes": {-1: options["group_size"], "type": "static"}}

    def run(module: Any) -> None:
        with torch.no_grad():
            for batch in batches(tokens):
                module(batch)

    package.quantize(model, config, run)
    sizes = options["bits"], options["group_size"], 16, 0, False
    return model, [(name, *module.weight.shape, *sizes) for name, module in linear(model)]


def torchao(job: Job, tokens: np.ndarray) -> Quantized:
    """Weights of torchao in `bits`, a scale of 16 bits for `group_size` values."""
    del tokens
    torch, ao = importlib.import_module("torch"), importlib.import_module("torchao.quantization")
    model, bits, group = loaded(job["folder"]), job["options"]["bits"], job["options"]["group_size"]
    layers = [(name, *module.weight.shape, bits, group, 16, 0, False) for name, module in linear(model)]
    config = ao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=ao.PerGroup(group))
    in_blocks = lambda module, name: isinstance(module, torch.nn.Linear) and ".layers." in name
    ao.quantize_(model, config, filter_fn=in_blocks)
    return model, layers


def gptqmodel(job: Job, tokens: np.ndarray) -> Quantized:
    """GPTQModel: `bits`, `group_size`, `sym`; its folder, read back by its own kernel."""
    torch, package = importlib.import_module("torch"), importlib.import_module("gptqmodel")
    options, folder = job["options"], job.get("save") or str(Path(job["out"]) / "folder")
    model = package.GPTQModel.load(job["folder"], package.QuantizeConfig(device="cpu", **options), dtype=torch.float32)
    data = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in tokens.tolist()]
    model.quantize(data, batch_size=BATCH)
    sizes = options["bits"], options["group_size"], 16, 0 if options["sym"] else options["bits"], False
    layers = [(name, *module.weight.shape, *sizes) for name, module in linear(loaded(job["folder"]))]
    model.save(folder)
    return read_by_gptqmodel({"folder": folder}, tokens)[0], layers


def read_by_gptqmodel(job: Job, tokens: np.ndarray) -> Quantized:
    """A folder in GPTQModel's own kernel, its numbers cast to float32."""
    del tokens
    torch, package = importlib.import_module("torch"), importlib.import_module("gptqmodel")
    backend = package.BACKEND("gptq_torch")
    model = package.GPTQModel.load(job["folder"], backend=backend, device="cpu", dtype=torch.float16)
    return model.model.float(), []


METHODS: Mapping[str, Callable[[Job, np.ndarray], Quantized]] = {
    f.__name__: f
    for f in (
        nothing,
        auto_round,
        auto_round_folder,
        hqq,
        bitsandbytes,
        bitsandbytes_folder,
        modelopt,
        torchao,
        gptqmodel,
        read_by_gptqmodel,
    )
}
MODULES: Mapping[str, tuple[str, ...]] = {
    "auto_round": ("auto_round",),
    "auto_round_folder": ("auto_round",),
    "hqq": ("hqq.core.quantize",),
    "bitsandbytes": ("bitsandbytes.functional",),
    "bitsandbytes_folder": ("bitsandbytes",),
    "modelopt": ("modelopt.torch.quantization",),
    "torchao": ("torchao.quantization",),
    "gptqmodel": ("gptqmodel",),
    "read_by_gptqmodel": ("gptqmodel",),
}
"""What a method imports."""

READERS = ("nothing", "read_by_gptqmodel")
"""What runs a folder as it is."""


def versions() -> dict[str, str]:
    """Of the peers that this environment has."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(path: str) -> None:
    """Quantize, run, write."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with its own default it fails on two cores
    job = json.loads(Path(path).read_text())
    out = Path(job["out"])
    for module in ("transformers", *MODULES.get(job["method"], ())):
        importlib.import_module(module)
    if job["method"] not in READERS:
        loaded(job["folder"])  # what PyTorch does once is not timed
    start, cpu = time.perf_counter(), time.process_time()
    model, layers = METHODS[job["method"]](job, np.load(job["calibration"]))
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    with torch.no_grad():
        for name, file in job["texts"].items():
            logits = [model(batch).logits.float().numpy() for batch in batches(np.load(file))]
            np.save(out / f"{name}.npy", np.concatenate(logits))
    made = {"layers": layers, "versions": versions(), **{key: round(value, 2) for key, value in spent.items()}}
    if "beside" in job:
        tokens = np.load(job["calibration"])
        other, _ = METHODS[job["method"]]({**job, "folder": checkpoint(job["beside"])}, tokens)
        with torch.no_grad():
            made["turns"] = in_turns([model, other], next(batches(tokens)))
    (out / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1])
