r"""Whether a response answers a problem: by its answer line, by its box, or by what it says anywhere.

Models change how they write their answer when they are trained, so one format alone mis-states what training did (paper,
Table "answer formats": 57.7, 54.5 and 93.0 for the same model). The rules are those of the paper's grader:

1. the last `Answer: ...` line, wrapped in a box, compared with the gold answer by math-verify;
2. the whole response, compared with the gold answer by math-verify;
3. correct is what either of them finds. A literal `\boxed{...}` is graded apart, for the paper's boxed-only column.

Where we differ, unless `exact=True`: decimal digits of other scripts are read as 0 to 9, and Markdown emphasis around the
answer (`**42**`), or a LaTeX space behind it, is no part of it. math-verify reads none of them, so a right answer would be counted
as wrong for its looks.

math-verify runs in processes of its own, which are killed when an answer takes them too long: expressions such as
9^(9^(9^9)) can neither hang nor kill the caller.
"""

import contextlib
import importlib.util
import json
import os
import re
import selectors
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

Status = Literal["ok", "unparseable", "timeout", "error"]
Kind = Literal["math", "choice"]

# math-verify's own default for parsing; a usual response takes milliseconds
TIMEOUT_S = 5.0
# Ours: importing math-verify takes a second or two, on a machine under load several
_START_TIMEOUT_S = 120.0

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_BRACE = re.compile(r"\\boxed\{|[{}]")
# Not "!": 5! is a factorial
_STRIPPED = ".,;:?\"' \t"
_EMPHASIS = "*_`"
_CHOICE = re.compile(r"^[^A-Za-z0-9]*(?:\\(?:text|mathrm|textbf|mathbf)\{)?[^A-Za-z0-9]*([A-Za-z])(?![A-Za-z])")


