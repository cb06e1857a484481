"""Models on the Hugging Face Hub: downloaded once, and every way to fail in one line."""

from pathlib import Path

from elf_rt.errors import CheckpointError


def download(repo: str, patterns: list[str] | None = None) -> Path:
    """The local snapshot of a Hub model: the files that match one of `patterns`, all of them by default.

    Raises:
        CheckpointError: the Hub is out of reach, or has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise CheckpointError(
            f"{repo} is no file or folder here, and the Hugging Face Hub cannot be reached: go online once, "
            "or copy the model here and give its path"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{repo} is no file or folder here, and the Hugging Face Hub gives no such model "
            "(check the name; a private or gated one needs `hf auth login`)"
        ) from error
