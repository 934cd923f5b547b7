"""The folder that goes to the Hub: model or adapter, tokenizer, card, results and report; no path of the machine in them."""

import contextlib
import html
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard, eval_result_entries_to_yaml, hf_hub_download
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_crisp.evaluation.loading import ModelSource, describe_weights
from trl_crisp.models.files import check_model_files
from trl_crisp.models.origin import cached_license, describe_origin
from trl_crisp.publish.card_folder import (
    ADAPTER_CONFIG,
    card_is_edited,
    measured_by,
    origin_of,
    record_card,
    write_card,
)
from trl_crisp.report.card import CARD_FILE
from trl_crisp.report.card_metadata import leaderboard_entry
from trl_crisp.report.card_results import CardResults, load_card_results
from trl_crisp.report.page import write_report
from trl_crisp.report.run_log import EmptyLogError, RunLog, load_run
from trl_crisp.run.files import write_json
from trl_crisp.run.training_record import RECORD_FILE, read_record

# Inside of the model's directory, so that files can be linked; uploads of the trainer skip names that begin with an underscore
FOLDER = "_push"
# What transformers, PEFT and tokenizers write of a model; nothing else is pushed, so no optimizer, no teacher and no file of the user's
_MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors.index.json", "pytorch_model*.bin.index.json"),
    *(
        "model.safetensors",
        "model-?????-of-?????.safetensors",
        "pytorch_model.bin",
        "pytorch_model-?????-of-?????.bin",
    ),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    *(
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "*.tiktoken",
        "tokenizer.model",
        "tokenizer.model.v?",
        "sentencepiece.model",
        "sentencepiece.bpe.model",
        "spiece.model",
        "spm.model",
        "processor_config.json",
        "preprocessor_config.json",
    ),
    *(f"{name}{suffix}" for name in ("LICENSE", "NOTICE", "USE_POLICY") for suffix in ("", ".md", ".txt")),
)
# Code of a tokenizer or a config, as transformers names it
_CODE_FILES = ("tokenization_*.py", "configuration_*.py", "processing_*.py", "modeling_*.py")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TEMPLATES = "additional_chat_templates"


def files_while_training(run_id: str | None, resumable: bool) -> list[str]:
    """
    Return the patterns of what a push during a training takes of output_dir: model, tokenizer and card.

    Args:
        run_id: The run that is trained.
        resumable: Whether a resume on another machine should be possible. It needs the base's answers, with the prompts.
    """
    model = [*_MODEL_FILES, *_CODE_FILES, f"{_TEMPLATES}/*", CARD_FILE, RECORD_FILE]
    base = ["agreement/reference.jsonl", f"agreement/*-{run_id}.*", "evaluation/*/step-0/*"]
    return [*model, *base] if resumable else model


@dataclass(frozen=True)
class PushFolder:
    """
    A folder that is ready to be pushed.

    Attributes:
        path: Where it is.
        files: Its files and their sizes in bytes, by their names in the repository.
        left_out: What else is in the model's directory.
        notes: What a reader of the repository would miss, in words.
    """

    path: Path
    files: dict[str, int]
    left_out: list[str]
    notes: list[str]

    def describe(self) -> str:
        """Return a line for each file, and what was left out."""
        width = max(map(len, self.files))
        lines = [f"  {name:<{width}}  {_size_in_words(size)}" for name, size in self.files.items()]
        more = [f"Not pushed: {', '.join(self.left_out)}."] if self.left_out else []
        return "\n".join([f"{self.path}:", *lines, *more, *self.notes])


