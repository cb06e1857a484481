"""Models on the Hugging Face Hub: downloaded once, and every way to fail in one line."""

from pathlib import Path
from typing import Any

from elf_rt.errors import CheckpointError

ANSWER_SECONDS = 5  # the download itself would wait for minutes


def download(repo: str, patterns: list[str] | None = None) -> Path:
    """The local snapshot of a Hub model: the files that match one of `patterns`, all of them by default.

    Raises:
        CheckpointError: the Hub is out of reach and the model is not here yet, or it has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        offline: dict[str, Any] = {} if answers(repo) else {"local_files_only": True}
        return Path(snapshot_download(repo, allow_patterns=patterns, **offline))
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise CheckpointError(
            f"{repo} is no file or folder here, and the Hugging Face Hub cannot be reached: go online once (if the "
            "network has a login page, log in), or copy the model here and give its path"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{repo} is no file or folder here, and the Hugging Face Hub gives no such model "
            "(check the name; a private or gated one needs `hf auth login`)"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{repo} cannot be downloaded: {error.strerror or error}") from error


def answers(repo: str) -> bool:
    """Whether the Hub can be asked for a model. Raises the Hub's own errors where it has no such model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().repo_info(repo, timeout=ANSWER_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # the transport may raise anything: no network, silence, a login page
        return False
    return True
