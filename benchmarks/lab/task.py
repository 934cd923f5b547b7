"""The lab's task: problems with a difficulty, solutions of a verbose and a concise writer, and a verifier.

A problem is to add k one-digit numbers; k, from 2 to 7, is its difficulty. A solution adds one number at a time, and may check
each step several times:

    add : a 3 b 8 c 2
    b 3 + 8 = 1 0 ; check b 3 + 8 = 1 1 no ; check b 3 + 8 = 1 1 ok ; c 1 1 + 2 = 1 3 ; so answer 1 3

Numbers are written digit by digit, so that the model learns to carry instead of a table of sums. Each number has a letter, so that
the model keeps its place after many checks.

The instruction changes how often a step is checked. Both writers check, so the two modes overlap (the reverse KL has almost no
gradient toward what the student never does). If a sum passes 9, the first result is sometimes wrong, and only the first check
corrects it. The forms differ in the value of a check:

- "stability": steps are always right, so every check is useless.
- "tradeoff": wrong results are frequent. The instruction drops the later checks, which are useless, and few of the first checks. So
  shortening costs almost no accuracy at first, and much accuracy beyond that, on long problems first.
"""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

DIFFICULTIES = (2, 3, 4, 5, 6, 7)
INSTRUCTION = "be concise"
MAX_SOLUTION_TOKENS = 352

_LETTERS = "abcdefg"
_WORDS = ["+", "=", ";", "check", "ok", "no", "so", "answer", "be", "concise", "add", ":", *_LETTERS]
_SPECIAL = ["<pad>", "<user>", "<assistant>", "<end>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclass(frozen=True)
class Form:
    """
    How the two writers write their solutions.

    Attributes:
        first_check_probability: Probability of a check after a step, without and with the instruction.
        next_check_probability: Probability of one more check after a check, without and with the instruction.
        max_checks: Maximum number of checks after one step.
        slip_probability: Probability that the first result is wrong if a sum passes 9.
    """

    first_check_probability: tuple[float, float]
    next_check_probability: tuple[float, float]
    max_checks: int
    slip_probability: float


FORMS = {
    "stability": Form((0.85, 0.12), (0.85, 0.12), 2, 0.0),
    "tradeoff": Form((0.95, 0.9), (0.9, 0.5), 4, 0.3),
}


def lab_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer, with one token per digit, and its chat template."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*_SPECIAL, *_WORDS, *map(str, range(10))])}))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
    )


def draw_problem(rng: random.Random, difficulty: int) -> list[int]:
    """Return `difficulty` numbers from 0 to 9."""
    return [rng.randint(0, 9) for _ in range(difficulty)]


def prompt(problem: list[int]) -> list[dict[str, str]]:
    """Return the student's prompt, as messages."""
    return [
        {
            "role": "user",
            "content": "add : " + " ".join(f"{x} {n}" for x, n in zip(_letters(problem), problem, strict=True)),
        }
    ]


def solve(problem: list[int], form: Form, concise: bool, rng: random.Random) -> str:
    """Write one solution in the style of one writer. It is wrong if a wrong first result was not checked."""
    words, total = [], problem[0]
    for letter, number in zip(_letters(problem)[1:], problem[1:], strict=True):
        right = total + number
        carries = total % 10 + number > 9
        first = right + rng.choice((-1, 1)) if carries and rng.random() < form.slip_probability else right
        words.append(f"{letter} {_digits(total)} + {number} = {_digits(first)} ;")
        result = first
        for probabilities in [form.first_check_probability] + [form.next_check_probability] * (form.max_checks - 1):
            if rng.random() >= probabilities[concise]:
                break
            verdict = "ok" if result == right else "no"
            words.append(f"check {letter} {_digits(total)} + {number} = {_digits(right)} {verdict} ;")
            result = right
        total = result
    return " ".join([*words, f"so answer {_digits(total)}"])


def is_correct(problem: list[int], solution: str) -> bool:
    """Return whether a model's solution ends in the right answer."""
    return f" {solution}".endswith(f" so answer {_digits(sum(problem))}")


def _letters(problem: list[int]) -> str:
    return _LETTERS[: len(problem)]


def _digits(number: int) -> str:
    return " ".join(str(number))
