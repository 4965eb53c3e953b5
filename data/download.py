"""fetch(): a file from the web, whole and verified, or not there at all; and GPT-2 from the Hub."""

import codecs
import hashlib
import os
import re
import shutil
import time
from pathlib import Path

import requests
from tqdm import tqdm

from config import UserError

TRIES = 3
TIMEOUT = (3, 10)  # seconds to connect, seconds without a byte
CHUNK = 1 << 16
HTML = "a web page (HTML), not with a text"
PAGE = re.compile(  # remarks end at their first -->: one way to match, however many there are
    rb"(\s|<!--((?!-->).)*-->|<\?xml((?!\?>).)*\?>)*<(!doctype html|html)",
    re.DOTALL | re.IGNORECASE,
)


def fetch(url: str, path: Path, sha256: str | None = None, size: int | None = None) -> Path:
    """Download `url` to `path` and return it; it gets that name only when size and digest fit.

    Where the digest is known, so that nothing can be pieced together wrongly, what has arrived is
    kept in PATH.part, and a later call goes on from there if the server allows it. Raises
    UserError, with the reason in a few words, after three tries.
    """
    part = path.with_name(path.name + ".part")
    for attempt in range(TRIES):
        if attempt:
            time.sleep(attempt)
        if sha256 is None:
            part.unlink(missing_ok=True)
        try:
            _download(url, part)
        except requests.RequestException as error:
            reason = _in_short(error)
            if isinstance(error, requests.HTTPError) and error.response.status_code < 500:
                break
            continue
        if sha256 is None and (refused := _is_no_text(part)):
            part.unlink()
            raise UserError(f"{url} answers with {refused}")
        data_size, digest = _measure(part)
        if sha256 in (None, digest):
            os.replace(part, path)
            return path
        reason = f"{data_size} bytes arrived, SHA-256 {digest[:12]}..., not {sha256[:12]}..."
        if size and data_size < size:
            reason = f"{data_size} of {size} bytes arrived"
        else:
            part.unlink()
    if sha256 is None:
        part.unlink(missing_ok=True)
    raise UserError(f"cannot download {url} ({reason})")


def _download(url: str, part: Path) -> None:
    """Append what is missing of `url` to `part`; start again where the server ignores Range."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing is missing; the digest will tell
            return
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith(("text/html", "application/xhtml")):
            raise UserError(f"{url} answers with {HTML}")
        resumed = response.status_code == 206
        length = response.headers.get("Content-Length", "")
        total = int(length) + have * resumed if length.isdecimal() else 0
        part.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                desc=url.rsplit("/", 1)[-1],
                initial=have * resumed,
                total=total or None,
                unit="B",
                unit_scale=True,
                disable=None,  # no bar where there is no terminal
            ) as bar,
        ):
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def _is_no_text(path: Path) -> str:
    """What stands in a file in the place of a text; empty where nothing speaks against it."""
    with open(path, "rb") as file:
        head = file.read(CHUNK).removeprefix(codecs.BOM_UTF8)
    if not head:
        return "nothing: an empty file"
    return HTML if PAGE.match(head) else ""


def _measure(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return path.stat().st_size, digest.hexdigest()


def _in_short(error: requests.RequestException) -> str:
    """The cause that a user can act on, without the library's chain of wrapped exceptions."""
    if isinstance(error, requests.HTTPError):
        return f"the server answers {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return type(error).__name__


# ---- the Hugging Face Hub -----------------------------------------------------------------------

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def pretrained_folder(name: str, cache_dir: str = "") -> Path | None:
    """The folder with config.json and model.safetensors that `name` means; None if it means none.

    A folder that holds them, or one of GPT2, which is downloaded into Hugging Face's usual cache,
    or `cache_dir`, where transformers finds it too.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if name not in GPT2:
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(cache_dir or os.environ.get("HF_HUB_CACHE") or home / "hub")
    repo = cache / f"models--openai-community--{name}"
    try:
        for file in ("config.json", "model.safetensors"):
            folder = _from_hub(f"openai-community/{name}", file, repo)
    except UserError as error:
        raise UserError(
            f"{error}; or name a folder that holds {name}'s config.json and model.safetensors"
        ) from None
    return folder


def _from_hub(repo_id: str, name: str, repo: Path) -> Path:
    """Put one file of a repository into the cache's folder for it; the folder that holds it.

    Files lie in blobs/ under their digest; snapshots/COMMIT/ has links to them under their names,
    and refs/main says which commit is meant.
    """
    main = repo / "refs" / "main"
    if main.is_file():
        folder = repo / "snapshots" / main.read_text().strip()
        if (folder / name).is_file():
            return folder
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{endpoint}/{repo_id}/resolve/main/{name}"
    try:
        response = requests.head(url, timeout=TIMEOUT)  # redirects are for the download itself
        response.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"cannot download {url} ({_in_short(error)})") from None
    headers = response.headers
    digest = (headers.get("X-Linked-Etag") or headers.get("ETag", "")).strip('W/"')
    size = headers.get("X-Linked-Size") or headers.get("Content-Length")
    commit = headers.get("X-Repo-Commit", "")
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest) or not commit.isalnum():
        raise UserError(f"cannot download {url}: the answer has no digest, or no commit")
    blob = repo / "blobs" / digest
    if not blob.is_file():
        large = len(digest) == 64  # a SHA-256; of small files git's SHA-1
        fetch(url, blob, digest if large else None, int(size) if large and size else None)
        if not large and _git_sha1(blob) != digest:
            blob.unlink()
            raise UserError(f"cannot download {url} (what arrived is not what was announced)")
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(os.path.relpath(blob, folder))
    except OSError:  # no right to make links, as on Windows
        shutil.copyfile(blob, link)
    main.parent.mkdir(parents=True, exist_ok=True)
    main.write_text(commit)
    return folder


def _git_sha1(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
