"""Files of data sets on the Hugging Face Hub: hf://datasets/OWNER/NAME/PATTERN.

Each is downloaded when it is read, and can be dropped when it has been used, so that text that is
read once never needs room for all of them. They come from $HF_ENDPOINT, if that is set.
"""

import fnmatch
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import requests

from data.download import TIMEOUT, short_reason
from data.errors import UserError

PREFIX = "hf://datasets/"
ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)/(.+)")
DATA_SETS = {  # known by a name: their addresses, and about how many GB are downloaded
    "openwebtext": (f"{PREFIX}Skylion007/openwebtext/*.parquet", 24),
    "fineweb_edu_10B": (f"{PREFIX}HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet", 28),
    "fineweb10B_gpt2": (f"{PREFIX}kjj0/fineweb10B-gpt2/*.bin", 21),  # already GPT-2's tokens
}


class HubFile(NamedTuple):
    """A file of a data set, at one commit."""

    repo: str
    commit: str
    path: str  # in the repository
    size: int
    folder: Path  # where the repository's files are stored

    def fetch(self) -> None:
        """Download it, unless it is there. Raises OSError, not UserError: trying again may help."""
        from huggingface_hub import hf_hub_download

        where = {"repo_type": "dataset", "revision": self.commit, "local_dir": self.folder}
        try:
            with asking_for(f"{self.repo}/{self.path}"):
                hf_hub_download(self.repo, self.path, endpoint=endpoint(), **where)
        except UserError as error:
            raise OSError(str(error)) from None


def find(address: str, downloads: Path) -> list[HubFile]:
    """The files that an address names, in the order of their names. In it, * is also any number of
    folders. Raises UserError if there are none."""
    from huggingface_hub import HfApi  # here, because few runs need it
    from huggingface_hub.hf_api import RepoFile

    if not (parts := ADDRESS.fullmatch(address)):
        raise UserError(
            f"input {address}: an address is {PREFIX}OWNER/NAME/FILE, with * or without"
        )
    repo, pattern = parts.groups()
    folder = re.match(r"(?:[^/*?\[]+/)*", pattern)[0].rstrip("/")
    api = HfApi(endpoint=endpoint())
    with asking_for(repo):
        commit = api.dataset_info(repo).sha
        where = {"repo_type": "dataset", "revision": commit, "recursive": True}
        tree = list(api.list_repo_tree(repo, folder or None, **where))
    files = sorted(
        HubFile(repo, commit, entry.path, entry.size, downloads / "hub" / repo)
        for entry in tree
        if isinstance(entry, RepoFile) and fnmatch.fnmatchcase(entry.path, pattern)
    )
    if not files:
        raise UserError(f"input {address}: no files found")
    return files


def endpoint() -> str:
    """The address of the Hub, or of what takes its place."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


@contextmanager
def asking_for(what: str) -> Iterator[None]:
    """A context in which the library's many errors become one: UserError, `what` cannot be
    downloaded. It begins with a request that fails fast; offline the library tries for 20 s."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError

    try:
        requests.head(endpoint(), timeout=TIMEOUT)
        yield
    except requests.RequestException as error:
        reason = short_reason(error)
    except RepositoryNotFoundError:
        reason = "no public repository of that name"
    except EntryNotFoundError:
        reason = "no such file or folder there"
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    else:
        return
    raise UserError(f"cannot download {what} from {endpoint()} ({reason})")
