"""The benchmark of preflight: which answer a text gives, ranks, and the committed table."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.preflight import INSTRUCTIONS, RESULT, cities, first_country, rank_correlations, ranks, table

README = Path("benchmarks/README.md")


@pytest.mark.parametrize(
    ("text", "country"),
    [
        ("Arequipa is a city in southern Peru, near Chile.", "Peru"),
        ("It is in the U.S. of A.", "United States"),
        ("I do not know.", None),
    ],
)
def test_the_first_country_is_found_by_any_of_its_names(text, country):
    assert first_country()(text) == country


def test_no_question_names_a_country():
    """Else the answer would be read off the question's words in the text."""
    answer_of = first_country()
    assert [row["id"] for row in cities("train", "tune", "test") if answer_of(row["question"])] == []


def test_equal_values_share_their_rank():
    assert ranks([0.3, 0.1, 0.3, 0.9]) == [2.5, 1.0, 2.5, 4.0]


def test_the_committed_table_is_the_results():
    results = json.loads(RESULT.read_text(encoding="utf-8"))
    assert table(results) in README.read_text(encoding="utf-8")
    rows = results["instructions"]
    assert [row["instruction"] for row in rows] == list(INSTRUCTIONS)
    assert results["rank_correlation"] == pytest.approx(rank_correlations(rows))
    base = np.mean(results["base_tokens"])
    for row in rows:
        assert row["training"]["reduction"]["estimate"] == pytest.approx(1 - np.mean(row["tokens"]) / base)
