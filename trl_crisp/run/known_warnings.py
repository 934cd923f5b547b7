"""Library warnings that a user cannot act on: silenced by name, each with its reason."""

import warnings

# Message (a regular expression), category
_KNOWN = [
    # TRL 1.16 uses transformers' old names for what v6 calls activation checkpointing. Remove this when TRL uses the new names
    (r"`(is_)?gradient_checkpointing\w*` is deprecated and will be removed in v6", FutureWarning),
    # The evaluation passes the cache by the name that transformers 5.17 knows; goes when 5.17 is no longer admitted
    (r"`past_key_values` is deprecated and will be removed in version", FutureWarning),
]


def silence_known_warnings() -> None:
    """Silence the known warnings in this process. Only programs call this; importing the library does not."""
    for message, category in _KNOWN:
        warnings.filterwarnings("ignore", message=message, category=category)
