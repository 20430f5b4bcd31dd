"""`mpq gguf`: the one command that goes from a model to the best file for llama.cpp."""

from typing import Annotated, Any

import tyro

from mpq import commands_export, show
from mpq.cli_answer import Json, Out, Source, answer
from mpq.request import rules


def gguf(
    model: Source,
    data: str,
    out: Out,
    size: str | None = None,
    bpw: float | None = None,
    like: str | None = None,
    types: tuple[str, ...] = (),
    pin: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="REGEX=TYPE")] = (),
    metric: str = "fisher",
    refine: int = 0,
    window: int | None = None,
    max_windows: int = 32,
    statistics_windows: int = 64,
    selection_windows: int = 32,
    test_windows: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Write the best file for llama.cpp within a size: searched, rounded, compared with llama.cpp's own mix, measured.

    What is finished lies in the folder `scores` beside the file: interrupted, it continues when typed again.

    Args:
      model: checkpoint folder, hub id, or `reference`.
      data: text, divided into what is scored on, what the file is chosen on and what it is measured on.
      out: file to write.
      size: most bytes of the file, such as 4.1GB.
      bpw: most bits per quantized weight.
      like: no more bytes than llama.cpp's Q2_K, Q3_K_M, Q4_K_M, Q5_K_M or Q6_K.
      types: of ggml, to choose among; default: q2_k to q8_0 and iq4_xs, or those with small blocks where rows do
        not fill 256. Name tq2_0 to have it: not every accelerator runs it.
      pin: the type of every weight whose path the pattern matches; may be repeated.
      metric: that predicts losses, as of `mpq sensitivity`.
      refine: most rounds of a search on measured plans after the exact solution.
      window: tokens a window; default 256, or the model's context if that is shorter.
      max_windows: to score on.
      statistics_windows: others, for the statistics that rounding uses.
      selection_windows: others, that the file is chosen on.
      test_windows: others, that it is measured on.
      batch_size: windows a batch.
      seed: of random numbers.
      json: print one JSON object.
    """
    windows = (max_windows, statistics_windows, refine, window, selection_windows, test_windows, batch_size)

    def compute() -> dict[str, Any]:
        options = commands_export.Options(types, metric, *windows, seed, rules("--pin", pin, "lm_head.*=q6_k", str))
        return commands_export.best(model, data, out, commands_export.Target(size, bpw, like), options)

    answer(compute, json, show.gguf)
