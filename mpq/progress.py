"""Progress bars on standard error, for every stage alike; silent unless a person is watching.

Stages wrap their loops in `track(items, "sensitivity kl", total)`. Nothing is shown until `shown()` is entered, which
the command line does, so the library stays quiet. Where standard error is a file or a pipe, as in a batch job, bars
come at the end, and before that a line now and then.
"""

import contextlib
import contextvars
import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
LINE_EVERY = 30.0
"""Seconds between two lines in a log."""

_current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("progress", default=None)


@contextlib.contextmanager
def shown(console: Console | None = None) -> Iterator[Progress]:
    """Within this context `track` draws one bar a stage: done of total, elapsed time, time remaining."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        token = _current.set(progress)
        try:
            yield progress
        finally:
            _current.reset(token)


class Watch:
    """What a person sees beside a bar that `track` drew: the loss and the speed, now and then."""

    def __init__(self, description: str, outputs: int, every: int = 10) -> None:
        """Of the bar so described, whose every item is so many outputs."""
        self._description, self._outputs, self._every = description, outputs, every
        self._items, self._since = 0, time.perf_counter()

    def tell(self, loss: Any) -> None:
        """One more item is done; `loss` is read only where somebody watches."""
        self._items += 1
        progress = _current.get()
        if progress is None or self._items % self._every:
            return
        value, now = float(loss), time.perf_counter()
        speed, self._since = self._every * self._outputs / max(now - self._since, 1e-9), now
        for task in progress.tasks:
            if not task.finished and task.description.startswith(self._description):
                text = f"{self._description} {value:.4f} {speed:,.0f}/s"
                progress.update(task.id, description=text)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items`; shows a bar inside `shown()`."""
    progress = _current.get()
    if progress is None:
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]  # guarded by hasattr
    for task in progress.tasks:  # a stage that comes again takes the place of its finished bar
        if task.finished and task.description == description:
            progress.remove_task(task.id)
    bar = progress.track(items, total=total, description=description)
    yield from bar if progress.console.is_terminal else _logged(bar, description, total, progress)


def _logged(items: Iterable[T], description: str, total: int | None, progress: Progress) -> Iterator[T]:
    """The items, and a line after some of them: done of total, elapsed time, time remaining."""
    start = last = time.perf_counter()
    clock = lambda seconds: str(datetime.timedelta(seconds=round(seconds)))
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - last >= LINE_EVERY and done != total:
            remaining = f", eta {clock((now - start) / done * (total - done))}" if total else ""
            shown_as = (task.description for task in progress.tasks if task.description.startswith(description))
            text = f"{next(shown_as, description)} {done}/{total or '?'}, {clock(now - start)}{remaining}"
            progress.console.print(text, highlight=False)
            last = now
