"""Finds the row of a text file that cannot be read, and the reason. The readers of `datasets` do not report these."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Python reads a byte that is not UTF-8 as a lone surrogate, whose lowest byte is the byte in the file
_ENCODING = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
_FOREIGN_BYTE = re.compile("[\udc80-\udcff]")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}


def is_utf8(path: Path) -> bool:
    """Return whether a whole file is UTF-8."""
    try:
        with path.open(encoding="utf-8") as file:
            while file.read(1 << 22):
                pass
    except UnicodeDecodeError:
        return False
    return True


def find_unreadable_row(path: Path) -> str | None:
    """
    Return the first row of a .jsonl, .json or .csv file that cannot be read, with its column and the reason.

    Rows are counted from 0, without blank lines. `None` if no such row is found; then only the reader's own message is known.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    kinds: dict[str, str] = {}
    changed = None
    number = -1
    try:
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                return (
                    f"row {number} is {_kind(row)} ({json.dumps(row)[:80]}), and a row is an object with named columns"
                )
            for column, value in row.items():
                if problem := _bad_text(column) or _bad_text(value):
                    return f"row {number}, column {str(column)[:80]!a}: {problem}"
                if value is None:
                    continue
                if changed is None and kinds.setdefault(column, _kind(value)) != _kind(value):
                    changed = f"row {number}, column {column!r}: {_kind(value)}, where the rows before it have {kinds[column]}"
    except (ValueError, csv.Error) as error:
        return f"row {number + 1} is torn or malformed: {error}"
    return changed


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open(**_ENCODING, newline="\n") as file:  # type: ignore[call-overload]
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        if start == "[":
            yield from _array_elements("[" + file.read())
            return
        file.seek(0)
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(_bad_text(line) or error) from error
            yield row


def _array_elements(text: str) -> Iterator[Any]:
    decoder, place = json.JSONDecoder(), 1
    blank = re.compile(r"\s*")
    while True:
        place = blank.match(text, place).end()  # type: ignore[union-attr]
        if text[place : place + 1] == "]":
            return
        element, place = decoder.raw_decode(text, place)
        yield element
        place = blank.match(text, place).end()  # type: ignore[union-attr]
        if text[place : place + 1] == ",":
            place += 1
        elif text[place : place + 1] != "]":
            raise ValueError(f"no comma or ] after it (character {place})")


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(**_ENCODING, newline="") as file:  # type: ignore[call-overload]
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) > len(header):
                raise ValueError(f"{len(cells)} cells under {len(header)} columns (line {reader.line_num})")
            yield dict(zip(header, cells, strict=False))


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS[type(value)]


def _bad_text(value: Any) -> str | None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if found := _FOREIGN_BYTE.search(text):
        around = text[max(0, found.start() - 20) : found.end() + 20].encode("utf-8", "surrogateescape")
        return f"the byte 0x{ord(found[0]) - 0xDC00:02x} in {around!r} is not UTF-8. Save the file as UTF-8"
    if found := _HALF_PAIR.search(text):
        return f"half a surrogate pair ({found[0]!a}), which no text can hold"
    return None
