from pathlib import Path

import pytest

from trl_crisp.report.names import differing_parts, distinct_labels


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/run"], ["run"]),
        (["seed0", "seed1"], ["seed0", "seed1"]),
        (["runA/eval", "runB/eval"], ["runA", "runB"]),
        (["runA/eval/math", "/else/where/runB/eval/math"], ["runA", "runB"]),
        (["a/x", "b/x", "b/y"], ["a/x", "b/x", "b/y"]),
        (["run", "run/checkpoint-10"], ["run", "checkpoint-10"]),
        (["a/eval", "eval"], None),
        (["x/../a/out", "b/out"], ["a", "b"]),
    ],
)
def test_a_name_is_the_parts_of_the_path_that_differ(paths, names):
    found = differing_parts([Path(path) for path in paths])
    assert found == names or names is None
    assert len(set(found)) == len(paths)


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["short", "other"], ["short", "other"]),
        (["qwen3-math500-seed0", "qwen3-math500-seed1"], ["qwen3-m…0-seed0", "qwen3-m…0-seed1"]),
        # They differ in the middle, in both places, or not at all once they are one line
        (["a" * 20 + "1" + "b" * 20, "a" * 20 + "2" + "b" * 20], ["…aaa1bb…bbbbbbb", "…aaa2bb…bbbbbbb"]),
        (["a\nb", "a\tb"], ["a b (1)", "a b"]),
        (["x" * 15, "x" * 16], ["x" * 15, "xxxxxxx…xxxxxxx"]),
        (["\x00\x1b[31m", "日本"], ["[31m", "日本"]),
    ],
)
def test_labels_are_short_and_distinct(texts, labels):
    assert distinct_labels(texts, 15) == labels


def test_labels_of_many_like_names_are_distinct():
    texts = [f"{'p' * 30}{i}{'q' * 30}{j}{'r' * 30}" for i in range(5) for j in range(5)] + ["same"] * 5
    labels = distinct_labels(texts, 24)
    assert len(set(labels)) == len(texts)
    assert max(map(len, labels)) <= 24
