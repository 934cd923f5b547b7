r"""Grades responses: by the answer line, by the box, and by what the response says anywhere.

Training changes how a model writes its answer, so one answer format alone gives a wrong picture of a training (paper, Table
"answer formats": 57.7, 54.5 and 93.0 for the same model). The rules are those of the paper's grader:

1. the last `Answer: ...` line, wrapped in a box, compared with the gold answer by math-verify;
2. the whole response, compared with the gold answer by math-verify;
3. a response is correct if either of them is equal. A literal `\boxed{...}` is also graded alone, for the paper's boxed-only column.

Unless `exact=True`, we differ from these rules: emphasis around the answer line's word, colon and answer (`**Answer**: **42**`), digits of other
scripts, leading points and plain notation (`11 5/6`, `3√13`, `1 < x < 3`) are read; times of day and dates are compared as such; an
answer that is written like the gold is right; and an answer that math-verify calls equal is checked again for other bases, units,
words and values within its tolerance ([`~trl_crisp.evaluation.near_misses`]).

Letters of a choice are found in the answer line and the box. Facts and names (`"text"`) are right if the answer line has one of the
golds as whole words, or without an answer line the first sentence ([`~trl_crisp.evaluation.text_answers`]); the paper has no rule
for them.

math-verify runs in separate processes, which are killed if an answer takes too long, so an expression such as 9^(9^(9^9)) cannot
hang or kill the caller.
"""

import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, get_args

from trl_crisp.evaluation.answers import find_answer, find_box, find_letter
from trl_crisp.evaluation.near_misses import find_words
from trl_crisp.evaluation.notation import (
    bare,
    is_same_literal,
    read_answer,
    read_gold,
    read_literal,
    read_numbers,
    split_unit,
)
from trl_crisp.evaluation.text_answers import after_thinking, first_sentence, says, words

Status = Literal["ok", "unparseable", "timeout", "error"]
Kind = Literal["math", "choice", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# A gold, the text to find it in (`None` asks whether the gold can be read), and whether math-verify decides alone
Question = tuple[str, str | None, bool]

# math-verify's default for parsing; most responses take milliseconds
TIMEOUT_S = 5.0
# Ours: importing math-verify takes a second or two, and longer on a busy machine
_START_TIMEOUT_S = 120.0


def require_math_verify() -> None:
    """Raise `ImportError` if math-verify is not installed, before answers are sampled that could not be graded."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError('Grading needs math-verify, which is not installed: pip install "trl-crisp[eval]".')


@dataclass(frozen=True)
class Grade:
    r"""
    The grade of one response.

    Attributes:
        answer_correct: Whether the last `Answer: ...` line is the gold answer; for a text, whether it says one of the golds.
        boxed_correct: The same for the last literal `\boxed{...}`.
        correct: Whether the answer line or the whole response is right; for a choice the answer line or the box; for a text the answer
            line, or the first sentence if there is no answer line.
        status: `"ok"`: the response was graded. `"unparseable"`: no answer was found in it. `"timeout"`, `"error"`: it could not be
            graded, so it may be right or wrong. A correct response is `"ok"`.
        answer: The answer line's text; `None` if there is none.
        anywhere_correct: For a text, whether any part of the response says one of the golds. A long answer may be right by this
            because it mentions much. `None` for the other kinds.
    """

    answer_correct: bool
    boxed_correct: bool
    correct: bool
    status: Status
    answer: str | None
    anywhere_correct: bool | None = None


def grade(
    response: str,
    gold: str | Sequence[str],
    kind: Kind = "math",
    exact: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Grade:
    """
    Grade one response. For many responses, [`Grader`] keeps its processes.

    Args:
        response: What the model wrote.
        gold: The right answer, in LaTeX or as a number; the letter of a choice; a text, or several texts if each is right.
        kind: `"math"`, `"choice"` for a letter, `"text"` for facts and names.
        exact: Use exactly the authors' rules. They have none for a text.
        timeout_s: The seconds that each comparison may take.
    """
    with Grader(workers=1, exact=exact, timeout_s=timeout_s) as grader:
        return grader.grade_all([(response, gold)], kind)[0]


class Grader:
    """
    Grades many responses in parallel processes. A context manager.

    Args:
        workers: The number of processes; by default one per core, at most 8.
        exact: Use exactly the authors' rules.
        timeout_s: The seconds that each comparison may take before its process is killed.
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
        pairs: Sequence[tuple[str, str | Sequence[str]]],
        kind: Kind = "math",
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Grade]:
        """
        Grade responses.

        Args:
            pairs: Each response and its gold answer; for texts also a list of golds, each of them right.
            kind: `"math"`, `"choice"` for a letter, `"text"` for facts and names.
            on_progress: Receives the number of responses that are graded.

        Raises:
            ValueError: If the kind does not exist, or if a gold answer is empty, is not a letter (`"choice"`), or has no word
                (`"text"`).
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}.")
        golds = [_golds(gold, kind, f"pair {i}") for i, (_, gold) in enumerate(pairs)]
        responses = [response for response, _ in pairs]
        if kind == "choice":
            return [
                _grade_choice(response, gold[0], self.exact) for response, gold in zip(responses, golds, strict=True)
            ]
        if kind == "text":
            return [_grade_text(response, gold) for response, gold in zip(responses, golds, strict=True)]
        gradings = [_Grading(response, gold[0], self.exact) for response, gold in zip(responses, golds, strict=True)]
        self._run(gradings, on_progress)
        return [grading.result() for grading in gradings]

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Return for each gold whether it can be read as math. A gold that takes too long counts as readable."""
        checks = [_Check(gold) for gold in golds]
        self._run(checks, None)
        return [check.outcome != "error" for check in checks]

    def _run(self, gradings: Sequence["_Grading | _Check"], on_progress: Callable[[int], None] | None) -> None:
        open_gradings = iter([grading for grading in gradings if grading.next_question() is not None])
        done = sum(grading.next_question() is None for grading in gradings)
        if on_progress is not None and done:
            on_progress(done)
        with selectors.DefaultSelector() as selector:

            def give(worker: _Worker, grading: "_Grading | _Check | None") -> None:
                grading = grading if grading and grading.next_question() else next(open_gradings, None)
                worker.grading = grading
                if grading is not None:
                    worker.begin(grading.next_question(), self.timeout_s)
                    selector.register(worker.output, selectors.EVENT_READ, worker)

            while len(self._workers) < min(self._count, len(gradings) - done):
                self._workers.append(_Worker())
            for worker in self._workers:
                # Linux ends a worker with the thread that started it
                if worker.process.poll() is not None:
                    worker.restart()
                give(worker, None)
            while waiting := list(selector.get_map().values()):
                left_s = min(key.data.deadline_s for key in waiting) - time.monotonic()
                selector.select(max(0.0, left_s))
                # An answer that has arrived by now is not a time-out, even if it is read after the deadline
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
                    grading.take(outcome)
                    if outcome in ("timeout", "died"):
                        worker.restart()
                    if grading.next_question() is None:
                        done += 1
                        if on_progress is not None:
                            on_progress(done)
                    give(worker, grading)


