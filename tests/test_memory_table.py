"""The table of computed memory in benchmarks/README.md is what the formulas give."""

import pytest

from benchmarks import memory_table
from benchmarks.environment import REPOSITORY
from benchmarks.memory_table import CLOSING, OPENING, SHAPES, TRAININGS, config_of, replaced, row_of
from trl_crisp.models.memory import estimate_memory

README = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
ROWS = README.split(OPENING)[1].split(CLOSING)[0].strip().splitlines()


# As the model cards print them
@pytest.mark.parametrize(("size", "billions"), [("0.6B", 0.6), ("4B", 4.0), ("8B", 8.2), ("14B", 14.8), ("32B", 32.8)])
def test_the_shapes_are_those_of_the_released_models(size, billions):
    memory = estimate_memory(config_of(size), prompt_tokens=1, completion_tokens=1)
    assert round(memory.parameters / 1e9, 1) == billions


@pytest.mark.parametrize("size", SHAPES)
def test_every_row_is_computed_anew(size):
    shown = [row for row in ROWS[2:] if row.startswith(f"| {size} |")]
    assert shown == [row_of(size, training) for training in TRAININGS]


def test_the_table_has_these_rows_only(monkeypatch):
    monkeypatch.setattr(memory_table, "row_of", lambda size, training: f"| {size} | {training} |")
    rendered = memory_table.render().splitlines()
    assert ROWS[:2] == rendered[:2]
    assert [row.split("|")[1:3] for row in ROWS[2:]] == [row.split("|")[1:3] for row in rendered[2:]]


def test_the_table_replaces_the_one_between_the_markers():
    text = f"before {OPENING}\nold\n{CLOSING} after"
    assert replaced(text, "new\n") == f"before {OPENING}\nnew\n{CLOSING} after"
    with pytest.raises(ValueError, match="memory:computed"):
        replaced("no markers", "new\n")
