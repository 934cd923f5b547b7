"""Loads models and adapters: finds their files, checks that each weight comes from the files, and records which weights they are."""

import hashlib
import json
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_crisp.models.files import check_model_files
from trl_crisp.models.source import check_model, loading_errors_named
from trl_crisp.rows.hub import cached_commit

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Ours: a message names at most this many keys of each kind
_NAMED_KEYS = 5
# Wrappers put these before or into the names of the weights
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class ModelSource:
    """
    The source of a model's weights.

    Attributes:
        name: A Hub id or a directory.
        revision: The commit on the Hub; `None` for a directory.
        base: For an adapter, the model that it belongs to.
    """

    name: str
    revision: str | None = None
    base: "ModelSource | None" = None


def find_model(name: str, revision: str = "main", field_name: str = "model") -> ModelSource:
    """
    Find the weights of a model, or of an adapter and its base. No weights are loaded.

    Args:
        name: A Hub id or a directory.
        revision: The branch, tag or commit of a Hub id.
        field_name: The user's name for the model in error messages.

    Raises:
        ValueError: If files are torn, or an adapter names no base or a base that is an adapter.
        FileNotFoundError, PermissionError, ConnectionError: If the model or the adapter's base cannot be found or reached.
    """
    path = _adapter_config_of(name, revision)
    if path is None:
        check_model(name, revision, False, field_name)
        return ModelSource(name, cached_commit(name, revision))
    if Path(name).is_dir():
        check_model_files(Path(name), f"{field_name}={name!r}")
        if not any((Path(name) / file).is_file() for file in _ADAPTER_WEIGHTS):
            raise FileNotFoundError(
                f"{field_name}={name!r}: the directory has an {_ADAPTER_CONFIG} and no weights ({' or '.join(_ADAPTER_WEIGHTS)}). "
                "Give the directory that save_pretrained wrote."
            )
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{field_name}={name!r}: its {_ADAPTER_CONFIG} names no base_model_name_or_path. Write the base model's Hub id or "
            "directory there."
        )
    found = find_model(base, config.get("revision") or "main", f"the base of the adapter {name!r}")
    if found.base is not None:
        raise ValueError(
            f"{field_name}={name!r}: its base {base!r} is an adapter too. Merge that into its own base first, and name the result as "
            f"base_model_name_or_path in {_ADAPTER_CONFIG}."
        )
    return ModelSource(name, cached_commit(name, revision), found)


def _adapter_config_of(name: str, revision: str) -> Path | None:
    from transformers.utils import find_adapter_config_file

    if Path(name).is_dir():
        path = Path(name) / _ADAPTER_CONFIG
        return path if path.is_file() else None
    try:
        found = find_adapter_config_file(name, revision=revision)
    except (OSError, ValueError):
        # The check of the whole model reports the error
        return None
    return None if found is None else Path(found)


def describe_weights(source: ModelSource) -> dict[str, Any]:
    """
    Return which weights a model has.

    Returns:
        `model_revision`, the commit of a Hub model, or `weights_sha256`, the digest of a directory's weights and config; the other one
        is `None`. For an adapter also `base_model`, with the base's `name` and the same two.
    """
    about: dict[str, Any] = {
        "model_revision": source.revision,
        "weights_sha256": None if source.revision else _sha256_of(Path(source.name)),
    }
    if source.base is not None:
        about["base_model"] = {"name": source.base.name, **describe_weights(source.base)}
    return about


def _sha256_of(directory: Path) -> str | None:
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".safetensors", ".bin") or path.name in ("config.json", _ADAPTER_CONFIG):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def load_config(source: ModelSource) -> "PretrainedConfig":
    """Return a model's config; for an adapter that of its base."""
    from transformers import AutoConfig

    whole = source.base or source
    with loading_errors_named(whole.name, "its config"):
        return AutoConfig.from_pretrained(whole.name, revision=whole.revision)


