"""Models of the Hugging Face hub, named `hf:ORGANIZATION/NAME` or `hf:ORGANIZATION/NAME@REVISION`.

Files are kept in the hub's own cache (`HF_HOME`). With `HF_HUB_OFFLINE=1`, nothing is read but this cache.
"""

from pathlib import Path

from mhmoe_ray.checkpoint.huggingface.config import read_config
from mhmoe_ray.errors import CheckpointError

PREFIX = "hf:"
SETTINGS_FILES = ("*.json", "*.jinja")
WEIGHT_FILES = ("*.safetensors",)


def local_folder(source: str) -> Path:
    """Return the local folder of a model, after downloading it if `source` names a model of the Hugging Face hub.

    config.json is checked before the weights are downloaded.

    Raises:
        CheckpointError: the hub has no such model or cannot be reached, or this package does not compute the model.
    """
    if not source.startswith(PREFIX):
        return Path(source)
    folder = settings_folder(source)
    read_config(folder, None)
    return _download(source, (*SETTINGS_FILES, *WEIGHT_FILES))


def settings_folder(source: str) -> Path:
    """Download the settings and the tokenizer of a model of the Hugging Face hub, and return its local folder.

    Raises:
        CheckpointError: the hub has no such model or cannot be reached.
    """
    return _download(source, SETTINGS_FILES)


def pinned_source(source: str, folder: Path) -> str:
    """Return the name of a model of the Hugging Face hub with the revision that was downloaded.

    Args:
        source: hf:ORGANIZATION/NAME, perhaps with @REVISION.
        folder: the model's folder in the hub's cache, whose name is the revision.
    """
    return f"{source.partition('@')[0]}@{folder.name}"


def _download(source: str, patterns: tuple[str, ...]) -> Path:
    """Download the files of a model of the hub that match the patterns, and return its folder in the cache.

    Raises:
        CheckpointError: the hub has no such model, or cannot be reached.
    """
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
