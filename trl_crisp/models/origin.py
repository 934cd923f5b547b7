"""What a model that is trained comes from, as a reader elsewhere can know it: a Hub id or a name, its commit, its licence; no path."""

import re
from pathlib import Path
from typing import Any

# A directory of the Hub's cache tells which repository and commit it holds
_CACHE_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]?$")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENSE_KEYS = ("license", "license_name", "license_link")


def describe_origin(name: str | None, revision: str | None = None, model_type: str | None = None) -> dict[str, Any]:
    """
    Return where a model comes from.

    Args:
        name: As the model was loaded: a Hub id or a directory; empty for a model that was made in memory.
        revision: The commit of a Hub id, if it is known.
        model_type: Its kind, such as "qwen3", which names a model that was made in memory.

    Returns:
        `source` ("hub", "directory" or "memory"), `name`, `hub_id` and `revision` (`None` if there is none), and of the licence
        (`license`, `license_name`, `license_link`) what the model's own card says. Nothing is guessed.
    """
    if not name:
        return _origin(
            "memory", " ".join(["a", *([model_type] if model_type else []), "model that was made in memory"])
        )
    path = Path(name).expanduser()
    if snapshot := _CACHE_SNAPSHOT.search(str(path.absolute())):
        hub_id = snapshot["id"].replace("--", "/")
        return _origin("hub", hub_id, hub_id, snapshot["commit"], _license_in(path / "README.md", hub_id))
    if path.exists() or not _HUB_ID.fullmatch(name):
        return _origin("directory", path.absolute().name or "model", license_=_license_in(path / "README.md"))
    return _origin("hub", name, name, revision, cached_license(name, revision))


def cached_license(hub_id: str, revision: str | None = None) -> dict[str, str]:
    """Return what the card of a model on the Hub says of its licence, if the Hub's cache has the card. The Hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    for commit in dict.fromkeys((revision, None)):
        path = try_to_load_from_cache(hub_id, "README.md", revision=commit)
        if isinstance(path, str):
            return _license_in(Path(path), hub_id)
    return {}


def _origin(
    source: str,
    name: str,
    hub_id: str | None = None,
    revision: str | None = None,
    license_: dict[str, str] | None = None,
) -> dict[str, Any]:
    return {"source": source, "name": name, "hub_id": hub_id, "revision": revision, **(license_ or {})}


def _license_in(card: Path, hub_id: str | None = None) -> dict[str, str]:
    import yaml
    from huggingface_hub import metadata_load

    if not card.is_file():
        return {}
    try:
        metadata = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        # What cannot be read says nothing
        return {}
    found = {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str)}
    link = found.pop("license_link", None)
    if link is not None and (hub_id is not None or link.startswith("https://")):
        # A file in the base's repository
        is_url = link.startswith("https://")
        found["license_link"] = link if is_url else f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return found if "license" in found else {}
