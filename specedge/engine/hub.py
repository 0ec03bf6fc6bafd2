"""From the name of a model to its directory: a local one, or a snapshot of a Hugging Face repository.

Only safetensors, JSON and chat templates are fetched, never code or pickles. huggingface_hub's own variables apply (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT). Knows nothing of what is in the files.
"""

import os
import re
from pathlib import Path

from specedge.config import SpecedgeError, brief

PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
TWICE = ["consolidated*"]  # the same weights once more, under names that nothing here reads


class HubError(SpecedgeError):
    """A model that is neither here nor to be had."""


def locate(model: str | Path, revision: str | None = None) -> Path:
    """The directory of `model`: a path, or a hub id `owner/name`, at a `revision` (branch, tag or commit)."""
    path = Path(model)
    if os.path.isdir(path):  # not path.is_dir(), which raises where a directory above may not be entered
        return path
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(model)):
        raise HubError(f"{model} is no directory and no hub id such as owner/name: name a model directory in Hugging Face format")
    from huggingface_hub import snapshot_download  # half a second of imports that a local model does not need

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=PATTERNS, ignore_patterns=TWICE))
    except Exception as e:  # the library raises a dozen kinds, from OSError to its own
        raise HubError(f"{model} is no directory here and cannot be fetched from the hub: {brief(e) or type(e).__name__}") from None
