"""Downloads a file, completely and verified, or not at all."""

import codecs
import hashlib
import os
import time
from pathlib import Path

import requests
from tqdm import tqdm

from data.errors import UserError
from data.formats import HTML

TRIES = 3
TIMEOUT = (3, 10)  # seconds to connect; seconds without a byte
CHUNK = 1 << 16
WEB_PAGE = "a web page (HTML), not plain text"


def fetch(url: str, path: Path, sha256: str | None = None, size: int | None = None) -> Path:
    """Download `url` and return `path`, which appears only when the download is verified.

    If the digest is known, a partial download is kept in PATH.part, and a later call continues it
    if the server allows that. Raises UserError, with a short reason, after three tries.
    """
    if sha256:
        return _fetch(url, path, path.with_name(f"{path.name}.part"), sha256, size)
    # without a digest nobody would notice what another process writes to the same file
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        return _fetch(url, path, part, sha256, size)
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, path: Path, part: Path, sha256: str | None, size: int | None) -> Path:
    for attempt in range(TRIES):
        if attempt:
            time.sleep(attempt)
        if sha256 is None:
            part.unlink(missing_ok=True)
        try:
            _download(url, part)
        except requests.RequestException as error:
            reason = short_reason(error)
            if isinstance(error, requests.HTTPError) and error.response.status_code < 500:
                break
            continue
        if sha256 is None and (problem := _not_a_text(part)):
            raise UserError(f"{url} returned {problem}")
        data_size, digest = _measure(part)
        if sha256 in (None, digest):
            os.replace(part, path)
            return path
        reason = f"{data_size} bytes arrived, SHA-256 {digest[:12]}..., not {sha256[:12]}..."
        if size and data_size < size:
            reason = f"{data_size} of {size} bytes arrived"
        else:
            part.unlink()
    raise UserError(f"cannot download {url} ({reason})")


def _download(url: str, part: Path) -> None:
    """Append the rest of `url` to `part`; restart if the server ignores the Range header."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing is missing; the digest decides
            return
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith(("text/html", "application/xhtml")):
            raise UserError(f"{url} returned {WEB_PAGE}")
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
                disable=None,  # no bar without a terminal
            ) as bar,
        ):
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def _not_a_text(path: Path) -> str:
    """What a file contains instead of a text; empty if it may be a text."""
    with open(path, "rb") as file:
        head = file.read(CHUNK).removeprefix(codecs.BOM_UTF8)
    if not head:
        return "nothing: an empty file"
    return WEB_PAGE if HTML.match(head) else ""


def _measure(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return path.stat().st_size, digest.hexdigest()


def short_reason(error: requests.RequestException) -> str:
    """The cause of an error in a few words, without the library's nested exceptions."""
    if isinstance(error, requests.HTTPError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "timed out"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return type(error).__name__
