"""The command line: one sub-command a stage, and `mpq run CONFIG`.

Whatever a person can mend ends in one sentence on standard error and exit code 2. With `--json` standard output is
one JSON object.
"""

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from mpq import commands, commands_export, commands_quantize, commands_scores, show, show_inspection
from mpq.activations import KEYS_AND_VALUES
from mpq.cli_answer import Json, Out, Source, answer
from mpq.cli_bench import bench
from mpq.cli_gguf import gguf
from mpq.cli_rotate import rotate
from mpq.cli_rows import calibrate, qat, ranges
from mpq.commands_quantize import Rounding
from mpq.guide import Guide
from mpq.request import Request
from mpq.types import MpqError


def inspect(
    model: Source,
    strict: tyro.conf.FlagCreatePairsOff[bool] = False,
    bpw: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="X[,X...]")] = (),
    all: tyro.conf.FlagCreatePairsOff[bool] = False,
    json: Json = False,
) -> None:
    """List every weight: kind, shape, multiply-accumulates, fused group; what is not quantized, and why; what it costs.

    Reads no weights: a config.json will do.

    Args:
      model: checkpoint folder, config.json, hub id, or `reference`.
      strict: fail if a matrix is claimed by no matmul, convolution or embedding.
      bpw: bits per weight whose size is wanted; several joined by commas, or given again (default: 3.5).
      all: one row for every weight, not one for equal blocks.
      json: print one JSON object.
    """
    show = lambda body, console: show_inspection.inspection(body, console, every=all)
    answer(lambda: commands.inspect(model, strict=strict, bpw=bpw), json, show)


def sensitivity(
    model: Source,
    data: str,
    out: Out,
    of: str = "weights",
    metric: str = "fisher",
    method: str = "rtn",
    stats: Path | None = None,
    schemes: tuple[str, ...] = (),
    keys_values: str = KEYS_AND_VALUES,
    head_dim: int | None = None,
    ranges: Path | None = None,
    window: int | None = None,
    max_windows: int = 16,
    batch_size: int = 8,
    seed: int = 0,
    race: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="BUDGET")] = (),
    json: Json = False,
) -> None:
    """Predict the loss increase of every weight, activation or part of the KV cache under every scheme, with errors.

    What is finished lies in the folder `scores` beside the table: interrupted, it continues when typed again, and with
    further schemes it computes those.

    Args:
      model: checkpoint folder, hub id, or `reference`.
      data: calibration text, or `reference`.
      out: sensitivity table to write.
      of: weights; activations, the inputs that weights multiply; or kv, cached keys and values.
      metric: of weights kl, loss, fisher, empirical_fisher, gauss_newton, hessian, hessian_trace, top_eigenvalue,
        aumann_shapley, higgs, first_order, delta_loss, modelopt_gradient, nncf, mlx_alignment, exllamav2, exllamav3,
        layer_error, imatrix, snr or weight_mse; of activations and kv kl or fisher.
      method: rounding algorithm whose error is scored; all but rtn and hqq need `stats`, or collect them themselves.
      stats: what `mpq calibrate` wrote.
      schemes: candidates; of activations such as int8_token, of kv int4_head_asym. Default: a few usual ones.
      keys_values: regular expression for the weights that make keys and values.
      head_dim: features of an attention head, where the model does not show it.
      ranges: of static schemes of activations, what `mpq calibrate` wrote; else calibrated on the data.
      window: tokens a window; default 256, or the model's context if that is shorter.
      max_windows: use the first so many.
      batch_size: windows a batch.
      seed: of random numbers.
      race: of kl, a budget such as 3.5bpw, 4MB or int4_g64: passes are spent where its plan hangs on them, a third of
        the whole table's at most; may be repeated.
      json: print one JSON object.
    """
    text = commands.Data(data, window, max_windows, batch_size)
    if of == "weights":
        compute = lambda: commands_scores.sensitivity(model, text, out, metric, method, stats, schemes, seed, race)
        answer(compute, json, show.table)
        return
    if method != "rtn" or stats is not None or race:
        raise MpqError(f"--method, --stats and --race are of weights: leave them out with --of {of}")
    rows = (keys_values, head_dim, ranges)
    compute = lambda: commands_scores.activations(model, text, out, of, metric, schemes, seed, *rows)
    answer(compute, json, show.activations)


