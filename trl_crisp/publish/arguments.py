"""The arguments of `trl-crisp merge` and `trl-crisp push`."""

import argparse
from pathlib import Path


def make_merge_parser() -> argparse.ArgumentParser:
    """Return the parser of `trl-crisp merge`."""
    parser = argparse.ArgumentParser(
        prog="trl-crisp merge",
        description="Merge an adapter into its base: one model in the base's dtype, with tokenizer and generation config. It is merged in "
        "float32, which takes 4 bytes of memory for each weight, and its logits are compared with those of the adapter.",
        epilog="example:\n  trl-crisp merge qwen3-8b-crisp --output qwen3-8b-crisp-merged",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of an adapter")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="directory to write; it has to be new or empty"
    )
    return parser
