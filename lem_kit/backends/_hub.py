"""Where a model's files come from: a folder, or the Hugging Face Hub and its local cache.

The one idea: whether the Hub can be reached is found out once and soon, and not by every file's own six attempts.
Not covered: loading (the backend), models that lem_kit builds (`models`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import huggingface_hub

KEYWORDS = (
    "cache_dir", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip


def keywords(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that say where a model is read from; offline when the Hub does not answer."""
    hub = {name: given[name] for name in KEYWORDS if name in given}
    if not os.path.isdir(path) and "local_files_only" not in hub and not _hub_answers():
        hub["local_files_only"] = True
    return hub


def _hub_answers() -> bool:
    """One attempt by the Hub's own client, which would make six, and wait 23 seconds, for each file that is not cached."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # its class depends on the client's release
        return False
    return True


def commit(path: str, hub: dict[str, Any]) -> str | None:
    """The commit of a Hub model, from the place of its file in the local Hub cache."""
    if os.path.isdir(path):
        return None
    file = os.path.join(hub.get("subfolder") or "", hub.get("gguf_file") or "config.json").replace(os.sep, "/")
    cached = huggingface_hub.try_to_load_from_cache(path, file, hub.get("cache_dir"), hub.get("revision"))
    found = re.search(r"snapshots/([0-9a-f]{40})/", str(cached).replace(os.sep, "/"))
    return found[1] if found else None
