"""Rules by regular expression: what a person fixes before anything is solved.

A *pin* fixes the scheme of the weights it matches, an *only* the set of schemes they may take. A pattern matches whole
weight paths. Fused groups follow their members: what is left to a group is what every rule on any of them leaves.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from mpq.types import MpqError, Scheme, SensitivityTable

Pins = Mapping[str, Scheme | str]
Only = Mapping[str, Sequence[Scheme | str]]


def matching(pattern: str, paths: Sequence[str], kind: str) -> list[int]:
    """Positions of the paths that `pattern` matches as a whole.

    Args:
      pattern: regular expression.
      paths: of all weights.
      kind: what the rule is called in messages: `pin`, `only`.

    Raises:
      MpqError: it is no regular expression, or matches nothing.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise MpqError(f"{kind} {pattern!r} is not a regular expression: {error}") from None
    matched = [row for row, path in enumerate(paths) if compiled.fullmatch(path)]
    if not matched:
        raise MpqError(
            f"{kind} {pattern!r} matches no weight; write '.*' for the part that varies; there are {join(paths)}"
        )
    return matched


def allowed_schemes(table: SensitivityTable, rows: list[list[int]], pins: Pins, only: Only) -> np.ndarray:
    """What the rules leave of each group's schemes.

    Args:
      table: rows are weights, columns schemes.
      rows: of each group; a scheme that does not fit every member is not allowed.
      pins: pattern -> scheme.
      only: pattern -> schemes.

    Returns:
      `bool[G, S]`, at least one in every row.

    Raises:
      MpqError: a pattern matches nothing or is no regular expression, a scheme is not in the table, a set is empty, or
        the rules on one group leave nothing.
    """
    texts = [str(scheme) for scheme in table.schemes]
    paths = [spec.path for spec in table.weights]
    fits = [[scheme.fits(spec.k) for scheme in table.schemes] for spec in table.weights]
    allowed = np.array([np.all([fits[row] for row in index], axis=0) for index in rows], np.bool_)
    rules = [("pin", pattern, (scheme,)) for pattern, scheme in pins.items()]
    rules += [("only", pattern, tuple(schemes)) for pattern, schemes in only.items()]
    applied: dict[int, list[str]] = {}
    for group, index in enumerate(rows):
        if misfits := [text for text, fit in zip(texts, allowed[group], strict=True) if not fit]:
            applied[group] = [f"rows of {table.weights[index[0]].k}, which do not fill blocks of {join(misfits)},"]
    for kind, pattern, schemes in rules:
        wanted = _known(kind, pattern, schemes, texts)
        matched = set(matching(pattern, paths, kind))
        for group, index in enumerate(rows):
            if matched.isdisjoint(index):
                continue
            applied.setdefault(group, []).append(f"{kind} {pattern!r} ({', '.join(wanted)})")
            allowed[group] &= [text in wanted for text in texts]
            if not allowed[group].any():
                raise MpqError(
                    f"{' and '.join(applied[group])} contradict each other on {paths[index[0]]} and the weights fused "
                    "with it, where they leave no scheme: drop one of them or give them one in common"
                )
    return allowed


def _known(kind: str, pattern: str, schemes: Sequence[Scheme | str], texts: list[str]) -> list[str]:
    wanted = [str(scheme) for scheme in schemes]
    for text in wanted:
        if text not in texts:
            raise MpqError(f"{kind} {pattern!r}: scheme {text!r} is not in the table, which has {join(texts)}")
    if not wanted:
        raise MpqError(f"{kind} {pattern!r} names no scheme: give at least one of {join(texts)}")
    return wanted


def join(items: Sequence[object], most: int = 40) -> str:
    """Items for a message, separated by commas; of a long list the first, and how many there are more."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
