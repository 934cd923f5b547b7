"""The process that asks math-verify: a JSON question a line in, an outcome a line out.

It is killed from outside when it takes too long, so it has no time limit of its own; it has one of memory.
"""

import contextlib
import ctypes
import json
import logging
import signal
import sys
from pathlib import Path

try:
    import resource
except ImportError:
    # Windows has none, and no such limit
    resource = None  # type: ignore[assignment]

from trl_crisp.evaluation.near_misses import is_near_miss

# Ours: sixteen times the 65 MB (of addresses, on Linux) that the process has at most over 200 golds of MATH-500
MEMORY_LIMIT_BYTES = 2**30
# Linux's, from sys/prctl.h
_PR_SET_PDEATHSIG = 1


def compare(gold: str, text: str | None, exact: bool = True) -> str:
    """
    Compare a text with the gold answer, as the paper's grader does.

    Args:
        gold: The right answer, without a box.
        text: Where the answer is looked for: LaTeX, and plain expressions. `None` asks whether the gold can be read.
        exact: math-verify alone. Otherwise an inequality is an answer to an interval, and [`is_near_miss`] has the last word.

    Returns:
        "equal", "different", "near_miss" (different, which math-verify did not see), "unparseable" (nothing was found in the
        text), or "error" (the gold cannot be read, or math-verify failed).

    Raises:
        MemoryError: If it takes more than the process may have.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    try:
        expected = parse(f"\\boxed{{{gold}}}", extraction_config=(LatexExtractionConfig(),), parsing_timeout=None)
        if not expected:
            return "error"
        if text is None:
            return "error" if not exact and all(isinstance(item, str) for item in expected) else "equal"
        found = parse(text, extraction_config=(ExprExtractionConfig(), LatexExtractionConfig()), parsing_timeout=None)
        if not found:
            return "unparseable"
        equal = verify(expected, found, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=not exact)
        if equal and not exact and is_near_miss(gold, text, expected, found):
            return "near_miss"
        return "equal" if equal else "different"
    except (Exception, RecursionError) as error:
        if isinstance(error, MemoryError):
            raise
        return "error"


def main() -> None:
    """
    Answer until the input ends or the caller does.

    A question that takes more memory than the process may have ends it without an answer.
    """
    if sys.platform == "linux":
        # The end of the input is read after a comparison, which may take hours; elsewhere it has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if resource is not None:
        # A lower one may be set
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.CRITICAL)
    # The first comparison imports what the others need
    compare("1", "\\boxed{1}")
    # The replies alone go where the caller reads
    replies, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        outcome = compare(*json.loads(line))
        if _has_grown():
            # math-verify goes on after most errors, also after that of a full memory, in which nothing more could be graded
            sys.exit(1)
        print(json.dumps(outcome), file=replies, flush=True)


def _has_grown() -> bool:
    """Whether the process has come near its limit, on Linux, which alone enforces it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return False
    # Not getrusage, which counts the memory of the process that started this one
    peak = next((line for line in status.splitlines() if line.startswith("VmPeak:")), "VmPeak: 0 kB")
    return int(peak.split()[1]) * 1024 > MEMORY_LIMIT_BYTES // 2


if __name__ == "__main__":
    main()
