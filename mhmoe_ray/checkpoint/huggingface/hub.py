"""Models of the Hugging Face hub, named `hf:ORGANIZATION/NAME` or `hf:ORGANIZATION/NAME@REVISION`.

Files are kept in the hub's own cache (`HF_HOME`). With `HF_HUB_OFFLINE=1`, nothing is read but this cache.
"""

from pathlib import Path

from mhmoe_ray.checkpoint.huggingface.config import is_adapter_folder, read_config
from mhmoe_ray.errors import CheckpointError

PREFIX = "hf:"
SETTINGS_FILES = ("*.json", "*.jinja")
WEIGHT_FILES = ("*.safetensors",)


def local_folder(source: str) -> Path:
    """Return the local folder of a model, after downloading a model of the hub.

    config.json is checked before the weights are downloaded. A model that the hub lacks or this package does not
    compute, or an unreachable hub, is a CheckpointError.
    """
    if not source.startswith(PREFIX):
        return Path(source)
    folder = settings_folder(source)
    if not is_adapter_folder(folder):
        read_config(folder, None)
    return _download(source, (*SETTINGS_FILES, *WEIGHT_FILES))


def settings_folder(source: str) -> Path:
    """Download the settings and the tokenizer of a model of the hub, and return its local folder.

    A model that the hub lacks, or an unreachable hub, is a CheckpointError.
    """
    return _download(source, SETTINGS_FILES)


def pinned_source(source: str, folder: Path) -> str:
    """Return a model's name with the downloaded revision, which is the name of its folder in the hub's cache."""
    return f"{source.partition('@')[0]}@{folder.name}"


def _download(source: str, patterns: tuple[str, ...]) -> Path:
    # Importing the package takes a third of a second, so it is imported only for models of the hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except HFValidationError as e:
        raise CheckpointError(source, "it is no name of a model of the hub", "write hf:ORGANIZATION/NAME") from e
    except GatedRepoError as e:
        raise CheckpointError(
            source, "the hub asks for its licence to be accepted", "accept it and set HF_TOKEN"
        ) from e
    except (RepositoryNotFoundError, RevisionNotFoundError) as e:
        reason = "the hub has no such model or revision, or it is private"
        raise CheckpointError(source, reason, "correct the name, or set HF_TOKEN") from e
    # The hub's client raises errors of several libraries without a common class when there is no network.
    except (LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as e:
        reason = f"the hub cannot be reached, and its cache has no such model ({type(e).__name__})"
        raise CheckpointError(source, reason, "check the network and HF_HUB_OFFLINE, or name a local folder") from e