def require_math_verify() -> None:
    """Raise `ImportError` where math-verify is not installed, before anything is sampled that could not be graded."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError('Grading needs math-verify, which is not installed: pip install "trl-crisp[eval]".')


@dataclass(frozen=True)
class Grade:
    r"""
    What grading one response found.

    Attributes:
        answer_correct: The last `Answer: ...` line is the gold answer.
        boxed_correct: The last literal `\boxed{...}` is.
        correct: The answer line or the whole response is; the answer line or the box of a letter choice.
        status: `"ok"`: it was graded. `"unparseable"`: nothing that could be an answer was found. `"timeout"`, `"error"`: it
            could not be graded, which says nothing about the answer. A response that is correct is `"ok"`.
        answer: The answer line's text, `None` without one.
    """

    answer_correct: bool
    boxed_correct: bool
    correct: bool
    status: Status
    answer: str | None


def find_answer(response: str, exact: bool = False) -> str | None:
    """Return the text of the last `Answer: ...` line, or `None` where there is none or it is empty."""
    found = _ANSWER_LINE.findall(response)
    if not found:
        return None
    answer = found[-1].strip().rstrip(_STRIPPED)
    # What is left of LaTeX's spaces, `\\,` and the like
    return (answer if exact else answer.strip(_STRIPPED + _EMPHASIS).rstrip("\\" + _STRIPPED)) or None


def find_box(response: str) -> str | None:
    r"""Return what is inside the last literal `\boxed{...}`, or `None` where there is none that is closed."""
    # One pass with a stack: a response may hold thousands of boxes that never close
    opened: list[int | None] = []
    last: tuple[int, int] | None = None
    for found in _BRACE.finditer(response):
        if found.group() == "}":
            start = opened.pop() if opened else None
            if start is not None and (last is None or start > last[0]):
                last = (start, found.start())
        else:
            opened.append(found.end() if len(found.group()) > 1 else None)
    return None if last is None else response[last[0] : last[1]]


def grade(response: str, gold: str, kind: Kind = "math", exact: bool = False, timeout_s: float = TIMEOUT_S) -> Grade:
    """
    Grade one response; for many, [`Grader`] keeps its processes.

    Args:
        response: What the model wrote.
        gold: The right answer, in LaTeX or as a number; the letter of a choice.
        kind: `"math"`, or `"choice"` for a letter.
        exact: The authors' rules to the letter.
        timeout_s: Seconds that each comparison may take.
    """
    with Grader(workers=1, exact=exact, timeout_s=timeout_s) as grader:
        return grader.grade_all([(response, gold)], kind)[0]


class Grader:
    """
    Grades many responses, side by side in processes of its own. A context manager.

    Args:
        workers: Processes. By default one a core, at most 8.
        exact: The authors' rules to the letter.
        timeout_s: Seconds that each comparison may take before its process is killed.
    """

    def __init__(self, workers: int | None = None, exact: bool = False, timeout_s: float = TIMEOUT_S) -> None:
        if timeout_s <= 0:
            raise ValueError(
                f"timeout_s={timeout_s}: give the seconds that a comparison may take, such as {TIMEOUT_S}."
            )
        self.exact = exact
        self.timeout_s = timeout_s
        self._count = workers or min(os.cpu_count() or 1, 8)
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def grade_all(
        self,
        pairs: Sequence[tuple[str, str]],
        kind: Kind = "math",
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Grade]:
        """
        Grade responses.

        Args:
            pairs: Response and gold answer of each.
            kind: `"math"`, or `"choice"` for a letter.
            on_progress: Called with the number of responses graded so far.

        Raises:
            ValueError: For a gold answer that is empty, or no letter where the kind is `"choice"`.
        """
        for i, (_, gold) in enumerate(pairs):
            if not gold.strip() or (kind == "choice" and _letter(gold) is None):
                what = "one letter" if kind == "choice" else "the right answer"
                raise ValueError(f"pair {i} has the gold answer {gold!r}: give {what}, as text.")
        if kind == "choice":
            return [_grade_choice(response, gold, self.exact) for response, gold in pairs]
        gradings = [_Grading(response, gold, self.exact) for response, gold in pairs]
        self._run(gradings, on_progress)
        return [grading.result() for grading in gradings]

    def _run(self, gradings: list["_Grading"], on_progress: Callable[[int], None] | None) -> None:
        open_gradings = iter([grading for grading in gradings if grading.next_comparison() is not None])
        done = 0
        with selectors.DefaultSelector() as selector:

            def give(worker: _Worker, grading: "_Grading | None") -> None:
                grading = grading if grading and grading.next_comparison() else next(open_gradings, None)
                worker.grading = grading
                if grading is not None:
                    worker.begin(grading.next_comparison(), self.timeout_s)
                    selector.register(worker.output, selectors.EVENT_READ, worker)

            while len(self._workers) < min(self._count, len(gradings)):
                self._workers.append(_Worker())
            for worker in self._workers:
                # Linux ends it with the thread that started it
                if worker.process.poll() is not None:
                    worker.restart()
                give(worker, None)
            while waiting := list(selector.get_map().values()):
                left_s = min(key.data.deadline_s for key in waiting) - time.monotonic()
                selector.select(max(0.0, left_s))
                # What has come by now is no time-out, however late it is read
                now_s = time.monotonic()
                ready = {key.data for key, _ in selector.select(0)}
                for key in waiting:
                    worker = key.data
                    if worker not in ready and worker.deadline_s > now_s:
                        continue
                    outcome = worker.answer() if worker in ready else worker.late()
                    if outcome is None:
                        continue
                    selector.unregister(worker.output)
                    grading = worker.grading
                    assert grading is not None
                    grading.outcomes.append(outcome)
                    if outcome in ("timeout", "died"):
                        worker.restart()
                    if grading.next_comparison() is None:
                        done += 1
                        if on_progress is not None:
                            on_progress(done)
                    give(worker, grading)


class _Worker:
    """A process that compares one pair at a time. Nothing here waits for it."""

    grading: "_Grading | None" = None

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.kill()
        # By its own command line, so that it imports nothing of the caller's
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl_crisp.evaluation.comparing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.started = False

    @property
    def output(self) -> Any:
        return self.process.stdout

    def kill(self) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            process.kill()
            process.wait()
            # It may have died with a question on its way
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()

    def begin(self, comparison: "tuple[str, str] | None", timeout_s: float) -> None:
        """Ask, at once or as soon as the process has started."""
        self._comparison, self._timeout_s = comparison, timeout_s
        if self.started:
            self._ask()
        else:
            self.deadline_s = time.monotonic() + _START_TIMEOUT_S

    def _ask(self) -> None:
        assert self.process.stdin is not None
        # The time counts from when it has the whole text
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(self._comparison).encode() + b"\n")
            self.process.stdin.flush()
        self.deadline_s = time.monotonic() + self._timeout_s

    def answer(self) -> str | None:
        """Return what it says; `None` where that is only that it has started."""
        line = self.output.readline()
        if not self.started:
            if line != b'"ready"\n':
                raise self._did_not_start()
            self.started = True
            self._ask()
            return None
        # The kernel ends a process that takes all memory
        return json.loads(line) if line.endswith(b"\n") else "died"

    def late(self) -> str:
        """Return what it means that nothing came in time."""
        if not self.started:
            raise self._did_not_start()
        return "timeout"

    def _did_not_start(self) -> RuntimeError:
        return RuntimeError(
            "the process that grades did not start. Check that math-verify is installed: pip install 'trl-crisp[eval]', "
            f'then `{sys.executable} -m trl_crisp.evaluation.comparing` prints "ready".'
        )


class _Grading:
    """The comparisons that one response needs, in turn, and what came of them."""

    def __init__(self, response: str, gold: str, exact: bool) -> None:
        response, gold = (response, gold) if exact else (_ascii_digits(response), _ascii_digits(gold))
        self.answer = find_answer(response, exact)
        box = find_box(response)
        self.gold = gold
        # In this order: the whole response, which takes longest, is not needed where the answer line is right
        self.names = ["answer"] * (self.answer is not None) + ["boxed"] * (box is not None) + ["response"]
        self.texts = {"answer": f"\\boxed{{{self.answer}}}", "boxed": f"\\boxed{{{box}}}", "response": response}
        self.outcomes: list[str] = []

    def next_comparison(self) -> tuple[str, str] | None:
        place = len(self.outcomes)
        if place == len(self.names) or (self.names[place] == "response" and self._outcome("answer") == "equal"):
            return None
        return self.gold, self.texts[self.names[place]]

    def result(self) -> Grade:
        relevant = [self._outcome("answer"), self._outcome("response")]
        correct = "equal" in relevant
        status: Status = "ok"
        if not correct:
            if "timeout" in relevant:
                status = "timeout"
            elif {"error", "died"} & set(relevant):
                status = "error"
            elif "different" not in relevant:
                status = "unparseable"
        return Grade(
            answer_correct=self._outcome("answer") == "equal",
            boxed_correct=self._outcome("boxed") == "equal",
            correct=correct,
            status=status,
            answer=self.answer,
        )

    def _outcome(self, name: str) -> str | None:
        return dict(zip(self.names, self.outcomes, strict=False)).get(name)


def _grade_choice(response: str, gold: str, exact: bool) -> Grade:
    answer, box = find_answer(response, exact), find_box(response)
    chosen = [_letter(text) if text is not None else None for text in (answer, box)]
    right = [letter == _letter(gold) for letter in chosen]
    return Grade(
        answer_correct=right[0],
        boxed_correct=right[1],
        correct=any(right),
        status="ok" if any(letter is not None for letter in chosen) else "unparseable",
        answer=answer,
    )


def _letter(text: str) -> str | None:
    found = _CHOICE.match(text)
    return found[1].upper() if found else None


def _ascii_digits(text: str) -> str:
    if text.isascii():
        return text
    # Decimal digits alone: a superscript two is an exponent
    return "".join(
        character if character.isascii() else str(unicodedata.decimal(character, character)) for character in text
    )


def count_statuses(grades: Iterable[Grade]) -> dict[str, int]:
    """Return how many grades have each status."""
    counts = dict.fromkeys(("ok", "unparseable", "timeout", "error"), 0)
    for one in grades:
        counts[one.status] += 1
    return counts