def make_folder(
    directory: Path, repo: str, results: Sequence[Sequence[Path]] = (), keeps_card: bool = False
) -> PushFolder:
    """
    Write what is pushed of a model's directory into a folder in it.

    Args:
        directory: The output_dir of a training, a checkpoint of it, or the directory of a merged model.
        repo: The repository on the Hub, OWNER/NAME.
        results: For each benchmark its results of `trl-crisp eval`: the base first, the model's own among them. If there are none, what the
            training measured of this model.
        keeps_card: Push the directory's own README.md as it is.

    Raises:
        FileNotFoundError: If the directory has no model, or a result does not exist.
        ValueError: If files are torn, results cannot be compared, or are of another model.
    """
    is_adapter = _check_model(directory)
    record = read_record(directory)
    notes: list[str] = []
    run = _load_log(directory, notes)
    own_id = (record or {}).get("run_id")
    if run is not None and own_id is not None and run.run_id not in (None, own_id):
        notes.append(f"The log in {directory} is that of another run than the model's, so it is left out.")
        run = None
    measured = load_own_results(results, directory, record, run, repo)
    folder = directory / FOLDER
    if folder.is_symlink() or folder.is_file():
        raise ValueError(f"{folder} is not a directory, and push writes its folder there. Move it away.")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    _copy_model(directory, folder)
    base = {**origin_of(directory, record, is_adapter)}
    if base["hub_id"] and "license" not in base:
        base.update(_fetch_license(base["hub_id"], base["revision"]))
    if is_adapter:
        notes += _name_base_without_path(folder, base)
    if not (has_tokenizer := any((folder / name).is_file() for name in _TOKENIZER_FILES)):
        notes.append(
            f"Warning: {directory} has no tokenizer. Save it there: tokenizer.save_pretrained({str(directory)!r})."
        )
    found = _copy_results(measured or measured_by(run, (record or {}).get("step")), folder, run)
    links = {one.path: str(one.path.relative_to(folder)) for result in found for one in result.compared.all}
    reports = _write_reports(folder, found, run, directory, notes)
    _write_leaderboard_files(folder, found, repo, links, notes)
    if (is_edited := card_is_edited(directory)) or keeps_card:
        shutil.copyfile(directory / CARD_FILE, folder / CARD_FILE)
        if record is not None:
            record_card(folder, record)
        if is_edited:
            notes.append(_check_edited_card(directory))
    else:
        write_card(
            folder,
            repo=repo,
            record=record,
            is_adapter=is_adapter,
            is_chat=_is_chat(folder),
            has_tokenizer=has_tokenizer,
            run=run,
            results=found,
            result_links=links,
            reports=reports,
            base=base,
        )
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(_files_in(folder))}
    left_out = [
        path.name + ("/" if path.is_dir() else "")
        for path in sorted(directory.iterdir())
        if path != folder and not (folder / path.name).exists()
    ]
    return PushFolder(folder, files, left_out, notes)


def _check_edited_card(directory: Path) -> str:
    """Check that the Hub could read a card that was edited, and return a note on it."""
    path = directory / CARD_FILE
    try:
        ModelCard.load(path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} was edited, and the Hub could not read its metadata: {error}. Mend it, or remove it: push writes a new one."
        ) from error
    return f"{path} was edited, so it is pushed as it is. Remove it, and push writes a new one with the results."


def _check_model(directory: Path) -> bool:
    """Check that a directory has the files of a model or of an adapter, and return whether it is an adapter."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: there is no such directory (looked for {directory.absolute()}). Give the output_dir of a training."
        )
    names = {path.name for path in directory.iterdir()}
    if not has_model(directory):
        checkpoints = sorted(name for name in names if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"))
        hint = f" It has {', '.join(checkpoints[:3])}: one of these can be pushed." if checkpoints else ""
        raise FileNotFoundError(
            f"{directory} has no model (config.json and model*.safetensors) and no adapter (adapter_config.json and adapter_model.safetensors). A "
            f"run that was lost or stopped saves none.{hint}"
        )
    check_model_files(directory, str(directory))
    return ADAPTER_CONFIG in names


def has_model(directory: Path) -> bool:
    """Whether a directory has a model or an adapter: config and weights."""
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    is_adapter = ADAPTER_CONFIG in names
    weights = ("adapter_model.*",) if is_adapter else ("model*.safetensors", "pytorch_model*.bin")
    return (is_adapter or "config.json" in names) and any(fnmatch(name, one) for name in names for one in weights)


def _load_log(directory: Path, notes: list[str]) -> RunLog | None:
    try:
        return load_run(directory)
    except (FileNotFoundError, EmptyLogError):
        return None
    except ValueError as error:
        notes.append(f"Warning: the training's log is left out, because it cannot be read: {error}")
        return None


def _copy_model(directory: Path, folder: Path) -> None:
    """Link the model's files into the folder."""
    code = _code_files(directory)
    for path in sorted(directory.iterdir()):
        if path.name == _TEMPLATES:
            shutil.copytree(path, folder / _TEMPLATES)
        elif path.is_file() and (_is_model_file(path.name) or path in code):
            _link(path, folder / path.name)


