"""Repetition and words of doubt in a text."""

import numpy as np
import pytest

from trl_crisp.rollouts.text_measures import epistemic_words, repeats_itself


def test_epistemic_words_are_counted_whole_in_any_case():
    assert epistemic_words("Wait, maybe it MIGHT be 4. Let me check: perhaps.") == 5
    assert epistemic_words("The waiter checked the mighty sum.") == 0
    assert epistemic_words("") == 0


WORKED = (
    "John starts with 35 apples and 3 times as many kiwis, which is 105.\nHe buys 93 apples and 93 - 38 = 55 kiwis.\n"
    "35 + 93 = 128 apples. 105 + 55 = 160 kiwis. 128 + 160 = 288.\nThe answer is 288."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        (" \n", False),
        ("4", False),
        (WORKED, False),
        # Lists and short runs are no loops
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22", False),
        ("1, 1, 1, 1, 1, 1", False),
        (WORKED + "\n" + WORKED, False),
        # Loops at the end, whole or cut
        (WORKED + " So the answer is 288." * 4, True),
        (WORKED + " So the answer is 288." * 3, False),
        (WORKED + (" So the answer is 288." * 8)[:-9], True),
        (WORKED + "0" * 60, True),
        (WORKED + "0" * 50, False),
        (WORKED + " So the answer is 288." * 8 + "\n\n", True),
        # Left again: only a tail that compresses 10x tells
        ("no no " * 20 + WORKED, False),
        ("no no " * 2000 + WORKED, True),
        # A loop outside of the last 10,000 characters does not count
        ("no no " * 2000 + " ".join(map(str, range(3000))), False),
    ],
)
def test_loops_at_the_end_are_repetition_and_worked_solutions_are_not(text: str, expected: bool) -> None:
    assert repeats_itself(text) is expected


def test_the_loop_rule_agrees_with_a_plain_search() -> None:
    def ends_in_loop(text: str) -> bool:
        text = text.rstrip()
        for period in range(1, len(text) // 4 + 1):
            span = max(4 * period, 60)
            tail = text[-span:]
            if len(tail) == span and all(tail[i] == tail[i + period] for i in range(span - period)):
                return True
        return False

    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        unit = "".join(generator.choice(list("ab "), size=generator.integers(1, 25)))
        text = "x" + unit * int(generator.integers(1, 9)) + unit[: generator.integers(len(unit) + 1)]
        if len(text) < 900:  # so short that the first rule says no
            assert repeats_itself(text) == ends_in_loop(text), text
            seen.add(repeats_itself(text))
    assert seen == {False, True}
