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


def make_push_parser() -> argparse.ArgumentParser:
    """Return the parser of `trl-crisp push`."""
    parser = argparse.ArgumentParser(
        prog="trl-crisp push",
        description="Push a trained model or adapter to the Hub: with its tokenizer, a card that says how it was trained and measured, the results "
        "and the report. The optimizer, the teacher and files of your own are not pushed.",
        epilog="example:\n  trl-crisp push qwen3-8b-crisp --repo me/qwen3-8b-crisp --results base concise after --dry-run\n"
        "  trl-crisp push qwen3-8b-crisp --repo me/qwen3-8b-crisp --results base after --results base-aime after-aime\n\n"
        "--dry-run needs no login. To push, log in with `hf auth login` or set HF_TOKEN.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("directory", metavar="DIR", type=Path, help="output_dir of a training, a checkpoint of it, or a merged model")
    add(
        "--repo",
        metavar="OWNER/NAME",
        required=True,
        help="the repository on the Hub; it is made if it does not exist",
    )
    add(
        "--results",
        metavar="RESULT",
        type=Path,
        nargs="+",
        action="append",
        default=[],
        help="--output directories of `trl-crisp eval` on one benchmark, the base first; may be given again for another benchmark. By default what "
        "the training itself measured",
    )
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", metavar="BRANCH", help="push to this branch instead of main")
    add("--dry-run", "--dry_run", action="store_true", help="write the folder that would be pushed, list it, and stop")
    return parser