def interactions(
    model: Source,
    data: str,
    out: Out,
    method: str = "rtn",
    stats: Path | None = None,
    schemes: tuple[str, ...] = (),
    num_probes: int = 16,
    window: int | None = None,
    max_windows: int = 16,
    batch_size: int = 8,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Estimate what the errors of two weights cost together, for `mpq allocate --interactions`.

    Args:
      model: checkpoint folder, hub id, or `reference`.
      data: calibration text, or `reference`; of two documents or more.
      out: file to write.
      method: rounding algorithm; all but rtn and hqq need `stats`, or collect them themselves.
      stats: what `mpq calibrate` wrote.
      schemes: candidates, those of the sensitivity table; default as there.
      num_probes: backward passes; more of them estimate pairs better.
      window: tokens a window; default 256, or the model's context if that is shorter.
      max_windows: use the first so many.
      batch_size: windows a batch.
      seed: of random numbers.
      json: print one JSON object.
    """
    text = commands.Data(data, window, max_windows, batch_size)
    answer(
        lambda: commands_scores.interactions(model, text, out, method, stats, schemes, num_probes, seed),
        json,
        show.interactions,
    )


def allocate(
    table: Source,
    out: Out,
    bpw: float | None = None,
    size: str | None = None,
    max_kl: float | None = None,
    pin: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="REGEX=SCHEME")] = (),
    only: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="REGEX=SCHEME,SCHEME")] = (),
    rules: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TOOL=FILE")] = (),
    max_bops: float | None = None,
    activation_bits: int = 16,
    latency: Path | None = None,
    max_latency_us: float | None = None,
    interactions: Path | None = None,
    activations: Path | None = None,
    kv: Path | None = None,
    context: int = 2048,
    sequences: int = 1,
    runtime: Annotated[str | None, tyro.conf.arg(name="for")] = None,
    frontier: Path | None = None,
    json: Json = False,
) -> None:
    """Solve the knapsack exactly for one budget, and for limits beside it.

    Args:
      table: what `mpq sensitivity` wrote.
      out: plan to write.
      bpw: bits per quantized weight, scales included.
      size: of the whole model, such as 4MB.
      max_kl: the smallest model whose predicted loss increase is at most this (nats per token).
      pin: the scheme of every weight whose path the pattern matches; may be repeated.
      only: the schemes such weights may take; may be repeated.
      rules: also write the plan for llama.cpp, qwix or compressed-tensors; may be repeated.
      max_bops: most bit operations (MACs x bits of the weight x activation-bits) of the traced inputs.
      activation_bits: of what weights multiply, in BOPs.
      latency: table {"kxn": {"scheme": microseconds}} as JSON, measured on the device.
      max_latency_us: most microseconds by that table.
      interactions: what `mpq interactions` wrote of the same candidates: losses of pairs count too.
      activations: what `mpq sensitivity --of activations` wrote: a scheme for these too; max-bops counts their bits.
      kv: what `mpq sensitivity --of kv` wrote: a scheme for every part of the KV cache; its bytes count in the size.
      context: tokens that the cache holds.
      sequences: of so many tokens each.
      runtime: gguf, onnx, litert, pt2, hf, gptq, gptq_v2, awq, bnb or llm_int8: only what `mpq export --to` it has a
        form for.
      frontier: picture of the whole frontier to write (.png or .svg).
      json: print one JSON object.
    """
    limits = (max_bops, activation_bits, latency, max_latency_us, interactions)
    ask = lambda: Request(bpw, size, max_kl, pin, only, rules, *limits, activations, kv, context, sequences, runtime)
    answer(lambda: commands.allocate(Path(table), out, ask(), frontier), json, commands.show_plan)


def quantize(
    model: Source,
    plan: Source,
    out: Out,
    data: str | None = None,
    stats: Path | None = None,
    method: str = "gptq",
    distill: int = 0,
    ranges: Path | None = None,
    smooth: tyro.conf.FlagCreatePairsOff[bool] = False,
    awq: tyro.conf.FlagCreatePairsOff[bool] = False,
    equalize: tyro.conf.FlagCreatePairsOff[bool] = False,
    propagate: tyro.conf.FlagCreatePairsOff[bool] = False,
    guided: tyro.conf.FlagCreatePairsOff[bool] = False,
    correct_bias: tyro.conf.FlagCreatePairsOff[bool] = False,
    correct_norms: tyro.conf.FlagCreatePairsOff[bool] = False,
    rotate: tyro.conf.FlagCreatePairsOff[bool] = False,
    rotate_inputs: tyro.conf.FlagCreatePairsOff[bool] = False,
    seed: int = 0,
    keys_values: str = KEYS_AND_VALUES,
    window: int | None = None,
    max_windows: int = 64,
    batch_size: int = 8,
    json: Json = False,
) -> None:
    """Write the quantized model: an Orbax folder of packed weights.

    Args:
      model: checkpoint folder, hub id, or `reference`.
      plan: plan file, or the name of a uniform scheme such as int4_g64; with schemes of activations and the KV cache
        beside it int4_g32+int8_token+int8_head, or plan+int8_token@int8 for inputs of int8 weights alone; or w8a8,
        w4a8, w4a4, w8a8_static, w8a8_fp8, w4a4_g32, llm_int8 ...
      out: folder to write.
      data: calibration text, or `reference`; all methods but rtn and hqq need it or `stats`.
      stats: what `mpq calibrate` wrote, or an importance matrix of llama.cpp.
      method: rounding algorithm: gptq, gptq_act_order, best, adaround, signround, hqq or rtn.
      distill: steps of training codes, scales and zero points to the outputs of the original on the text, an eighth of
        which decides whether the result is better than what was rounded; interrupted, it continues when typed again.
      ranges: what `mpq calibrate --of activations` wrote, for static schemes of activations; else `data` gives them.
      smooth: move outliers of activations into weights where that lowers the error on the data (SmoothQuant).
      awq: let the layers before take over what makes weights of large inputs finer (AWQ), where that lowers the error.
      equalize: give channels and what reads them ranges alike (cross-layer equalization); for one scale a tensor.
      propagate: round in the order of execution, each weight making up for what those before it did (QEP).
      guided: tokens count by how much the end loss depends on them, in all that rounding averages (GuidedQuant).
      correct_bias: take what rounding adds to a layer's output on average out of the bias or the norm's mean behind it.
      correct_norms: and what it does to the spread out of the norm's scale: statistics of norms, estimated again.
      rotate: first mix features by orthogonal matrices, as `mpq rotate` does (QuaRot, SpinQuant).
      rotate_inputs: rotate activations where they are rounded, if that lowers the error on the data (QuaRot, online).
      seed: of the rotations.
      keys_values: regular expression for the weights that make keys and values.
      window: tokens a window; default 256, or the model's context if that is shorter.
      max_windows: use the first so many.
      batch_size: windows a batch.
      json: print one JSON object.
    """
    text = None if data is None else commands.Data(data, window, max_windows, batch_size)
    how = Rounding(
        method,
        *map(bool, (smooth, awq, equalize, propagate, correct_bias, correct_norms, rotate)),
        seed=seed,
        turn=bool(rotate_inputs),
        guide=Guide() if guided else None,
    )
    quantize = lambda: commands_quantize.quantize(model, plan, out, text, stats, how, distill, ranges, keys_values)
    answer(quantize, json, commands.show_written)


def export(
    model: Source,
    out: Out,
    to: str = "gguf",
    window: int | None = None,
    integer: bool = False,
    kv_cache: bool = False,
    json: Json = False,
) -> None:
    """Write a quantized model for another runtime; every code and scale stays as it is.

    A plan that the runtime has no form for is refused before anything is written; `mpq allocate --for` solves for one
    that it has. The size that is printed, and that can be known before, is that of the file; of a folder of hf, gptq,
    gptq_v2, awq, bnb or llm_int8 that of model.safetensors, without its config and tokenizer.

    Args:
      model: folder that `mpq quantize` wrote.
      out: file or folder to write.
      to: gguf, for llama.cpp; onnx, for ONNX Runtime, which rounds activations too where the plan does, a folder where
        the file would have more than 2 GB; litert, for LiteRT (TensorFlow Lite); pt2, a program of torch.export for
        PyTorch; hf, a folder in the format of compressed-tensors for transformers and vLLM; gptq, gptq_v2, awq, folders
        in those; bnb or llm_int8, folders of bitsandbytes: NF4, or LLM.int8 with the plan's threshold of outliers.
      window: litert: tokens that the file reads at once; default the whole context, but at most 512.
      integer: litert: of static ranges, round residual sums and multiply codes of 4 bits: most is of integers then.
      kv_cache: onnx: language models read the keys and values of the tokens before, and give those of all.
      json: print one JSON object.
    """
    write = lambda: commands_export.export(Path(model), to, out, window=window, integer=integer, kv_cache=kv_cache)
    answer(write, json, commands.show_written)


def evaluate(
    model: Source,
    data: str,
    reference: str | None = None,
    window: int | None = None,
    max_windows: int = 64,
    batch_size: int = 8,
    json: Json = False,
) -> None:
    """Perplexity, and against a reference KL and top-1 agreement, each with a standard error over documents.

    Args:
      model: checkpoint folder, folder written by `mpq quantize`, hub id, or `reference`.
      data: held-out text, or `reference`.
      reference: the unquantized model.
      window: tokens a window; default 256, or the model's context if that is shorter.
      max_windows: use the first so many.
      batch_size: windows a batch.
      json: print one JSON object.
    """
    text = commands.Data(data, window, max_windows, batch_size)
    answer(lambda: commands.evaluate(model, text, reference), json, commands.show_evaluation)


def run(
    config: Source,
    model: str | None = None,
    data: str | None = None,
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(help="key=value of the config")] = (),
    out: Out = Path("runs"),
    json: Json = False,
) -> None:
    """The main job: analyse, allocate, quantize, evaluate, draw. Interrupted, it continues when typed again.

    Args:
      config: Python file that defines CONFIG.
      model: instead of the config's.
      data: text file instead of the config's.
      set: override one field of the config; may be repeated.
      out: folder that gets the run folder.
      json: print one JSON object.
    """
    overrides = [f"{key}={value}" for key, value in (("model", model), ("data", data)) if value is not None]
    answer(lambda: commands.run(config, [*overrides, *set], out), json, commands.show_run)


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "calibrate": calibrate,
    "ranges": ranges,
    "sensitivity": sensitivity,
    "interactions": interactions,
    "allocate": allocate,
    "rotate": rotate,
    "quantize": quantize,
    "qat": qat,
    "export": export,
    "gguf": gguf,
    "evaluate": evaluate,
    "run": run,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `mpq` command; exits with 0, or 2 with one sentence."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="mpq", description=__doc__, args=argv)
    except MpqError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted: type the same command again to continue where it stopped")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _fail(f"cannot write {error.filename or ''!r} ({error.strerror}): free some space or choose another folder")


def _fail(sentence: str) -> None:
    sys.stderr.write(f"mpq: {' '.join(sentence.split())}\n")
    sys.exit(2)
