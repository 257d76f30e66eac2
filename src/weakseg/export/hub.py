"""Model folders on the Hugging Face hub: fetched and uploaded, with errors that say the mend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from weakseg.errors import UserError

__all__ = ["download", "is_repo_id", "upload"]

_FILES = ["config.json", "model.safetensors", "README.md"]


def is_repo_id(name: object) -> bool:
    """Whether a string can only mean a model of the hub: ``owner/name``, and no such path here."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return False
    return not Path(name).exists() and not Path(name).parent.exists()


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetches a model folder, or finds it in the hub's cache.

    Args:
        repo_id: ``owner/name``.
        revision: Branch, tag or commit.
        token: Of a private model; default: that of ``hf auth login``.
        cache_dir: Folder of downloads; default: the hub's own.
        local_files_only: Take what is in the cache and do not ask the hub.

    Raises:
        UserError: No such model or revision, no access, or no network.
    """
    import huggingface_hub

    with _explained(repo_id, revision):
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=_FILES,
                library_name="weakseg",
                library_version=version("weakseg"),
            )
        )


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Model trained by weakseg",
) -> str:
    """Uploads a model folder into a repository, which is made if need be; returns its address.

    Raises:
        UserError: No token, no access, or no network.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(
        token=token, library_name="weakseg", library_version=version("weakseg")
    )
    with _explained(repo_id, None):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=_FILES,
            commit_message=commit_message,
        )
    return str(address)


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or give token=..."
    try:
        yield
    except errors.HFValidationError:
        raise UserError(
            f"{repo_id!r} is no name of a model on the hub", mend="give owner/name"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"has no revision {revision!r}",
            where=repo_id,
            mend="give a branch, a tag or a commit of that model",
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            "there is no such model on the Hugging Face hub, or you may not see it; and there is "
            "no folder of that name here",
            where=repo_id,
            mend=f"check the name; if the model is private, {login}",
        ) from None
    except errors.LocalTokenNotFoundError:
        raise UserError("the hub asks who you are", where=repo_id, mend=login) from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"the hub refuses access ({status})",
                where=repo_id,
                mend=f"{login}; to upload, the token must be allowed to write",
            ) from None
        raise _unreachable(repo_id, error) from None
    except OSError as error:  # also what is neither in the cache nor to be had from the hub
        raise _unreachable(repo_id, error) from None


def _unreachable(repo_id: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"the hub cannot be reached ({reason})",
        where=repo_id,
        mend="try again with a network, or give the path of a model folder that is here",
    )
