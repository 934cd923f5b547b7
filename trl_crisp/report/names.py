"""Names that can be told apart: of models and runs by the parts of their paths that differ, and as labels of a figure."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def differing_parts(paths: Sequence[Path]) -> list[str]:
    """
    Return a name for each path: as few of its last parts as tell it from the others, without the last parts that all have.

    `a/run-1/eval` and `b/run-2/eval` are `run-1` and `run-2`. Equal paths have equal names.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    shortest = min(map(len, parts))
    ending = 0
    while ending < shortest - 1 and len({one[len(one) - ending - 1] for one in parts}) == 1 < len(set(parts)):
        ending += 1
    parts = [one[: len(one) - ending] for one in parts]
    kept = 1
    while kept < max(map(len, parts)) and len({one[-kept:] for one in parts}) < len(set(parts)):
        kept += 1
    return ["/".join(one[-kept:]) for one in parts]


def distinct_labels(texts: Sequence[str], longest: int) -> list[str]:
    """
    Return each text as one line of at most `longest` characters, without control characters; no two texts have the same.

    A longer text has its start and its end. If two of them look alike so, they begin where they differ. Equal texts are numbered.
    """
    lines = [" ".join("".join(c if c.isprintable() else " " for c in text).split()) for text in texts]
    labels = [_cut_middle(line, longest) for line in lines]
    for label in _doubled(labels):
        group = [i for i, one in enumerate(labels) if one == label]
        if len({lines[i] for i in group}) > 1:
            columns = list(zip(*(lines[i] for i in group), strict=False))
            same = next((place for place, column in enumerate(columns) if len(set(column)) > 1), len(columns))
            # With a little of what they share, so that a label is never empty
            start = max(0, same - longest // 4)
            for i in group:
                labels[i] = _cut_middle(f"…{lines[i][start:]}", longest)
    number = 0
    while doubled := _doubled(labels):
        number += 1
        place = labels.index(doubled[0])
        labels[place] = f"{labels[place][: longest - 6]} ({number})"
    return labels


def _doubled(labels: Sequence[str]) -> list[str]:
    return [label for label, count in Counter(labels).items() if count > 1]


def _cut_middle(line: str, longest: int) -> str:
    if len(line) <= longest:
        return line
    tail = longest // 2
    return f"{line[: longest - 1 - tail]}…{line[-tail:]}"
