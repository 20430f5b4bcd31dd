"""How a task's own numbers are called and shown: perplexity on a log axis, accuracy in percent, and so on."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from analysis.load import DataInfo, Result, TaskInfo
from analysis.text import with_error


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number that says how good a model is, or how like the original.

    Attributes:
      title: its name in a sentence.
      higher_is_better: it is bounded by one and drawn on a linear axis; the others are above zero, may grow without
        end, and are drawn on a log axis.
      percent: a share, shown in percent.
    """

    title: str
    higher_is_better: bool = False
    percent: bool = False

    @property
    def scale(self) -> int:
        """Factor from the value to what is shown."""
        return 100 if self.percent else 1

    @property
    def column(self) -> str:
        """Head of a table's column."""
        return f"{self.title} (%)" if self.percent else self.title

    def shown(self, value: float | None, stderr: float | None) -> str:
        """Value and standard error as a table has them."""
        scaled = [None if number is None else self.scale * number for number in (value, stderr)]
        return with_error(*scaled)


QUALITIES: Mapping[str, Measure] = MappingProxyType(
    {
        "perplexity": Measure("perplexity"),
        "accuracy": Measure("accuracy", higher_is_better=True, percent=True),
        "spearman": Measure("Spearman correlation", higher_is_better=True),
        "mse": Measure("mean squared error"),
        "loss": Measure("loss"),
    }
)
"""`TaskInfo.quality` -> how it is shown."""

AGREEMENTS: Mapping[str, Measure] = MappingProxyType(
    {
        "top1_agreement": Measure("same top-1", higher_is_better=True, percent=True),
        "cosine": Measure("cosine to the original", higher_is_better=True),
        "likeness": Measure("likeness", higher_is_better=True),
    }
)
"""`TaskInfo.agreement` -> how it is shown."""


def document_noun(task: TaskInfo, data: DataInfo | None) -> str:
    """What standard errors are over: a text is cut into many outputs, an image is one, a pair of sentences is two."""
    if data is None or task.unit == "token":
        return "document"
    if data.num_documents == data.num_outputs:
        return task.unit
    return "sentence pair" if task.name == "embedding" and data.num_outputs == 2 * data.num_documents else "document"


def counted(result: Result) -> str:
    """What the test set holds: `24 documents, 16320 tokens`, `932 examples`."""
    test = result.data.get("test")
    if test is None:
        return "the test set"
    noun = document_noun(result.task, test)
    outputs = f"{test.num_outputs} {result.task.unit}s"
    return outputs if noun == result.task.unit else f"{test.num_documents} {noun}s, {outputs}"
