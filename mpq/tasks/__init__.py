"""What a model is for: which of its outputs count, and what a change of them costs, in nats.

`TASKS` lists the tasks by the name that a model family gives; a person's own loss is `Custom`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpq.tasks.base import Quality, Task
from mpq.tasks.categorical import CausalLM, Classification
from mpq.tasks.custom import Custom
from mpq.tasks.gaussian import Embedding, Regression

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (CausalLM(), Classification(), Embedding(), Regression())}
)

__all__ = ["TASKS", "CausalLM", "Classification", "Custom", "Embedding", "Quality", "Regression", "Task"]
