"""`mpq bench`: the times of the kernels on the machine at hand."""

from pathlib import Path
from typing import Annotated

import tyro

from kernels_pallas.bench import Options
from mpq import commands_bench
from mpq.cli_answer import Json, Source, answer


def bench(
    what: Source,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    only: str = "",
    tune: tyro.conf.FlagCreatePairsOff[bool] = False,
    repeats: int = 20,
    megabytes: int = 128,
    chain: int = 1,
    budget_s: int = 0,
    json: Json = False,
) -> None:
    """Time every kernel that runs here beside a dense dot: microseconds, GB/s, ratio, percent of the roofline, error.

    Args:
      what: kernels.
      out: JSON file to write; after every case.
      only: regular expression for the cases, such as 'w4a16.*-1x4096' (format, m x k x n).
      tune: keep what is fastest for this user: matmuls on this kind of device go by it from then on.
      repeats: turns of every kernel.
      megabytes: that copies of a weight fill, so that none is found in a cache.
      chain: matmuls of one call, on accelerators whose launches take longer than a matmul.
      budget_s: seconds after which no other case begins; 0: all of them.
      json: print one JSON object.
    """
    options = Options(repeats, megabytes, only, chain, budget_s)
    answer(lambda: commands_bench.measure(what, out, tune, options), json, commands_bench.show_times)
