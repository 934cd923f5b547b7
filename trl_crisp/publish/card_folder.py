"""Writes a model card into a directory, with its figure and its record, from what is on disk beside it."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_crisp.models.origin import describe_origin
from trl_crisp.report.card import CARD_FILE, CardFacts, log_is_drawable, make_card
from trl_crisp.report.card_results import CardResults, load_card_results
from trl_crisp.report.figures import completion_length_figure
from trl_crisp.report.run_log import RunLog
from trl_crisp.run.training_record import RECORD_FILE, read_record, write_record

FIGURE_FILE = "rollout_length.png"
ADAPTER_CONFIG = "adapter_config.json"


def write_card(
    directory: Path,
    *,
    repo: str | None,
    record: dict[str, Any] | None,
    is_adapter: bool,
    is_chat: bool,
    name: str | None = None,
    run: RunLog | None = None,
    results: Sequence[CardResults] | None = None,
    result_links: Mapping[Path, str] | None = None,
    has_tokenizer: bool = True,
    reports: Sequence[str] = (),
    base: dict[str, Any] | None = None,
) -> None:
    """
    Write directory/README.md, its record if there is one and, if there is a log and matplotlib is installed, its figure.

    Args:
        directory: The model's directory.
        repo: Its Hub id, if it has one.
        record, is_adapter, is_chat, run, result_links, has_tokenizer, reports: See [`~trl_crisp.report.card.CardFacts`].
        name: The model's name; if `None`, that of the repository or of the directory.
        results: The measurements of the model. If `None`, those that the run made of it.
        base: What it was trained from; if `None`, as the record says.
    """
    name = name or (repo or directory.absolute().name).split("/")[-1]
    if results is None:
        results = measured_by(run, (record or {}).get("step"))
    # That of an adapter which was trained elsewhere, and merged here, has the base alone
    trained = record if record is not None and "fields" in record else None
    facts = CardFacts(
        name=name,
        repo=repo or name,
        base=base or origin_of(directory, record, is_adapter),
        is_adapter=is_adapter,
        is_chat=is_chat,
        record=trained,
        results=results,
        run=run,
        figure=_draw(run, directory),
        result_links=result_links or {},
        has_tokenizer=has_tokenizer,
        reports=reports,
    )
    (directory / CARD_FILE).write_text(str(make_card(facts)), encoding="utf-8")
    if record is not None:
        record_card(directory, record)


def record_card(directory: Path, record: dict[str, Any]) -> None:
    """Write a training's record beside the card that was made from it, with the card's digest."""
    content = {key: value for key, value in record.items() if not key.startswith("schema")}
    write_record(directory, {**content, "card_sha256": _digest_of_card(directory)})


def card_is_edited(directory: Path) -> bool:
    """Whether a directory has a card that was changed after it had been written."""
    # A checkpoint of an adapter has a card of PEFT's, and its record is in the run's directory
    if not all((directory / name).is_file() for name in (CARD_FILE, RECORD_FILE)):
        return False
    written = (read_record(directory) or {}).get("card_sha256")
    return written is not None and written != _digest_of_card(directory)


def _digest_of_card(directory: Path) -> str:
    return hashlib.sha256((directory / CARD_FILE).read_bytes()).hexdigest()


def measured_by(run: RunLog | None, step: int | None) -> list[CardResults]:
    """Return what a run measured on benchmarks at a step, against its base."""
    if run is None or not step:
        return []
    found = []
    for name in run.measured_names:
        directory = run.directory / "evaluation" / name.removeprefix("eval_")
        paths = [directory / f"step-{number}" for number in (0, step)]
        if all((path / "results.json").is_file() for path in paths):
            found.append(load_card_results(paths, run))
    return found


def origin_of(directory: Path, record: dict[str, Any] | None, is_adapter: bool) -> dict[str, Any]:
    """Return what a model was trained from: as its record says or, for an adapter, its config; else unknown."""
    if record is not None and "base" in record:
        base: dict[str, Any] = record["base"]
        return base
    if is_adapter:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if config.get("base_model_name_or_path"):
            return describe_origin(config["base_model_name_or_path"], config.get("revision"))
    return {"source": "unknown", "name": "unknown", "hub_id": None, "revision": None}


def _draw(run: RunLog | None, directory: Path) -> str | None:
    if run is None or not log_is_drawable(run):
        return None
    try:
        completion_length_figure(run.log_history, directory / FIGURE_FILE)
    except ImportError as error:
        warnings.warn(
            f'the model card gets no figure, because {error.name} is not installed: pip install "trl-crisp[report]".',
            stacklevel=2,
        )
        return None
    return FIGURE_FILE
