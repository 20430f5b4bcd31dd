"""The paper's table of files in other runtimes: ours beside those of each runtime's own quantizer."""

from collections.abc import Iterator

from analysis.paper_sources import Json, Sources, only
from analysis.paper_tex import Table
from analysis.text import with_error

QUANTIZERS = {"rtn": "nearest, zero points", "hqq": "HQQ"}


def runtimes(sources: Sources) -> Table:
    """A row a file of theirs: size and KL of both, and the time of ours over theirs where it was taken."""
    head = ("runtime, model", "its own quantizer", "kB", "KL", "our kB", "KL", "time")
    return Table(head, (False, False, *(True,) * 5), tuple(_rows(sources)))


def _rows(sources: Sources) -> Iterator[tuple[str, ...]]:
    for row in sources.file("runtimes/reference")["rows"]:
        if row["block"] == 32 and row["quantizer"] != "rtn_symmetric":
            time = f"{row['our_seconds'] / row['their_seconds']:.2f}"
            yield "ONNX, reference", f"{row['bits']} bits, {QUANTIZERS[row['quantizer']]}", *_pair(row), time
    for model in ("reference", "resnet20_cifar10"):
        for row in sources.file(f"runtimes/w8a8_{model}")["rows"]:
            if row["quantizer"] in ("dynamic", "static_products"):
                time = f"{row['our_seconds'] / row['their_seconds']:.2f}"
                yield f"ONNX, {model.split('_')[0]}", f"W8A8 {row['quantizer'].replace('_', ', ')}", *_pair(row), time
    for model in ("reference", "resnet20_cifar10"):
        for row in sources.file(f"litert/{model}")["rows"]:
            time = f"{row['time_ratio']:.2f}"
            yield f"LiteRT, {model.split('_')[0]}", f"{row['recipe']}, ours {row['kind']}", *_pair(row), time
    row = only(sources.file("runtimes/pt2e_resnet20_cifar10")["rows"], quantizer="histogram")
    time = f"{row['our_seconds'] / row['their_seconds']:.2f}"
    yield "PyTorch, resnet20", f"PT2E W8A8 {row['quantizer']}", *_pair(row), time


def _pair(row: Json) -> tuple[str, str, str, str]:
    theirs = with_error(row["their_kl"], row["their_kl_stderr"])
    size = lambda count: f"{count / 1000:,.0f}"
    return size(row["their_bytes"]), theirs, size(row["our_bytes"]), with_error(row["our_kl"], row["our_kl_stderr"])
