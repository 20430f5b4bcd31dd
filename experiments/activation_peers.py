r"""Rounded weights and activations of ModelOpt and torchao beside ours: the same model, windows, bits and scales.

Run:     python -m experiments.activation_peers --model DIR --data TEXT --test TEXT --out FILE
         (a Llama folder; needs transformers, PyTorch, torchao and nvidia-modelopt)
Expect:  a lower KL to the original in every row
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by setting of a peer, perplexity and KL to the original in nats per token, with standard
         errors over windows, theirs and ours; which of ours has the least KL on the calibration text, `chosen`;
         `python -m analysis.activations` draws up the table

All quantize what the decoder's blocks multiply, in the same number of bits and with scales of the same granularity, and
calibrate on the same text. Theirs: `torchao.quantization.quantize_` with dynamic activations, a scale a token;
`modelopt.torch.quantization.quantize` with its configuration of that name, and SmoothQuant with a range for every
tensor from calibration, at fewer bits too. They simulate what integers compute, or compute it, on the CPU; the logits
are theirs. Ours: settings of `experiments.activations`, named in every row.
"""

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments import activations
from experiments.activations import SETTINGS, Comparison
from experiments.kept import keep, named_options, rows_in
from mpq.config import known
from mpq.evaluate import Reference
from mpq.models import Model
from mpq.record import RunRecord

Logits = Callable[[np.ndarray], np.ndarray]
"""`int[windows, time]` -> `float32[windows, time, vocabulary]`."""

CALIBRATION = "calibration"
"""The text that a setting of ours is chosen on."""

_FOUR_BITS: Mapping[str, Any] = {"num_bits": 4, "block_sizes": {-1: 32}}
_FOUR_BITS_TENSOR: Mapping[str, Any] = {"num_bits": 4, "axis": None}


class Peer(NamedTuple):
    """A setting of a peer.

    Attributes:
      package: `torchao` or `modelopt`.
      config: name of the configuration, in the package's own words.
      ours: the settings that stand beside it.
      weight, activation: changed parts of ModelOpt's configuration.
    """

    package: str
    config: str
    ours: tuple[str, ...]
    weight: Mapping[str, Any] | None = None
    activation: Mapping[str, Any] | None = None