def load_generation_config(source: ModelSource) -> "GenerationConfig":
    """Return a model's generation config. Without one it is made from the model's config, as transformers does."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source.name, revision=source.revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(load_config(source))


def load_tokenizer(source: ModelSource, needs_chat_template: bool = True) -> "PreTrainedTokenizerBase":
    """
    Return a model's tokenizer. If an adapter has none, return that of its base.

    Args:
        source: See [`find_model`].
        needs_chat_template: Whether the prompts are messages.

    Raises:
        ValueError: If it cannot be loaded, or has no chat template and needs one.
    """
    from transformers import AutoTokenizer

    owner = _tokenizer_owner(source)
    with loading_errors_named(owner.name, "its tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(owner.name, revision=owner.revision)
    if needs_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"model {source.name!r} has no chat template, so the prompts cannot be written as a user's messages. Use a model "
            "trained on conversations, or set tokenizer.chat_template and save the tokenizer beside the model."
        )
    return tokenizer


def _tokenizer_owner(source: ModelSource) -> ModelSource:
    if source.base is None:
        return source
    file = "tokenizer_config.json"
    if source.revision is None:
        return source if (Path(source.name) / file).is_file() else source.base
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(source.name, file, revision=source.revision)
    except EntryNotFoundError:
        return source.base
    return source


def load_model(source: ModelSource, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Any:
    """
    Load a model in the dtype of its files. An adapter is merged into its base.

    Args:
        source: See [`find_model`].
        tokenizer: The adapter's tokenizer. If it has added tokens, the base's embeddings grow.

    Raises:
        ValueError: If a weight is not in the files, has another shape, or has no place in the model (the message names the keys), or if
            the files cannot be loaded.
    """
    if source.base is None:
        return _load_whole(source)
    adapter = load_adapter(source, tokenizer)
    with loading_errors_named(source.name, "the adapter"):
        untie(adapter)
        return adapter.merge_and_unload()


def load_adapter(
    source: ModelSource, tokenizer: "PreTrainedTokenizerBase | None" = None, dtype: "torch.dtype | str" = "auto"
) -> Any:
    """
    Load an adapter on its base, unmerged.

    Args:
        source: See [`find_model`]; it has a base.
        tokenizer: As in [`load_model`].
        dtype: That of the base's weights; `"auto"` is that of its files.

    Raises:
        ValueError: See [`load_model`]; also if the adapter does not change weights, so that it cannot be merged.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    assert source.base is not None
    model = _load_whole(source.base, dtype=dtype)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and _tokenizer_owner(source) is source and len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
    key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    with loading_errors_named(source.name, "the adapter"):
        with warnings.catch_warnings():
            # An error is raised below instead
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapter = PeftModel.from_pretrained(model, source.name, revision=source.revision)
        if not hasattr(adapter.base_model, "merge_and_unload"):
            kind = getattr(adapter.peft_type, "value", adapter.peft_type)
            raise ValueError(f"{kind} does not change the base's weights, so it cannot be merged into them")
        # Load the weights again to get the keys, because PEFT ignores some of them silently
        weights = load_peft_weights(source.name, device="cpu", key_mapping=key_mapping, revision=source.revision)
        result: Any = set_peft_model_state_dict(adapter, weights)
        # The missing keys include the base's weights, and second names of tensors that were loaded
        state = {key: tensor.data_ptr() for key, tensor in adapter.state_dict().items()}
        own = {
            tensor.data_ptr() for tensor in get_peft_model_state_dict(adapter, save_embedding_layers=False).values()
        }
        own -= {state[key] for key in state.keys() - set(result.missing_keys)}
        missing = [key for key in result.missing_keys if state[key] in own]
        _check_keys(source, missing, result.unexpected_keys, [])
    return adapter


def untie(adapter: Any) -> None:
    """Give the head its own weights if the adapter changes only the embeddings: merging would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    embeddings, head = adapter.get_input_embeddings(), adapter.get_output_embeddings()
    alone = isinstance(embeddings, BaseTunerLayer) and not isinstance(head, BaseTunerLayer)
    if alone and head.weight is embeddings.get_base_layer().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        adapter.config.tie_word_embeddings = False


def check_weights(source: ModelSource) -> None:
    """
    Check a whole model's files as [`load_model`] does, without loading the weights.

    Raises:
        ValueError: See [`load_model`].
    """
    load_shapes(source)


def load_shapes(source: ModelSource) -> Any:
    """
    Load a whole model without its weights, on torch's meta device: names, shapes and the dtypes of the files.

    Raises:
        ValueError: See [`load_model`].
    """
    return _load_whole(source, device_map="meta")


def _load_whole(source: ModelSource, device_map: str | None = None, dtype: "torch.dtype | str" = "auto") -> Any:
    from transformers import AutoModelForCausalLM

    with loading_errors_named(source.name, "the model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name,
            revision=source.revision,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            # An error below names them
            ignore_mismatched_sizes=True,
        )
        model, info = loaded
        _check_keys(source, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model


def _check_keys(
    source: ModelSource, missing: Collection[str], unexpected: Collection[str], mismatched: Collection[Any]
) -> None:
    found = []
    if missing:
        found.append(f"not in the files: {_listed(missing)}")
    if unexpected:
        found.append(f"in the files, and without a place in the model: {_listed(unexpected)}")
    if mismatched:
        shapes = [
            f"{key} ({list(of_file)} in the files, {list(of_model)} here)" for key, of_file, of_model in mismatched
        ]
        found.append(f"of another shape: {_listed(shapes)}")
    if not found:
        return
    wrapper = next((name for name in _WRAPPERS for key in unexpected if f".{name}" in f".{key}"), None)
    hint = (
        "" if wrapper is None else f" The names have {wrapper!r} in them, as those of a wrapped model do: take it out."
    )
    what = "model" if source.base is None else f"adapter, on its base {source.base.name!r},"
    raise ValueError(
        f"{source.name!r}: the weights in the files are not those of the {what} that the config describes.\n  "
        + "\n  ".join(found)
        + f"\nWhat would be measured is another model.{hint} Save it again by save_pretrained."
    )


def _listed(keys: Collection[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return ", ".join(names[:_NAMED_KEYS]) + more