def _is_model_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _MODEL_FILES)


def _code_files(directory: Path) -> set[Path]:
    """Return the Python files that the model's, the tokenizer's and the processor's config name, with those that they import."""
    found: set[Path] = set()
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = directory / name
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {}) if path.is_file() else {}
        for value in auto_map.values():
            for reference in value if isinstance(value, list) else [value]:
                # Code of another repository, "OWNER/NAME--module.Class", stays there
                if isinstance(reference, str) and "--" not in reference:
                    module = directory / f"{reference.split('.')[0]}.py"
                    if module.is_file():
                        found |= {module, *map(Path, get_relative_import_files(module))}
    return found


def _link(source: Path, target: Path) -> None:
    try:
        # Weights are large. The folder is on the same disk
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _fetch_license(hub_id: str, revision: str | None) -> dict[str, str]:
    """Return the licence in the base's card on the Hub; without a network, what the cache has."""
    with contextlib.suppress(OSError, ValueError):
        hf_hub_download(hub_id, "README.md", revision=revision)
    return cached_license(hub_id, revision)


def _name_base_without_path(folder: Path, base: dict[str, Any]) -> list[str]:
    """Write into the adapter's config where the base is for everyone, and return a note if nobody else has it."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    if base["hub_id"] is None or config.get("base_model_name_or_path") != base["hub_id"]:
        config["base_model_name_or_path"] = base["hub_id"] or base["name"]
        config["revision"] = base["revision"]
        # A link shares its file with the original
        path.unlink()
        write_json(path, config)
    if base["hub_id"] is not None:
        return []
    if base["source"] in ("memory", "unknown"):
        return [
            f"Warning: the adapter's base is {base['name']}, so others cannot load the adapter. Push a merged model instead: in Python, "
            "`model.merge_and_unload().save_pretrained(...)`."
        ]
    return [
        f"Warning: the adapter's base, {base['name']}, is not on the Hub, so others cannot load the adapter. `trl-crisp merge` makes one model of both."
    ]


def load_own_results(
    results: Sequence[Sequence[Path]],
    directory: Path,
    record: dict[str, Any] | None,
    run: RunLog | None,
    repo: str | None,
) -> list[CardResults]:
    """
    Read the results of a model.

    Args:
        results: As in [`make_folder`].
        directory: The model's directory.
        record, run: Of its training.
        repo: Its repository, if it has one.

    Raises:
        FileNotFoundError: If a result does not exist.
        ValueError: If results cannot be compared, or are of another model.
    """
    found = [load_card_results(paths, run) for paths in results]
    for one in found:
        _check_own(one, directory, record, repo)
    return found


def _check_own(result: CardResults, directory: Path, record: dict[str, Any] | None, repo: str | None) -> None:
    """Check that a result is of the weights in the directory."""
    protocol, record = result.protocol, record or {}
    if "step" in protocol:
        here, there = f"step {record.get('step')}", f"step {protocol['step']}"
        is_same = protocol["step"] == record.get("step")
    elif (digest := protocol.get("weights_sha256")) is not None:
        digests = [
            describe_weights(ModelSource(str(directory)))["weights_sha256"],
            (record.get("merged_from") or {}).get("weights_sha256"),
        ]
        here, there, is_same = f"weights_sha256 {digests[0]}", f"weights_sha256 {digest}", digest in digests
    else:
        here, there, is_same = str(repo), str(protocol.get("model")), protocol.get("model") == repo
    if not is_same:
        raise ValueError(
            f"{result.own.path} was measured on another model than the one in {directory}: {there} there, {here} here. Evaluate this model "
            "(`trl-crisp eval`), or push the one that was measured."
        )


def _copy_results(results: Sequence[CardResults], folder: Path, run: RunLog | None) -> list[CardResults]:
    """Copy results.json and, for the report, samples.jsonl of each result, without paths of the machine."""
    copied = []
    for result in results:
        name = result.benchmark
        while (folder / "results" / name).exists():
            name += "-again"
        paths = []
        for one, file_name in zip(result.compared.all, result.file_names, strict=True):
            target = folder / "results" / name / file_name
            target.mkdir(parents=True)
            paths.append(target)
            content = json.loads(one.path.read_text(encoding="utf-8"))
            write_json(target / "results.json", {**content, "protocol": _without_paths(content["protocol"])})
            samples = one.path.with_name("samples.jsonl")
            if one.path.name == "results.json" and samples.is_file():
                _copy_samples(samples, target / "samples.jsonl")
        copied.append(load_card_results(paths, run))
    return copied


def _copy_samples(source: Path, target: Path) -> None:
    with source.open("rb") as lines, target.open("wb") as file:
        first = json.loads(next(lines))
        first["protocol"] = _without_paths(first["protocol"])
        file.write(json.dumps(first).encode() + b"\n")
        shutil.copyfileobj(lines, file)


def _without_paths(protocol: dict[str, Any]) -> dict[str, Any]:
    """Return a protocol with names instead of paths."""
    cleaned = dict(protocol)
    for key in ("model", "trained_from"):
        if isinstance(value := cleaned.get(key), str):
            cleaned[key] = describe_origin(value)["name"]
    if isinstance(benchmark := cleaned.get("benchmark"), str):
        cleaned["benchmark"] = Path(benchmark).name
    if isinstance(base := cleaned.get("base_model"), dict):
        cleaned["base_model"] = {**base, "name": describe_origin(base.get("name"))["name"]}
    return cleaned


def _write_reports(
    folder: Path, results: Sequence[CardResults], run: RunLog | None, directory: Path, notes: list[str]
) -> list[str]:
    """Write a report of each benchmark, with the training, and return their names. The samples are taken out again."""
    runs = [] if run is None else [directory]
    inputs: dict[str, list[Path]] = {} if results or not runs else {"report.html": []}
    for result in results:
        # The directory of results/ has a name that no other benchmark has
        name = "report.html" if len(results) == 1 else f"report-{result.own.path.parent.parent.name}.html"
        inputs[name] = [one.path for one in result.compared.all]
    written: list[Path] = []
    try:
        for name, paths in inputs.items():
            written += write_report(paths, folder / name, runs)
    except ImportError as error:
        notes.append(f"There is no report: {error}")
    finally:
        for samples in (folder / "results").rglob("samples.jsonl"):
            samples.unlink()
    for path in written:
        text = path.read_text(encoding="utf-8")
        for place, name in _places(folder, run):
            for form in dict.fromkeys((place, html.escape(place), json.dumps(place)[1:-1])):
                text = text.replace(form, name)
        path.write_text(text, encoding="utf-8")
    return [path.name for path in written if path.suffix == ".html"]


def _places(folder: Path, run: RunLog | None) -> Iterator[tuple[str, str]]:
    """Yield paths of the machine that a report may show, and what replaces them; longer ones first."""
    for place in (folder.absolute(), folder):
        yield f"{place}/", ""
    if run is not None:
        yield str(run.directory.absolute()), run.name


def _write_leaderboard_files(
    folder: Path, results: Sequence[CardResults], repo: str, links: dict[Path, str], notes: list[str]
) -> None:
    for result in results:
        url = f"https://huggingface.co/{repo}/blob/main/{quote(links[result.own.path])}"
        entry = leaderboard_entry(result, url)
        if entry is None:
            notes.append(
                f"{result.benchmark}: no file in {EVAL_RESULTS_FOLDER}, because this is not the whole of a benchmark that is known to have a leaderboard on "
                "the Hub."
            )
            continue
        path = folder / EVAL_RESULTS_FOLDER / f"{result.benchmark}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")


def _is_chat(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _size_in_words(size_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