PEERS: Mapping[str, Peer] = {
    "torchao W8A8 dynamic": Peer(
        "torchao", "Int8DynamicActivationInt8WeightConfig", ("W8A8 dynamic", "W8A8 dynamic, online")
    ),
    "torchao W4g32A8 dynamic": Peer(
        "torchao", "Int8DynamicActivationIntxWeightConfig", ("W4g32A8 dynamic", "W4g32A8 dynamic, online")
    ),
    "ModelOpt W8A8 static": Peer(
        "modelopt",
        "INT8_DEFAULT_CFG",
        ("W8A8 static, MSE", "W8A8 static, MSE, online", "W8A8 static, MSE, smoothed, online"),
    ),
    "ModelOpt W8A8 static, SmoothQuant": Peer(
        "modelopt",
        "INT8_SMOOTHQUANT_CFG",
        ("W8A8 static, MSE, smoothed", "W8A8 static, absmax, smoothed", "W8A8 static, MSE, smoothed, online"),
    ),
    "ModelOpt W4g32A8 static, SmoothQuant": Peer(
        "modelopt",
        "INT8_SMOOTHQUANT_CFG",
        ("W4g32A8 static, MSE, online", "W4g32A8 static, zero point, smoothed, online"),
        weight=_FOUR_BITS,
    ),
    "ModelOpt W4g32A4 static, SmoothQuant": Peer(
        "modelopt",
        "INT8_SMOOTHQUANT_CFG",
        ("W4g32A4 static, MSE, smoothed", "W4g32A4 static, MSE, smoothed, online"),
        weight=_FOUR_BITS,
        activation=_FOUR_BITS_TENSOR,
    ),
    "ModelOpt W8A8 FP8": Peer(
        "modelopt", "FP8_PER_CHANNEL_PER_TOKEN_CFG", ("W8A8 FP8 dynamic", "W8A8 FP8 dynamic, online")
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: a folder.
      data, test: calibration and held-out text.
      out: JSON file.
      peers: of `PEERS`.
      windows: of every text, `window` tokens each, `batch_size` a pass.
    """

    model: str
    data: Path
    test: Path
    out: Path
    peers: tuple[str, ...] = tuple(PEERS)
    windows: int = 64
    window: int = 256
    batch_size: int = 8


def of_torchao(model: Any, peer: Peer, calibration: np.ndarray) -> None:
    """Quantize a transformers model in place."""
    del calibration  # ranges are those of the values themselves
    torch, ao = importlib.import_module("torch"), importlib.import_module("torchao.quantization")
    options = {}
    if "Intx" in peer.config:
        options = {"weight_dtype": torch.int4, "weight_granularity": ao.PerGroup(32)}
    in_blocks = lambda module, name: isinstance(module, torch.nn.Linear) and "layers." in name
    ao.quantize_(model, getattr(ao, peer.config)(**options), filter_fn=in_blocks)


def of_modelopt(model: Any, peer: Peer, calibration: np.ndarray) -> None:
    """Quantize a transformers model in place; its head stays, by ModelOpt's own choice."""
    torch, opt = importlib.import_module("torch"), importlib.import_module("modelopt.torch.quantization")
    config = copy.deepcopy(getattr(opt, peer.config))
    changes = {"*weight_quantizer": peer.weight, "*input_quantizer": peer.activation}
    for entry in config["quant_cfg"]:
        if entry.get("cfg") and (changed := changes.get(entry.get("quantizer_name"))) is not None:
            entry["cfg"] = dict(changed)

    def run(module: Any) -> None:
        with torch.no_grad():
            for window in calibration:
                module(torch.from_numpy(window[None].astype(np.int64)))

    opt.quantize(model, config, run)


QUANTIZE: Mapping[str, Callable[[Any, Peer, np.ndarray], None]] = {"torchao": of_torchao, "modelopt": of_modelopt}


def logits_of(folder: str, peer: Peer | None, calibration: np.ndarray) -> Logits:
    """The quantized model of a peer; None: the original in PyTorch."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if peer is not None:
        QUANTIZE[peer.package](model, peer, calibration)

    def run(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.float().numpy()

    return run


def as_model(model: Model, logits: Logits) -> Model:
    """`model` with other logits: a function of the host in place of its own."""

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        shape = jax.eval_shape(model.apply, params, tokens)
        return jax.pure_callback(lambda t: logits(np.asarray(t)).astype(shape.dtype), shape, tokens)

    return dataclasses.replace(model, apply=apply, decoder=None)


def rows(comparison: Comparison, options: Options, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One a setting of a peer, those in `done` left out."""
    known, model = {row["peer"] for row in done}, comparison.model
    original: list[tuple[str, Peer | None]] = [("PyTorch, float32", None)]
    for name, peer in [*original, *((name, PEERS[name]) for name in options.peers)]:
        if name not in known:
            theirs = as_model(model, logits_of(options.model, peer, comparison.calibration.inputs))
            row: dict[str, Any] = {"peer": name, "theirs": comparison.quality("test", theirs, model.params)}
            found, seen = {}, {}
            for ours in () if peer is None else peer.ours:
                made = comparison.made(SETTINGS[ours])
                found[ours] = comparison.quality("test", *made)
                seen[ours] = comparison.scores(CALIBRATION, *made).summary().kl
            row |= {"ours": found, "calibration_kl": seen, "chosen": min(seen, key=seen.__getitem__, default=None)}
            yield row | {"config": None if peer is None else peer.config}


def main(options: Options) -> None:
    """Compare, print, write after every row.

    Raises:
      MpqError: a peer is not among those there are, or the model or a text is wrong.
    """
    for name in options.peers:
        known("peer", name, PEERS)
    done = rows_in(options.out)
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "peers"}
    comparison = Comparison(activations.Options(**shared, shifted=options.test))
    comparison.references[CALIBRATION] = Reference(comparison.model, comparison.calibration, options.batch_size)
    config = named_options(options, ("data", "test", "out"))
    inputs = {"data": comparison.calibration.digest, "model": comparison.model.digest}
    inputs |= {"test": comparison.references["test"].data.digest}
    versions = {name: _version(name) for name in ("torch", "transformers", "torchao", "nvidia-modelopt")}
    record = RunRecord.collect(config | {"model": comparison.model.name}, seeds={}, inputs=inputs).to_json()
    head = {"peers": versions, "perplexity": comparison.original["test"].summary().quality, "record": record}
    keep(rows(comparison, options, done), options.out, head, done)


def _version(package: str) -> str | None:
    """Of an installed package; None: not installed."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(tyro.cli(Options))
