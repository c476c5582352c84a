"""Models by name on a Hugging Face hub: only the files that are needed, downloaded once.

`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as in every program that uses the
hub's own client, and the cache is shared with them.
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import disable_progress_bars

from tune_app.models.weight_files import WEIGHT_FILES, weight_files
from tune_app.run.typed import ConfigError

_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")
_SMALL_FILES = (
    *("config.json", "generation_config.json", "chat_template*"),
    *_TOKENIZER_FILES,
    *("merges.txt", "special_tokens_map.json", "added_tokens.json"),
)


def fetched(name: str, revision: str | None) -> Path:
    """The folder of the hub's model `name` at a branch, tag or commit (None: its main branch).

    Files that are already here are used without asking the hub, so a branch that has moved is not
    noticed. Raises ConfigError if the hub has no such model, refuses access or does not answer.
    """
    try:
        return _cached(name, revision) or _download(name, revision)
    except ConfigError:
        raise
    except HFValidationError:
        raise ConfigError(
            f"--model: must be demo, a model's folder or a hub name (organisation/name), got "
            f"{name!r}."
        ) from None
    except GatedRepoError:
        raise ConfigError(
            f"--model: {name!r} is gated: accept its terms at {constants.ENDPOINT}/{name}, then "
            "log in with `hf auth login` or set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(
            f"--revision: {name!r} has no branch, tag or commit {revision!r}."
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"--model: there is no folder {name!r} here, and no such model at "
            f"{constants.ENDPOINT}; if it is private, log in with `hf auth login` or set HF_TOKEN."
        ) from None
    except Exception as error:  # the hub's client and its transport raise many unrelated types
        offline = constants.is_offline_mode() or isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else _reason(error)
        raise ConfigError(
            f"--model: there is no folder {name!r} here, and it cannot be downloaded from "
            f"{constants.ENDPOINT}: {why}"
        ) from error


def commit_of(name: str, revision: str | None) -> str:
    """The commit of a downloaded model; does not ask the hub."""
    return HfApi().resolve_revision(name, revision=revision, local_files_only=True).resolved


def _cached(name: str, revision: str | None) -> Path | None:
    """The model's folder if the cache has all that is needed, else None."""
    try:
        known = HfApi().resolve_revision(name, revision=revision, local_files_only=True)
        folder = Path(
            snapshot_download(name, revision=known, allow_patterns=[], local_files_only=True)
        )
        weight_files(folder)
    except (RevisionResolutionError, EntryNotFoundError, ValueError):
        return None
    files = [file.name for file in folder.iterdir()]
    return folder if "config.json" in files and _matching(files, _TOKENIZER_FILES) else None


def _download(name: str, revision: str | None) -> Path:
    known = HfApi().resolve_revision(name, revision=revision)
    # Subfolders are for other programs: onnx/, original/, gguf/.
    files = [file for file in HfApi().list_repo_files(name, revision=known) if "/" not in file]
    weights = next((file for file in WEIGHT_FILES if file in files), None)
    if weights is None:
        raise ConfigError(
            f"--model: {name!r} must have one of {', '.join(WEIGHT_FILES)}, which transformers "
            f"reads; got {', '.join(files[:8])}{' ...' if len(files) > 8 else ''}."
        )

    def fetch(names: list[str]) -> Path:
        return Path(snapshot_download(name, revision=known, allow_patterns=names))

    print(f"downloading {name} from {constants.ENDPOINT} ...", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        disable_progress_bars()
    small = _matching(files, _SMALL_FILES)
    if weights.endswith(".json"):
        folder = fetch([*small, weights])
        return fetch(sorted(set(json.loads((folder / weights).read_text())["weight_map"].values())))
    return fetch([*small, weights])


def _matching(files: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
