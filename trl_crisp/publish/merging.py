"""Merges an adapter into its base: one model in the base's dtype, checked by its logits."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trl_crisp.evaluation.loading import (
    ModelSource,
    describe_weights,
    find_model,
    load_adapter,
    load_generation_config,
    load_shapes,
    load_tokenizer,
    untie,
)
from trl_crisp.models.origin import describe_origin
from trl_crisp.models.source import loading_errors_named
from trl_crisp.run.saving import check_can_be_saved
from trl_crisp.run.training_record import read_record, write_record

# The tokens of the check: rows and columns. Ours: enough that every layer's attention sees a context, and cheap
_PROBE_SHAPE = (2, 32)
# How far the logits may move in float32, relative to their norm. Ours: a hundred times the rounding that was seen (1e-6)
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Merged:
    """
    A merged model on disk. Distances of logits are norms of the difference relative to the norm of the adapter's logits.

    Attributes:
        directory: Where it is.
        dtype: The dtype of its weights: the base's.
        merging_distance: Between the adapter on its base and the merged model, both in float32.
        rounding_distance: Between the adapter on its base, in float32, and the saved model.
        adapter_distance: Between the adapter on its base and the base alone.
    """

    directory: Path
    dtype: torch.dtype
    merging_distance: float
    rounding_distance: float
    adapter_distance: float

    @property
    def is_lost_in_rounding(self) -> bool:
        """Whether rounding to the base's dtype moves the logits by more than half of what the adapter does."""
        return self.rounding_distance > 0.5 * self.adapter_distance


def merge_adapter(adapter: str, output: Path) -> Merged:
    """
    Merge an adapter into its base in float32, and save the result in the base's dtype, with the tokenizer and the generation config.

    Args:
        adapter: A Hub id or a directory of an adapter.
        output: The directory to write, which is absent or empty.

    Raises:
        ValueError: If it is no adapter, cannot be merged or loaded, the directory has files, or the merged model's logits are not the
            adapter's.
        FileNotFoundError, PermissionError, ConnectionError: If the adapter or its base cannot be found or reached.
    """
    _check_output(output)
    source = find_model(adapter, field_name="adapter")
    if source.base is None:
        raise ValueError(
            f"adapter={adapter!r} is a whole model, so there is nothing to merge: use it as it is. An adapter has an adapter_config.json."
        )
    dtypes, dtype = _dtypes_of(source.base)
    tokenizer = load_tokenizer(source, needs_chat_template=False)
    model = load_adapter(source, tokenizer, torch.float32).eval()
    probe_BT = _probe(model.config.get_text_config().vocab_size)
    before_BTV = _logits(model, probe_BT)
    with model.disable_adapter():
        base_BTV = _logits(model, probe_BT)
    with loading_errors_named(adapter, "the adapter", "adapter"):
        untie(model)
        model = model.merge_and_unload(safe_merge=True)
    merging = _distance(before_BTV, _logits(model, probe_BT))
    if not merging <= _TOLERANCE:
        raise ValueError(
            f"adapter={adapter!r}: the merged model's logits differ from those of the adapter on its base by {merging:.2g} of their norm, and "
            f"rounding explains at most {_TOLERANCE:g}. Nothing was written. Use the adapter unmerged, and report this with its "
            "adapter_config.json."
        )
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, dtype))
    model.config.dtype = dtype
    model.generation_config = load_generation_config(source.base)
    check_can_be_saved(model, tokenizer)
    is_new = not output.exists()
    place = output.absolute().parent if is_new else output
    place.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".merging-", dir=place))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _record_merge(source, partial)
        rounding = _distance(before_BTV, _logits_of_saved(model, partial, probe_BT))
        if is_new:
            partial.replace(output)
        else:
            # An empty directory may be a mount or the shell's own, so it stays. The config comes last: without it there is no model
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(output / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(output, dtype, merging, rounding, _distance(before_BTV, base_BTV))


def describe_merge(merged: Merged, adapter: str) -> str:
    """Return what was written and how it was checked."""
    dtype = str(merged.dtype).removeprefix("torch.")
    lines = [
        f"Merged {adapter} into its base: {merged.directory}, in {dtype}.",
        f"Checked by logits: merging in float32 changed them by {merged.merging_distance:.1e} of their norm, and with rounding to {dtype} by "
        f"{merged.rounding_distance:.1e}. The adapter itself changes the base's by {merged.adapter_distance:.1e}.",
    ]
    if merged.is_lost_in_rounding:
        lines.append(
            f"Warning: the adapter changes so little that rounding to {dtype} blurs it. Use the adapter unmerged, or measure the merged model "
            "with `trl-crisp eval`."
        )
    return "\n".join(lines)


def _check_output(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"--output {output}: the directory has files, and a merge never writes over a model. Give a new directory."
        )
    if output.is_symlink() and not output.exists():
        raise ValueError(f"--output {output} is a link to nothing. Give a new directory.")
    existing = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"--output {output}: {existing} is a file. Give a new directory.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--output {output}: {existing} cannot be written to. Give another directory.")


def _dtypes_of(base: ModelSource) -> tuple[Mapping[str, torch.dtype], torch.dtype]:
    """Return the dtype of each of the base's parameters, and that of the whole."""
    shapes = load_shapes(base)
    return {name: parameter.dtype for name, parameter in shapes.named_parameters()}, shapes.dtype


def _probe(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any, probe_BT: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=probe_BT).logits
    return logits.float()


def _logits_of_saved(model: Any, directory: Path, probe_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits of the model in the files, after checking that its weights are those of the model in memory."""
    saved: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    written = saved.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in written or written[name].dtype != tensor.dtype or not torch.equal(written[name], tensor):
            raise ValueError(
                f"the merged model does not come back from its files: {name} differs. Nothing was written. Use the adapter unmerged, and "
                "report this with the base's config.json."
            )
    # In float32, so that the distance is that of the rounded weights alone
    return _logits(saved.float().eval(), probe_BT)


def _distance(before_BTV: torch.Tensor, after_BTV: torch.Tensor) -> float:
    # An adapter with new tokens has more of them than its base
    width = min(before_BTV.shape[-1], after_BTV.shape[-1])
    difference = before_BTV[..., :width] - after_BTV[..., :width]
    return float(difference.norm() / before_BTV.norm())


def _record_merge(source: ModelSource, directory: Path) -> None:
    """Keep what the adapter's directory says of its training, and which adapter and which base the model is made of."""
    assert source.base is not None
    record = read_record(source.name) or {"base": describe_origin(source.base.name, source.base.revision)}
    about = describe_weights(source)
    # The digest is that of the adapter's card
    kept = {key: value for key, value in record.items() if key != "card_sha256"}
    write_record(directory, {**kept, "merged_from": {key: about[key] for key in ("model_revision", "weights_sha256")}})
