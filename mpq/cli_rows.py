"""The sub-commands about statistics and training: `mpq calibrate`, `mpq ranges` and `mpq qat`."""

from pathlib import Path
from typing import Annotated

import tyro

from mpq import commands, commands_activations, commands_quantize, show
from mpq.activations import KEYS_AND_VALUES
from mpq.cli_answer import Json, Out, Source, answer
from mpq.commands_quantize import Rounding
from mpq.distill import Devices, Distill
from mpq.guide import Guide


def calibrate(
    model: Source,
    data: str,
    out: Out,
    of: str = "weights",
    keys_values: str = KEYS_AND_VALUES,
    imatrix: Path | None = None,
    guided: tyro.conf.FlagCreatePairsOff[bool] = False,
    window: int | None = None,
    max_windows: int = 64,
    batch_size: int = 8,
    json: Json = False,
) -> None:
    """Collect what rounding uses: second moments of every weight's input, or histograms for static ranges.

    Args:
      model: checkpoint folder, hub id, or `reference`.
      data: calibration text, or `reference`.
      out: file of statistics to write.
      of: weights; or ranges of activations, of kv, cached keys and values, or of both.
      keys_values: regular expression for the weights that make keys and values.
      imatrix: also write what llama-quantize takes of them, an importance matrix.
      guided: tokens count by how much the end loss depends on them (GuidedQuant).
      window: tokens a window; default 256, or the model's context if that is shorter.
      max_windows: use the first so many.
      batch_size: windows a batch.
      json: print one JSON object.
    """
    text = commands.Data(data, window, max_windows, batch_size)
    guide = Guide() if guided else None
    answer(lambda: commands.calibrate(model, text, out, of, keys_values, imatrix, guide), json, commands.show_written)


def ranges(
    files: tyro.conf.Positional[tuple[Path, ...]],
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    schemes: tuple[str, ...] = ("int8_tensor_static",),
    picture: Path | None = None,
    json: Json = False,
) -> None:
    """Show what `mpq calibrate --of activations` found, and the ranges that schemes take of it; merge several files.

    Args:
      files: what `mpq calibrate --of activations` (or kv, or both) wrote, of one model.
      out: file to write them to as one.
      schemes: static ones whose ranges are shown: int8_tensor_static, int4_tensor_static_percentile.
      picture: of the histograms and ranges, to write (.png or .svg).
      json: print one JSON object.
    """
    answer(lambda: commands_activations.ranges(files, out, schemes, picture), json, show.ranges)


def qat(
    model: Source,
    plan: Source,
    data: str,
    out: Out,
    steps: int = 600,
    method: str = "rtn",
    rate: float = 0.02,
    scale_rate: float = 0.003,
    range_rate: float = 0.003,
    beside_rate: float = 0.003,
    rank: int = 0,
    propagate: tyro.conf.FlagCreatePairsOff[bool] = False,
    correct_norms: tyro.conf.FlagCreatePairsOff[bool] = False,
    devices: int = 1,
    fsdp: tyro.conf.FlagCreatePairsOff[bool] = False,
    ranges: Path | None = None,
    stats: Path | None = None,
    window: int | None = None,
    max_windows: int = 64,
    batch_size: int = 8,
    json: Json = False,
) -> None:
    """Quantization-aware training: weights, scales and ranges of a plan trained to the outputs of the original.

    Weights and activations are rounded as the plan says while it trains; the loss is the KL to the float model, so no
    labels are needed. Interrupted, it continues when typed again, to the same bytes.

    Args:
      model: checkpoint folder, hub id, or `reference`.
      plan: plan file, or PLAN+ACTIVATIONS[+KV], w8a8, w4a8, w4a4 as `mpq quantize` takes it.
      data: training text, or `reference`.
      out: folder to write.
      steps: batches.
      method: rounding algorithm to start from.
      rate: peak learning rate of the weights, in steps of their grid.
      scale_rate: of the logarithms of scales.
      range_rate: of the logarithms of static ranges of activations (LSQ); 0: they stay.
      beside_rate: of biases and norms, relative to their size; 0: they stay.
      rank: learn a low-rank update of each weight (LoRA), which is merged into the codes in the end, not every code;
        for large models.
      propagate: start from weights that make up for those before them (QEP).
      correct_norms: start from biases and norms that take up what rounding shifts and stretches.
      devices: divide every batch among so many; on CPUs XLA_FLAGS=--xla_force_host_platform_device_count=8 makes some.
      fsdp: divide parameters and the optimizer's state among them, too.
      ranges: what `mpq calibrate --of activations` wrote, for static ranges to start from; else `data` gives them.
      stats: what `mpq calibrate` wrote, for methods that need it.
      window: tokens a window; default 256, or the model's context if that is shorter.
      max_windows: use the first so many.
      batch_size: windows a batch.
      json: print one JSON object.
    """
    text = commands.Data(data, window, max_windows, batch_size)

    def train() -> dict[str, object]:
        how = Rounding(method, propagate=bool(propagate), correct_norms=bool(correct_norms))
        training = Distill(
            steps=steps,
            rounding=rate,
            scale=scale_rate,
            ranges=range_rate,
            beside=beside_rate,
            rank=rank,
            written=0,  # there is text to train on
            devices=Devices(devices, bool(fsdp)),
        )
        return commands_quantize.quantize(model, plan, out, text, stats, how, steps, ranges, training=training)

    answer(train, json, commands.show_written)
