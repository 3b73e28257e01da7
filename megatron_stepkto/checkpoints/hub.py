"""A model of the Hugging Face hub as a local folder: the one place that downloads weights, and only where asked to."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_stepkto.base.errors import MachineFault, UserError
from megatron_stepkto.base.progress import say

HUB = "hub:"
# No code, which nothing here would run, and no other formats, which are copies of the same weights.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_NAME = re.compile(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
SHORT = 12  # characters of a commit in a folder's name


def fetch_model(source: str, below: Path) -> tuple[Path, str]:
    """Download ``hub:NAME[@REVISION]`` into a folder below ``below`` that is named after model and commit.

    A branch or a tag is resolved to its commit first, so that the recipe names what was downloaded. Files that are
    there already are not downloaded again: after an interruption the same call resumes.

    Returns:
        The folder, and ``hub:NAME@COMMIT`` with the whole commit.

    Raises:
        UserError: the name is none, or the hub has no such model or revision, or wants a token.
        MachineFault: the hub does not answer.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    match = _NAME.fullmatch(source.removeprefix(HUB))
    if match is None:
        raise UserError(f"{source}: expected hub:NAME or hub:NAME@REVISION, such as hub:Qwen/Qwen2.5-Math-7B-Instruct")
    repository, revision = match["repository"], match["revision"]
    try:
        commit = HfApi().model_info(repository, revision=revision).sha
        folder = below / f"{repository.split('/')[-1]}@{str(commit)[:SHORT]}"
        say(f"{source}: commit {commit}, to {folder}")
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=FILES)
    except (HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source}: the hub refuses ({reason}); correct the name, or log in with `hf auth login`"
        ) from None
    except Exception as error:  # its HTTP library's own for no route or no such host; OSError for a full disk
        raise MachineFault(f"{source}: cannot be downloaded: {' '.join(str(error).split())[:200]}") from None
    return folder, f"{HUB}{repository}@{commit}"
