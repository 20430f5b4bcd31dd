r"""Static int8 in PyTorch: our program of torch.export against the one that PT2E of torchao makes of the same model.

Run:     python -m experiments.pt2e --model DIR --data IMAGES --test IMAGES --out FILE
         (a folder of family resnet_cifar and .npz files of images; needs mpq[torch] and torchao)
Expect:  KL to the original is lower in every row, at nearly as many bytes
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by quantizer, bytes of the tensors that either program reads, KL to the original (nats an
         image, held out), how often the first choice is the original's, and seconds a batch, of their program and of
         ours, both compiled by Inductor to products of integers; KL of their model before it is quantized

Theirs, of the model in PyTorch's own layers (`experiments.pt2e_resnet`): `prepare_pt2e` and `convert_pt2e`, which fuses
the norms, with the quantizer for Inductor on x86: weights of 8 bits by channel, activations unsigned with zero points,
ranges by a histogram (its default) or by minimum and maximum of the same calibration data. Ours: int8_channel by GPTQ,
static ranges by squared error with zero points, norms folded into convolutions. One thread; both in turns, the median
of `repeats`.
"""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from safetensors.numpy import load_file

from experiments.pt2e_resnet import resnet
from experiments.runtimes import Run, medians
from experiments.runtimes_w8a8 import Comparison as Sides
from experiments.runtimes_w8a8 import Options as Both
from experiments.runtimes_w8a8 import compare
from mpq.formats import parse_scheme
from mpq.pt2.export import save
from mpq.pt2.graph import require_torch
from mpq.types import MpqError

QUANTIZERS = ("histogram", "minmax")
"""How PT2E chooses ranges of activations."""


@dataclasses.dataclass(frozen=True)
class Options(Both):
    """What is compared, as for ONNX Runtime."""

    quantizers: tuple[str, ...] = QUANTIZERS


class Comparison(Sides):
    """The model, its images, and programs of both sides."""

    def __init__(self, options: Options, folder: Path) -> None:
        super().__init__(options, folder)
        if self.model.config.get("model_type") != "resnet_cifar":
            raise MpqError(f"{options.model} is of another family: PT2E is compared on resnet_cifar")
        self.torch = require_torch()
        self.torch.set_num_threads(1)
        self.module = resnet(self.torch, self.model.config, load_file(Path(options.model) / "model.safetensors"))

    def _exported(self, module: Any) -> Any:
        """A program of any batch."""
        example, batch = self.torch.from_numpy(self.batches[0][:2]), self.torch.export.Dim("batch", min=1)
        return self.torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=True)

    def theirs(self, quantizer: str) -> Path:
        """The program that PT2E makes."""
        torch, pt2e = self.torch, importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        config = x86.get_default_x86_inductor_quantization_config()
        if quantizer == "minmax":
            observer = importlib.import_module("torchao.quantization.pt2e").MinMaxObserver
            spec = config.input_activation
            spec = dataclasses.replace(spec, observer_or_fake_quant_ctr=observer.with_args(eps=2**-12))
            config = dataclasses.replace(config, input_activation=spec, output_activation=spec)
        quantize = x86.X86InductorQuantizer().set_global(config)
        prepared = pt2e.prepare_pt2e(self._exported(self.module).module(), quantize)
        with torch.no_grad():
            for batch in self._batches(self.calibration):
                prepared(torch.from_numpy(batch))
        made, path = self._exported(pt2e.convert_pt2e(prepared)), self.folder / f"{quantizer}.pt2"
        torch.export.save(made, path)
        return path

    def ours(self, quantizer: str, limit: int) -> tuple[Path, str]:
        """Our program, and nothing of embeddings."""
        path = self.folder / "ours.pt2"
        if not path.exists():
            choice = {w.path: parse_scheme("int8_channel") for w in self.traced.weights}
            save(path, self.exported(choice, "int8_tensor_static_asym"), "ours")
        return path, "none"

    def runner(self, path: Path) -> Run:
        """A program, compiled, its weights constants."""
        return self._compiled(self.torch.export.load(path).module())

    def _compiled(self, module: Any) -> Run:
        torch, inductor = self.torch, importlib.import_module("torch._inductor")
        inductor.config.freezing = True
        program = torch.compile(module, dynamic=False)

        def run(batch: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return program(torch.from_numpy(batch)).numpy()

        return run

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a quantizer, those in `done` left out."""
        known = {row["quantizer"] for row in done}
        for name in (name for name in self.options.quantizers if name not in known):
            floats = self._compiled(self.module)
            row: dict[str, Any] = {"quantizer": name, "float_kl": self.quality(floats)[0]}
            paths = {"their": self.theirs(name), "our": self.ours(name, 0)[0]}
            runs = {side: self.runner(path) for side, path in paths.items()}
            for side, path in paths.items():
                values = (stored_bytes(self.torch.export.load(path)), *self.quality(runs[side]))
                keys = ("bytes", "kl", "kl_stderr", "agreement")
                row |= {f"{side}_{key}": value for key, value in zip(keys, values, strict=True)}
            times = medians([*runs.values(), floats], self.batches[0], self.options.repeats)
            yield row | dict(zip(("their_seconds", "our_seconds", "float_seconds"), times, strict=True))


def stored_bytes(program: Any) -> int:
    """Of the tensors that a program reads; PT2E leaves the float ones beside the codes that are made of them."""
    signature = program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
    read = {names.get(node.name) for node in program.graph.nodes if node.op == "placeholder" and node.users}
    return sum(tensor.nbytes for name, tensor in (program.state_dict | program.constants).items() if name in read)


def main(options: Options) -> None:
    """As `experiments.runtimes_w8a8.compare`, in PyTorch."""
    compare(options, Comparison, QUANTIZERS)


if __name__ == "__main__":
    main(tyro.cli(Options))
