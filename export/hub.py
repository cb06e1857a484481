"""Models on the Hugging Face Hub: downloaded once, and every way to fail in one line."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elf_rt.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

ANSWER_SECONDS = 5  # the download itself would wait for minutes


def download(repo: str, patterns: list[str] | None = None) -> Path:
    """The local snapshot of a Hub model: the files that match one of `patterns`, all of them by default.

    Raises:
        CheckpointError: the Hub is out of reach and the model is not here yet, or it has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.logging import set_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    set_verbosity(logging.CRITICAL)  # what goes wrong is told once, here
    try:
        offline: dict[str, Any] = {} if answers(repo) else {"local_files_only": True}
        return Path(snapshot_download(repo, allow_patterns=patterns, **offline))
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise CheckpointError(
            f"{repo} is no file or folder here, and the Hugging Face Hub cannot be reached or is busy: go online once "
            "(if the network has a login page, log in), or copy the model here and give its path"
        ) from error
    except Exception as error:  # the transport may raise anything, and so may an odd answer
        if isinstance(error, HFValidationError) or (isinstance(error, HfHubHTTPError) and _is_refusal(error)):
            reason = "gives no such model (check the name; a private or gated one needs `hf auth login`)"
            raise CheckpointError(f"{repo} is no file or folder here, and the Hugging Face Hub {reason}") from error
        raise CheckpointError(
            f"{repo} cannot be downloaded ({first_line(error)}): try again, or copy the model here and give its path"
        ) from error


def answers(repo: str) -> bool:
    """Whether the Hub can be asked for a model and its first file. Raises the Hub's own errors where it has no such
    model."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        for file in (HfApi().model_info(repo, timeout=ANSWER_SECONDS).siblings or ())[:1]:
            get_hf_file_metadata(hf_hub_url(repo, file.rfilename), timeout=ANSWER_SECONDS)
    except HFValidationError:
        raise
    except HfHubHTTPError as error:
        if _is_refusal(error):
            raise
        return False
    except Exception:  # the transport may raise anything: no network, silence, a login page
        return False
    return True


def _is_refusal(error: "HfHubHTTPError") -> bool:
    """Rather than that it is busy (429) or broken (500 and above)."""
    return error.response.status_code in (401, 403, 404)
