"""Uploads a folder to the Hugging Face hub, and checks that what arrived is what was sent.

Environment: ``HF_TOKEN`` (or the token that ``hf auth login`` stored) and ``HF_ENDPOINT``.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kubetuner.artifacts import FileEntry
from kubetuner.errors import PublishError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0
_PASSING = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""
_ADVICE = {
    401: "the token is missing, wrong or expired: create one with write access at huggingface.co/settings/tokens and "
    "set HF_TOKEN",
    403: "the token may not write there: give it write access to the namespace, or change hub_model_id",
    404: "the repository does not exist or the token may not see it: check hub_model_id and the token's access",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Upload:
    """A finished upload."""

    url: str
    commit: str


def require_token() -> str:
    """The hub token.

    Raises:
        PublishError: There is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise PublishError(
            "push_to_hub is set and there is no Hugging Face token: create one with write access at "
            "huggingface.co/settings/tokens and set HF_TOKEN, or set push_to_hub to false"
        )
    return token


def upload_folder(folder: Path, files: Sequence[FileEntry], name: str, *, private: bool, message: str) -> Upload:
    """Upload ``folder`` as one commit on ``main``, and compare checksums of every file with the hub's.

    Args:
        folder: What to upload.
        files: Its files.
        name: ``namespace/name``, or ``name`` in the namespace of the token's user.
        private: Visibility of the repository when it is created. An existing public one is refused.
        message: The commit's title.

    Raises:
        PublishError: No token, no access, the hub kept failing, or a file differs there.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=require_token())
    repo = name if "/" in name else f"{_retrying('asking whose token it is', api.whoami)['name']}/{name}"
    _retrying(f"creating {repo}", lambda: api.create_repo(repo, private=private, exist_ok=True))
    existing = _retrying(f"looking at {repo}", lambda: api.model_info(repo))
    if private and not existing.private:
        raise PublishError(
            f"{repo} exists and is public, and model_card_private is true: make it private, choose another "
            "hub_model_id, or set model_card_private to false"
        )
    commit = _retrying(
        f"uploading to {repo}",
        lambda: api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message),
    )
    _verify(api, repo, commit.oid, folder, files)
    logger.info("published %d file(s) as %s", len(files), commit.commit_url)
    return Upload(url=str(commit.commit_url), commit=str(commit.oid))


def _verify(api: "HfApi", repo: str, commit: str, folder: Path, files: Sequence[FileEntry]) -> None:
    info = _retrying(f"verifying {repo}", lambda: api.model_info(repo, revision=commit, files_metadata=True))
    arrived = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    damaged = []
    for entry in files:
        sibling = arrived.get(entry.path)
        if sibling is None:
            damaged.append(entry.path)
        elif sibling.lfs is not None:
            damaged += [entry.path] if sibling.lfs.sha256 != entry.sha256 else []
        elif sibling.blob_id != _git_blob(folder / entry.path):
            damaged.append(entry.path)
    if damaged:
        raise PublishError(
            f"{repo} at {commit}: {len(damaged)} file(s) are missing or differ from what was sent: "
            f"{', '.join(damaged[:5])}; publish again"
        )


def _git_blob(path: Path) -> str:
    """The id that git gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _retrying(what: str, call: Callable[[], Result]) -> Result:
    """Repeat ``call`` while the hub is unwell; the client does not do so for commits."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except OfflineModeIsEnabled as error:
            raise PublishError(
                f"{what} failed: HF_HUB_OFFLINE is set; unset it, or set push_to_hub to false"
            ) from error
        except (HfHubHTTPError, httpx2.TransportError) as error:
            status = (
                error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
            )
            if (status and status not in _PASSING) or attempt == ATTEMPTS:
                advice = _ADVICE.get(status, "the hub cannot be reached or refuses: try again later")
                reason = str(error).strip().splitlines()
                raise PublishError(f"{what} failed: {advice} ({reason[0] if reason else status})") from error
            logger.warning("%s failed (%s), again in %.0f s", what, status or type(error).__name__, pause)
            time.sleep(pause)
            pause *= 2
    raise AssertionError("unreachable")
