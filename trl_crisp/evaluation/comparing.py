"""The process that compares answers with math-verify: a JSON pair a line in, an outcome a line out.

It is killed from outside when it takes too long, so it has no time limit of its own; it has one of memory.
"""

import ctypes
import json
import logging
import signal
import sys

# Ours: far more than any usual expression takes, and small enough that several processes do not fill a machine
MEMORY_LIMIT_BYTES = 4 * 2**30
# Linux's, from sys/prctl.h
_PR_SET_PDEATHSIG = 1


def compare(gold: str, text: str) -> str:
    """
    Compare a text with the gold answer, as the paper's grader does.

    Args:
        gold: The right answer, without a box.
        text: Where the answer is looked for: LaTeX, and plain expressions.

    Returns:
        "equal", "different", "unparseable" (nothing was found in the text), or "error".
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    try:
        expected = parse(f"\\boxed{{{gold}}}", extraction_config=(LatexExtractionConfig(),), parsing_timeout=None)
        found = parse(text, extraction_config=(ExprExtractionConfig(), LatexExtractionConfig()), parsing_timeout=None)
        if not expected:
            return "error"
        if not found:
            return "unparseable"
        return "equal" if verify(expected, found, timeout_seconds=None, raise_on_error=True) else "different"
    except (Exception, RecursionError, MemoryError):
        return "error"


def main() -> None:
    """Answer until the input ends, or the caller does."""
    if sys.platform == "linux":
        # The end of the input is read after a comparison, which may take hours; elsewhere it has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    except (ImportError, ValueError, OSError):
        # Windows has no such limit, and a lower one may be set
        pass
    logging.disable(logging.CRITICAL)
    # The first comparison imports what the others need
    compare("1", "\\boxed{1}")
    # The replies alone go where the caller reads
    replies, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        gold, text = json.loads(line)
        print(json.dumps(compare(gold, text)), file=replies, flush=True)


if __name__ == "__main__":
    main()
