"""The type of the functions that receive an evaluation's progress."""

from collections.abc import Callable

# Receives the stage ("sampling" or "grading"), how many of its items are done, how many items it has, and a note
Tell = Callable[[str, int, int, str], None]
