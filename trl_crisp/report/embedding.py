"""What a page embeds: texts that take at most so many bytes of it, and JSON that is inert."""

import bisect
import html
import json
import math
from collections.abc import Mapping
from typing import Any

# Of a text that is too long the end is shown too, because it has the answer
_HEAD_SHARE = 2 / 3


def clip(text: str, most_bytes: int) -> str:
    """Return a text that takes at most about `most_bytes` in a page; of a longer one the start and the end, with a note between."""
    if _embedded_bytes(text) <= most_bytes:
        return text
    most_of_head = int(most_bytes * _HEAD_SHARE)
    head = _fitting(text[:most_of_head], most_of_head)
    # The end is the start of the text read backwards
    most_of_tail = most_bytes - most_of_head
    tail = _fitting(text[: -most_of_tail - 1 : -1], most_of_tail)[::-1]
    left_out = len(text) - len(head) - len(tail)
    return f"{head}\n\n[… {left_out:,} of {len(text):,} characters are left out; samples.jsonl has them …]\n\n{tail}"


def _fitting(text: str, most_bytes: int) -> str:
    """Return the longest start of a text that takes at most `most_bytes` in a page."""
    sizes = range(len(text) + 1)
    return text[: bisect.bisect_right(sizes, most_bytes, key=lambda size: _embedded_bytes(text[:size])) - 1]


def _embedded_bytes(text: str) -> int:
    return len(html.escape(text).encode("utf-8", "replace"))


def embed(value: Any) -> str:
    """Return a value as JSON that is inert inside a `<script>` element: ASCII, without `<`, `>` and `&`. NaN becomes null."""
    text = json.dumps(_without_nonfinite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return value