class _Worker:
    """A process that answers one question at a time. No method waits for it."""

    grading: "_Grading | _Check | None" = None

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.kill()
        # A new command line, so that the process imports none of the caller's modules
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl_crisp.evaluation.math_verify_worker"],
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
            # It may have died while a question was written
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()

    def begin(self, question: Question | None, timeout_s: float) -> None:
        """Ask a question as soon as the process has started."""
        self._question, self._timeout_s = question, timeout_s
        if self.started:
            self._ask()
        else:
            self.deadline_s = time.monotonic() + _START_TIMEOUT_S

    def _ask(self) -> None:
        assert self.process.stdin is not None
        # The time limit starts when the whole question is written
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(self._question).encode() + b"\n")
            self.process.stdin.flush()
        self.deadline_s = time.monotonic() + self._timeout_s

    def answer(self) -> str | None:
        """Return the outcome; `None` if the process only said that it has started."""
        line = self.output.readline()
        if not self.started:
            if line != b'"ready"\n':
                raise self._did_not_start()
            self.started = True
            self._ask()
            return None
        # A process that the memory limit or the kernel has ended wrote no whole line
        return json.loads(line) if line.endswith(b"\n") else "died"

    def late(self) -> str:
        """Return the outcome if nothing was answered in time."""
        if not self.started:
            raise self._did_not_start()
        return "timeout"

    def _did_not_start(self) -> RuntimeError:
        return RuntimeError(
            "the process that grades did not start. Check that math-verify is installed: pip install 'trl-crisp[eval]', "
            f'then `{sys.executable} -m trl_crisp.evaluation.math_verify_worker` prints "ready".'
        )


