"""The Hugging Face hub: hf://owner/name[@revision]/path, and hf://datasets/owner/name[@revision]/path.

The token is huggingface_hub's own affair: HF_TOKEN, or what `hf auth login` keeps; nothing here reads or writes it.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from posixpath import normpath
from typing import NamedTuple

from common.errors import ENVIRONMENT, InputError, first_line

SCHEME = "hf://"


class Address(NamedTuple):
    """The parts of an hf:// address."""

    repo_type: str
    """model or dataset"""
    repo: str
    """owner/name"""
    revision: str | None
    path: str
    """Within the repository, "" for all of it."""


def is_hub(where: str | Path) -> bool:
    """Whether `where` is an hf:// address."""
    return str(where).startswith(SCHEME)


def parse(url: str) -> Address:
    """The parts of `url`; raises `InputError` when it is no hf:// address, or its path could lead anywhere else."""
    name = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    matched = re.fullmatch(rf"hf://(datasets/)?({name}/{name})(?:@([^/]+))?((?:/[^/]+)*)/?", url)
    if not matched or ".." in re.split("[/@]", url) or re.search(r"[\\\x00-\x1f\x7f]", url):
        raise InputError(f"{url}: expected hf://owner/name[@revision]/path or hf://datasets/owner/name/path")
    kind, repo, revision, path = matched.groups()
    return Address("dataset" if kind else "model", repo, revision, path.strip("/"))


def download(url: str, names: Sequence[str], beside: Sequence[str] = ()) -> Path:
    """Local path of the file at `url`, or of the directory with those of the files `names` that it has.

    `beside`: names or patterns of what comes along, from the directory on (../name). Kept in huggingface_hub's cache
    (HF_HOME). Raises `InputError` when there is no such thing, or no access.
    """
    import huggingface_hub
    from huggingface_hub.utils import logging as hf_logging

    where = parse(url)
    hf_logging.set_verbosity_error()  # its warning of what is said better below
    wanted = [where.path, *(normpath(f"./{where.path}/{name}") for name in (*names, *beside))]
    with _explained(url):
        root = huggingface_hub.snapshot_download(
            where.repo, repo_type=where.repo_type, revision=where.revision, allow_patterns=wanted
        )
    local = Path(root) / where.path
    if not local.exists():
        raise InputError(
            f"{url}: nothing there; expected a file, or a directory with one of {', '.join(names)}"
        )
    return local


def upload(folder: Path, url: str, message: str, names: Sequence[str] | None = None) -> None:
    """Publish the files of `folder`, or those of them in `names`, at `url` in one commit: never half there.

    A repository that does not exist is made, with the visibility that the account's settings give new ones.
    """
    import huggingface_hub

    where, api = parse(url), huggingface_hub.HfApi()
    with _explained(url):
        api.create_repo(where.repo, repo_type=where.repo_type, exist_ok=True)
        api.upload_folder(
            repo_id=where.repo,
            repo_type=where.repo_type,
            revision=where.revision,
            folder_path=folder,
            path_in_repo=where.path or None,
            allow_patterns=None if names is None else [*names],
            commit_message=message,
        )


class HubFiles:
    """The files below an hf:// address: each is downloaded whole when it is first needed, and stays in the hub's cache.

    `first` names a file in the folder itself, by which its place in the cache is known.
    """

    def __init__(self, url: str, first: str) -> None:
        import huggingface_hub

        self.where, self._address = url.rstrip("/"), parse(url)
        with _explained(self.where):
            info = huggingface_hub.HfApi().repo_info(
                self._address.repo, repo_type=self._address.repo_type, revision=self._address.revision
            )
        self._commit = info.sha  # files of one commit, whatever is pushed meanwhile
        self.root = self.local(first).parent

    def local(self, name: str) -> Path:
        import huggingface_hub

        path = f"{self._address.path}/{name}".lstrip("/")
        with _explained(f"{self.where}/{name}"):
            path_in_cache = huggingface_hub.hf_hub_download(
                self._address.repo, path, repo_type=self._address.repo_type, revision=self._commit
            )
        return Path(path_in_cache)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """The hub's refusals, and a network that is not there, as one line with what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(f"{url}: access is gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{url}: no such repository, or no access to it; set HF_TOKEN if it is private"
        ) from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise InputError(f"{url}: not in the repository ({first_line(error)[:200]})") from error
    except Exception as error:  # whatever the HTTP library raises when there is no network
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            raise
        raise InputError(f"{url}: the Hugging Face hub did not do it ({first_line(error)[:200]})") from error
