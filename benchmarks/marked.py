"""What a benchmark writes into a README: it stands between the marks `<!-- NAME -->` and `<!-- /NAME -->`."""


def is_marked(text: str, name: str) -> bool:
    """Whether a text has the marks of a name."""
    _before, opening, rest = text.partition(f"<!-- {name} -->")
    return bool(opening) and f"<!-- /{name} -->" in rest


def put_between_marks(text: str, name: str, content: str) -> str:
    """
    Return a text with new content between the marks of a name.

    Raises:
        ValueError: If the text has no such marks.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    if not is_marked(text, name):
        raise ValueError(f"the text has no {opening} with a {closing} behind it. Add them where the content belongs.")
    before, _, rest = text.partition(opening)
    return f"{before}{opening}\n{content.rstrip()}\n{closing}{rest.partition(closing)[2]}"
