"""What the templates of the page and of the card share: jinja2's environment, its filters, and text that is no markup."""

import html
import re
from typing import TYPE_CHECKING, Any

from trl_crisp.report import formats

if TYPE_CHECKING:
    from jinja2 import Environment

_LONGEST_NAME = 300


def make_environment(is_html: bool, **filters: Any) -> "Environment":
    """
    Return the environment of the package's templates.

    Args:
        is_html: Whether values are escaped for HTML. A Markdown file is no HTML, and its template escapes cells by a filter.
        filters: More filters than those for numbers, names and cells.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trl_crisp.report"),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=formats.percent,
        tokens=formats.tokens,
        points=formats.points,
        interval_in_points=formats.interval_in_points,
        interval_of_tokens=formats.interval_of_tokens,
        change_of_tokens=formats.change_of_tokens,
        short=short,
        cell=markdown_cell,
        **filters,
    )
    return environment


def short(text: Any) -> str:
    """Return a name as one line that is not too long. A sentence is never cut: its end may be what matters."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 1]}…"


def markdown_cell(text: Any) -> str:
    """Return a text as a cell of a Markdown table: one line, in which nothing is markup."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    line = re.sub(r"[\\`*|#]", r"\\\g<0>", line)
    # Inside of a word an underscore is no markup, and brackets alone are no link
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line).replace("](", "]\\(")