class _Grading:
    """The questions that one response needs, in order, and their outcomes."""

    def __init__(self, response: str, gold: str, exact: bool) -> None:
        self.exact = exact
        self.answer = find_answer(response, exact)
        texts = {"answer": self.answer, "boxed": find_box(response)}
        self.outcomes: dict[str, str] = {}
        self.identical = False
        if exact:
            self.gold = gold
        else:
            read = read_gold(gold)
            literal = read_literal(read)
            self.gold, unit = split_unit(read_answer(read))
            for name, text in texts.items():
                if text is None:
                    continue
                texts[name], other_unit = split_unit(read_answer(text))
                if literal is not None:
                    same = is_same_literal(literal, read_literal(text, last=True))
                    self.outcomes[name] = "equal" if same else "different"
                elif _is_written_like(read, text):
                    self.outcomes[name], self.identical = "equal", True
                elif unit and other_unit and unit != other_unit:
                    self.outcomes[name] = "near_miss"
            if literal is not None:
                last = read_literal(response, last=True)
                same = is_same_literal(literal, last)
                self.outcomes["response"] = "equal" if same else "different" if last else "unparseable"
            elif bare(response) == bare(read):
                self.outcomes["response"] = "equal"
            response = read_numbers(response).replace(r"\fbox{", r"\boxed{")
        # The whole response comes last: it takes longest, and is not needed if the answer line is right
        self.texts = {name: f"\\boxed{{{text}}}" for name, text in texts.items() if text is not None}
        self.texts["response"] = response

    def next_question(self) -> Question | None:
        name = next((name for name in self.texts if name not in self.outcomes), None)
        # The whole response would give the near miss of the line or the box again
        if name is None or (
            name == "response" and (self._is("answer", "equal") or "near_miss" in self.outcomes.values())
        ):
            return None
        return self.gold, self.texts[name], self.exact

    def take(self, outcome: str) -> None:
        self.outcomes[next(name for name in self.texts if name not in self.outcomes)] = outcome

    def result(self) -> Grade:
        relevant = {outcome for name, outcome in self.outcomes.items() if name != "boxed" or outcome == "near_miss"}
        # An identical text counts even if math-verify cannot read the gold
        identical = self.identical and not relevant & {"different", "near_miss"}
        correct = "equal" in relevant or identical
        status: Status = "ok"
        if not correct:
            if "timeout" in relevant:
                status = "timeout"
            elif relevant & {"error", "died"}:
                status = "error"
            elif not relevant & {"different", "near_miss"}:
                status = "unparseable"
        return Grade(
            answer_correct=self._is("answer", "equal"),
            boxed_correct=self._is("boxed", "equal"),
            correct=correct,
            status=status,
            answer=self.answer,
        )

    def _is(self, name: str, outcome: str) -> bool:
        return self.outcomes.get(name) == outcome


def _is_written_like(gold: str, text: str) -> bool:
    """Whether two answers are the same text; the case of words does not count."""
    written = [bare(read_answer(one)) for one in (gold, text)]
    if find_words(gold) and not any(map(str.isdigit, gold)):
        written = [one.casefold() for one in written]
    return written[0] == written[1]


class _Check:
    """The question whether a gold can be read."""

    def __init__(self, gold: str) -> None:
        read = read_gold(gold)
        self.gold, _ = split_unit(read_answer(read))
        self.outcome = "equal" if read_literal(read) is not None else None

    def next_question(self) -> Question | None:
        return (self.gold, None, False) if self.outcome is None else None

    def take(self, outcome: str) -> None:
        self.outcome = outcome


def _golds(gold: str | Sequence[str], kind: Kind, where: str) -> list[str]:
    golds = [gold] if isinstance(gold, str) else list(gold)
    what = {"math": "the right answer", "choice": "one letter", "text": "one with a word or a number"}[kind]
    fits = {
        "math": lambda one: one.strip(),
        "choice": lambda one: find_letter(one),
        "text": lambda one: words(read_gold(one)),
    }[kind]
    if not golds or not all(isinstance(one, str) and fits(one) for one in golds):
        raise ValueError(f"{where} has the gold answer {gold!r}: give {what}, as text.")
    if len(golds) > 1 and kind != "text":
        raise ValueError(f"{where} has {len(golds)} gold answers, {golds!r}: only texts can have several. Give one.")
    return golds


def _grade_choice(response: str, gold: str, exact: bool) -> Grade:
    answer, box = find_answer(response, exact), find_box(response)
    chosen = [find_letter(text, exact) if text is not None else None for text in (answer, box)]
    right = [letter == find_letter(gold, exact) for letter in chosen]
    return Grade(
        answer_correct=right[0],
        boxed_correct=right[1],
        correct=any(right),
        status="ok" if any(letter is not None for letter in chosen) else "unparseable",
        answer=answer,
    )


def _grade_text(response: str, golds: Sequence[str]) -> Grade:
    golds = [read_gold(gold) for gold in golds]
    said = after_thinking(response)
    answer, box = find_answer(said), find_box(said)
    where = answer if answer is not None else first_sentence(said)
    return Grade(
        answer_correct=answer is not None and says(answer, golds),
        boxed_correct=box is not None and says(box, golds),
        correct=says(where, golds),
        status="ok" if words(where) else "unparseable",
        answer=answer,
        anywhere_correct=says(response, golds),
    )
