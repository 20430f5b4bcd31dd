"""What a person asks of `mpq allocate`, as text: one budget, rules by regular expression, limits beside the size."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mpq.activations.joint import Joint, joint_problem
from mpq.activations.table import load_activation_table
from mpq.allocate import (
    Constraint,
    Problem,
    bops,
    latency,
    matching,
    solve_constrained,
    solve_frontier,
    solve_quadratic,
)
from mpq.artifacts import load_interactions, require_model
from mpq.config import known
from mpq.export.rules import RULES
from mpq.export.targets import TARGETS, allowed_for, require_rounding
from mpq.files import read_json
from mpq.types import Allocation, MpqError, Scheme, SensitivityTable, WeightSpec
from mpq.units import bpw_to_bits, parse_size

Value = TypeVar("Value")
Posed = TypeVar("Posed")


@dataclasses.dataclass(frozen=True)
class Request:
    """One budget, and what the plan must keep to.

    Attributes:
      bpw: bits per quantized weight.
      size: of the whole model, such as `4MB`.
      max_kl: most predicted loss increase; the smallest plan within it is wanted.
      pin: `REGEX=SCHEME` each.
      only: `REGEX=SCHEME,SCHEME` each.
      rules: `TOOL=FILE` each: the plan as another tool's rules.
      max_bops: most bit operations, with inputs of `activation_bits`.
      latency: JSON file, `{"kxn": {scheme: microseconds}}`.
      max_latency_us: most microseconds by that table.
      interactions: what `mpq interactions` wrote, of the weights and schemes of the table.
      activations, cache: what `mpq sensitivity --of activations` and `--of kv` wrote: these are chosen too, the cache
        at `context` tokens of `sequences`; its bytes count in the budget.
      runtime: a name of `mpq.export.targets.TARGETS`: only schemes that it has are taken.
    """

    bpw: float | None = None
    size: str | None = None
    max_kl: float | None = None
    pin: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    max_bops: float | None = None
    activation_bits: int = 16
    latency: Path | None = None
    max_latency_us: float | None = None
    interactions: Path | None = None
    activations: Path | None = None
    cache: Path | None = None
    context: int = 2048
    sequences: int = 1
    runtime: str | None = None

    def __post_init__(self) -> None:
        given = {"bpw": self.bpw, "size": self.size, "max-kl": self.max_kl}
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) != 1:
            raise MpqError(f"give exactly one of --bpw, --size and --max-kl (given: {', '.join(asked) or 'none'})")
        if (self.latency is None) != (self.max_latency_us is None):
            raise MpqError("--latency and --max-latency-us go together: give the table and the limit")
        if self.max_kl is not None and (self.max_bops is not None or self.latency is not None):
            raise MpqError(
                "--max-kl asks for the smallest size, which other limits do not go with: give --bpw or --size"
            )
        if self.interactions is not None and (self.max_bops, self.latency, self.max_kl) != (None, None, None):
            raise MpqError("--interactions goes with a size alone: give --bpw or --size, and no other limit")
        if self.is_joint and (self.interactions is not None or self.latency is not None or self.rules):
            raise MpqError(
                "--activations and --kv go with a size, --max-kl and --max-bops: leave out --interactions, --latency "
                "and --rules"
            )
        if self.is_joint and self.runtime is not None:
            target = known("format", self.runtime, TARGETS)
            if not (target.activations or target.rounds_alike):
                raise MpqError(
                    f"format {self.runtime} holds weights only: leave out --activations and --kv, or use --for onnx"
                )

    @property
    def is_joint(self) -> bool:
        """Whether more than weights is chosen."""
        return self.activations is not None or self.cache is not None

    def joint(self, problem: Problem, table: SensitivityTable) -> Joint:
        """The problem of weights, activations and the KV cache.

        Where the runtime has one scheme for all activations, it is that of the best solution.

        Raises:
          MpqError: a table is damaged or of another model, the tables do not go together, the runtime cannot round what
            they are of, or it rounds by one scheme and no plan of one keeps to what is asked.
        """
        tables = [None if path is None else load_activation_table(path) for path in (self.activations, self.cache)]
        for path, scores, kind in zip((self.activations, self.cache), tables, ("activation", "kv"), strict=True):
            if path is not None and scores is not None:
                require_model(path, scores.model_digest, table.model_digest)
                if any(row.kind != kind for row in scores.activations):
                    of = {"activation": "activations", "kv": "kv"}[kind]
                    raise MpqError(f"{path} is no table of {of}: give what `mpq sensitivity --of {of}` wrote")
        activations, cache, tokens = *tables, self.context * self.sequences
        if self.runtime is None:
            return joint_problem(problem, activations, cache, tokens)
        require_rounding(self.runtime, [scores for scores in tables if scores is not None])
        target = TARGETS[self.runtime]
        if activations is None or not target.one_rounding:
            return joint_problem(problem, activations, cache, tokens, target.pairs)

        def pose(number: int) -> tuple[Joint, Allocation]:
            posed = joint_problem(problem, activations.at(number), cache, tokens, target.pairs)
            return posed, self.solve(posed.problem, self.joint_limits(posed), table)

        columns = range(len(activations.schemes))
        return self._best(pose, columns, "activations", "allow more, or score more schemes")

    def joint_limits(self, joint: Joint) -> list[Constraint]:
        """The limits beside the size, of a joint problem.

        Raises:
          MpqError: a limit is no positive number.
        """
        return [] if self.max_bops is None else [joint.bops(self.max_bops)]

    def _best(
        self, pose: Callable[[Value], tuple[Posed, Allocation]], schemes: Iterable[Value], rounded: str, advice: str
    ) -> Posed:
        """What poses the best plan of one scheme for all.

        Args:
          pose: the problem under one scheme, and its solution; `MpqError` where it has none.
          schemes: what `pose` takes.
          rounded: what has one scheme, in words.
          advice: what to try where none has a plan.

        Raises:
          MpqError: no scheme has a plan.
        """
        found: list[tuple[float, Posed]] = []
        for scheme in schemes:
            with contextlib.suppress(MpqError):  # it does not fit some weight, a rule, a limit or the budget
                posed, solved = pose(scheme)
                found.append((solved.size_bits if self.max_kl is not None else solved.loss, posed))
        if not found:
            raise MpqError(
                f"no plan with one scheme for all {rounded}, which {self.runtime} needs, keeps to what is asked: "
                f"{advice}"
            )
        return min(found, key=lambda pair: pair[0])[1]

    @property
    def name(self) -> str:
        """Of the plan: `mixed@3.5bpw`."""
        if self.bpw is not None:
            return f"mixed@{self.bpw:g}bpw"
        return f"mixed@{self.size}" if self.size is not None else f"mixed@kl{self.max_kl:g}"

    @property
    def pins(self) -> dict[str, str]:
        """Pattern -> scheme.

        Raises:
          MpqError: not of the form REGEX=SCHEME, or a pattern given twice.
        """
        return rules("--pin", self.pin, "lm_head.*=int8_channel", str)

    @property
    def sets(self) -> dict[str, list[str]]:
        """Pattern -> the schemes allowed.

        Raises:
          MpqError: not of the form REGEX=SCHEME,SCHEME, or a pattern given twice.
        """
        return rules("--only", self.only, "layers.0.*=int4_g64,int8_channel", lambda text: text.split(","))

    def rules_for(self, choices: Mapping[str, Scheme], weights: Sequence[WeightSpec]) -> dict[Path, Any]:
        """File -> the rules to write there.

        Raises:
          MpqError: not of the form TOOL=FILE, an unknown tool, or a plan that the tool has no form for.
        """
        files: dict[Path, Any] = {}
        for text in self.rules:
            tool, _, file = text.partition("=")
            if tool not in RULES or not file:
                raise MpqError(f"--rules {text!r} is not TOOL=FILE with a tool of {', '.join(RULES)}")
            files[Path(file)] = RULES[tool](choices, weights)
        return files

    def matched(self, paths: Sequence[str]) -> dict[str, list[str]]:
        """Rule -> the weights it matches."""
        rules = [("pin", "--pin", pattern, scheme) for pattern, scheme in self.pins.items()]
        rules += [("only", "--only", pattern, ",".join(schemes)) for pattern, schemes in self.sets.items()]
        return {
            f"{flag} {pattern}={schemes}": [paths[row] for row in matching(pattern, paths, kind)]
            for kind, flag, pattern, schemes in rules
        }

    def problem(self, table: SensitivityTable, overhead_bits: int) -> Problem:
        """The problem that the table poses under the rules; `overhead_bits` are stored beside the weights.

        Raises:
          MpqError: the rules are wrong, contradict each other or the runtime, or leave a weight no scheme.
        """
        bits = WeightSpec.size_bits if self.runtime is None else known("format", self.runtime, TARGETS).stored_bits
        pose = lambda sets: Problem.from_table(
            table, pins=self.pins, only=sets, overhead_bits=overhead_bits, stored_bits=bits
        )
        if self.runtime is None:
            return pose(self.sets)
        allowed, target = allowed_for(self.runtime, table), known("format", self.runtime, TARGETS)
        rules = lambda keep: {f"(?:{re.escape(p)})": [str(s) for s in of if keep(s)] for p, of in allowed.items()}
        if not target.uniform:
            return pose(self.sets | rules(lambda scheme: True))

        def alone(one: Scheme) -> tuple[Problem, Allocation]:
            problem = pose(self.sets | rules(lambda scheme: scheme == one or not scheme.has_scale))
            return problem, self.solve(problem, self.limits(problem), table)

        scaled = [scheme for scheme in table.schemes if scheme.has_scale]
        return self._best(alone, scaled, "linear layers", "allow more, score more schemes, or use --for hf")

    def limits(self, problem: Problem) -> list[Constraint]:
        """The limits beside the size.

        Raises:
          MpqError: a limit is no positive number, or the table of latencies is damaged or lacks an entry.
        """
        limits = [] if self.max_bops is None else [bops(problem, self.max_bops, self.activation_bits)]
        if self.latency is not None and self.max_latency_us is not None:
            times = read_json(self.latency, 'a table of latencies, {"kxn": {"scheme": microseconds}}')
            limits.append(latency(problem, times, self.max_latency_us))
        return limits

    def solve(self, problem: Problem, limits: Sequence[Constraint], table: SensitivityTable) -> Allocation:
        """The best allocation: from the exact frontier where the size alone is limited.

        Raises:
          MpqError: no plan is within the limits, or the interactions are damaged or of another table.
        """
        bits = None if self.size is None else parse_size(self.size) - problem.overhead_bits
        if not limits and self.interactions is None:
            return solve_frontier(problem).at(bits=bits, bpw=self.bpw, loss=self.max_kl)
        if bits is None:
            assert self.bpw is not None  # as `__post_init__` sees to
            bits = bpw_to_bits(self.bpw, problem.num_weights)
        if self.interactions is not None:
            return solve_quadratic(problem, load_interactions(self.interactions).matrix(table), bits)
        return solve_constrained(problem, bits, limits)


def rules(flag: str, texts: tuple[str, ...], example: str, value: Callable[[str], Value]) -> dict[str, Value]:
    """Pattern -> what is behind the last `=` of a text.

    Raises:
      MpqError: a text is not of that form, or a pattern is given twice.
    """
    found: dict[str, Value] = {}
    for text in texts:
        pattern, separator, schemes = text.rpartition("=")  # a regular expression may hold one, a scheme does not
        if not (separator and pattern and schemes):
            raise MpqError(f"{flag} {text!r} is not a pattern and schemes: write for instance '{example}'")
        if pattern in found:
            raise MpqError(f"{flag} {pattern!r} is given twice: keep one of them")
        found[pattern] = value(schemes)
    return found
