"""The process that runs math-verify. It reads one JSON question per line and writes one outcome per line.

The caller kills it if it takes too long, so it needs no time limit; it has a memory limit.
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
    # Windows has neither this module nor the limit
    resource = None  # type: ignore[assignment]

from trl_crisp.evaluation.near_misses import is_near_miss

# Ours: sixteen times the 65 MB (of addresses, on Linux) that the process has at most over 200 golds of MATH-500
MEMORY_LIMIT_BYTES = 2**30
# From Linux's sys/prctl.h
_PR_SET_PDEATHSIG = 1


def compare(gold: str, text: str | None, exact: bool = True) -> str:
    """
    Compare a text with the gold answer, as the paper's grader does.

    Args:
        gold: The right answer, without a box.
        text: The text to find the answer in, as LaTeX or a plain expression. `None` asks whether the gold can be read.
        exact: math-verify decides alone. Otherwise an inequality can answer an interval, and [`is_near_miss`] decides last.

    Returns:
        "equal", "different", "near_miss" (different, but math-verify calls it equal), "unparseable" (nothing was found in the
        text), or "error" (the gold cannot be read, or math-verify failed).

    Raises:
        MemoryError: If it takes more memory than the limit.
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
    Answer until the input or the caller ends.

    If a question takes more memory than the limit, the process ends without an answer.
    """
    if sys.platform == "linux":
        # The kernel ends this process with its caller. On other systems it ends when it next reads its input, which may be hours later.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if resource is not None:
        # A lower limit may be set already
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.CRITICAL)
    # The first comparison imports what later ones need
    compare("1", "\\boxed{1}")
    # The caller reads stdout, so only replies may go there
    replies, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        outcome = compare(*json.loads(line))
        if _has_grown():
            # math-verify catches most errors, including a MemoryError, and after that nothing more could be graded
            sys.exit(1)
        print(json.dumps(outcome), file=replies, flush=True)


def _has_grown() -> bool:
    """Whether the process has come near its memory limit. Only Linux enforces the limit."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return False
    # Not getrusage: its peak includes the memory of the process that started this one
    peak = next((line for line in status.splitlines() if line.startswith("VmPeak:")), "VmPeak: 0 kB")
    return int(peak.split()[1]) * 1024 > MEMORY_LIMIT_BYTES // 2


if __name__ == "__main__":
    main()
