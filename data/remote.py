"""Shards that are no files here (`http://`, `https://`, webdataset's `pipe:COMMAND`), and the cache that makes them so.

`chunks` gives the bytes of any source once, whole or with a DataError: what fails for a while (no answer, a lost
connection, status 408, 425, 429, 5xx) is tried again with growing pauses, from the byte where it stopped. A `pipe:`
command is what the user typed, run by the shell with the user's rights, exactly as webdataset does; it is not tried
again, and its exit status must be 0.

`fetch` keeps a source as a file. A shard in the cache is a folder with the tar and `shard.json` (what it is and its
sha256), written aside, flushed and renamed, so it is whole or not there. Before it is kept, its length is compared with
what the server announced, and its headers are read to the end of the archive. A lock lets processes that want the same
shard download it once. On reuse, size and modification time must be those recorded, and once a day the sha256 too; else
it is fetched again. The server is not asked again: a URL is taken to mean the same shard for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import WeakFileLock

from ..core.errors import CheckpointError, DataError, near_miss
from ..core.files import all_of_it, cache_root, check_file, file_digest, new_folder
from . import tar

__all__ = ["Patience", "chunks", "fetch", "is_remote", "reader", "refuse_scheme", "shown"]

SCHEME = re.compile(r"(pipe):|(?!file:)([A-Za-z][\w+.-]*)://")
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
TRUSTED = 24 * 3600  # seconds for which a verified sha256 is believed
PIECE = 1 << 20
TAR, RECORD = "shard.tar", "shard.json"
# How people read what we do not.
THROUGH = {
    "s3": "pipe:aws s3 cp {} -",
    "gs": "pipe:gcloud storage cat {}",
    "hdfs": "pipe:hdfs dfs -cat {}",
    "ftp": "pipe:curl -fsS {}",
    "hf": "https://huggingface.co/datasets/ORG/NAME/resolve/main/SHARD.tar",
}


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for: seconds of silence, and tries without a byte of progress."""

    silence: float = 30.0
    tries: int = 5
    pause: float = 1.0  # before the second try; doubled each time
    longest: float = 60.0

    def wait(self, failures: int, asked: str | None = None) -> None:
        """`asked`: the server's Retry-After, where it counts seconds."""
        pause = self.pause * 2 ** (failures - 1)
        time.sleep(min(max(pause, float(asked)) if asked and asked.isdigit() else pause, self.longest))


PATIENCE = Patience()


# ------------------------------------------------------------------------------------------------------------- sources


def is_remote(source: str | os.PathLike[str]) -> bool:
    return isinstance(source, str) and SCHEME.match(source) is not None


def refuse_scheme(source: str) -> None:
    """DataError where `source` has a scheme that is not read."""
    found = SCHEME.match(source)
    scheme = (found[1] or found[2]).lower() if found else "pipe"
    if scheme not in ("http", "https", "pipe"):
        hint = near_miss(scheme, ("http", "https", "pipe"))
        if scheme in THROUGH:
            hint = f" Read it as {THROUGH[scheme].format(shown(source))!r}."
        raise DataError(
            f"{shown(source)}: shards from {scheme}:// are not supported; http://, https:// and pipe:COMMAND are.{hint}"
        )
    if scheme == "pipe" and not source.removeprefix("pipe:").strip():
        raise DataError("pipe: names no command. Write for example 'pipe:curl -fsS https://host/{00000..00009}.tar'.")
    if scheme != "pipe" and (not urlsplit(source).hostname or "@" in urlsplit(source).netloc):
        raise DataError(
            f"{shown(source)}: a URL is https://HOST/PATH. "
            "Where a password is needed: 'pipe:curl -fsS --netrc https://HOST/PATH'."
        )


def shown(source: str | os.PathLike[str]) -> str:
    """`source` as it may be printed: without what is secret in signed URLs, headers and passwords."""
    text = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", os.fspath(source))
    text = re.sub(r"(\w+://)[^/\s@]*@", r"\1...@", text)
    text = re.sub(r"(?i)(authorization:)[^'\"]*", r"\1 ...", text)
    return re.sub(r"(?i)(bearer\s+|\s-u\s*|--user\s+|(?:token|password|key)=)[^\s'\"]+", r"\1...", text)


def chunks(source: str | os.PathLike[str], patience: Patience = PATIENCE) -> Iterator[bytes]:
    """The bytes of a shard, wherever it lies; DataError where they do not all come."""
    if not is_remote(source):
        return _file_chunks(Path(source))
    source = os.fspath(source)
    return _pipe_chunks(source) if source.startswith("pipe:") else _http_chunks(source, patience)


def _file_chunks(path: Path) -> Iterator[bytes]:
    try:
        path.stat()  # says itself what is missing
        check_file(path, raises=DataError)
        with path.open("rb") as stream:
            while data := stream.read(PIECE):
                yield data
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _pipe_chunks(source: str) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as complaints:
        line = source.removeprefix("pipe:")
        files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": complaints}
        command = subprocess.Popen(line, shell=True, **files)
        assert command.stdout is not None
        try:
            while data := command.stdout.read(PIECE):
                yield data
            status = command.wait()
        finally:
            command.stdout.close()  # a command that still writes ends by it
            if command.poll() is None:
                command.kill()
                command.wait()
        if status:
            complaints.seek(max(0, complaints.seek(0, 2) - 500))
            said = complaints.read().decode("utf-8", "replace").strip().splitlines()
            raise DataError(
                f"{shown(source)} ended with exit status {status}{': ' + shown(said[-1]) if said else ''}. "
                "Run the command in a shell to see what it says."
            )


class _Failed(Exception):
    """What may work if it is tried again."""

    def __init__(self, why: str, retry_after: str | None = None):
        super().__init__(why)
        self.retry_after = retry_after


def _http_chunks(url: str, patience: Patience) -> Iterator[bytes]:
    position, failures, tag = 0, 0, None
    while True:
        before = position
        try:
            with _open(url, position, tag, patience) as response:
                tag = _tag(response)
                for data in _from(response, position):
                    position += len(data)
                    yield data
            return
        except _Failed as error:
            failures = 1 if position > before else failures + 1
            if failures >= patience.tries:
                raise DataError(
                    f"{shown(url)} cannot be downloaded: {error} ({failures} tries, {position} bytes came)."
                ) from error
            patience.wait(failures, error.retry_after)


def _open(url: str, position: int, tag: str | None, patience: Patience) -> http.client.HTTPResponse:
    """A response that begins at `position`, or at 0 where the server cannot do that."""
    request = urllib.request.Request(url, headers={"User-Agent": "bcosify"})
    if position and tag and not tag.startswith("W/"):  # If-Range: the rest only if it is still the same file
        request.add_header("Range", f"bytes={position}-")
        request.add_header("If-Range", tag)
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=patience.silence)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in TRANSIENT:
            raise _Failed(f"status {error.code} ({error.reason})", error.headers.get("Retry-After")) from None
        raise DataError(_status(url, error.code, error.reason)) from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError, whatever its reason is
        why = getattr(error, "reason", error)
        if isinstance(why, ssl.SSLCertVerificationError):
            raise DataError(f"{shown(url)} cannot be downloaded: {why.verify_message} (its certificate).") from None
        raise _Failed(str(why) or type(why).__name__) from None
    if position and _tag(response) != tag:
        response.close()
        raise DataError(f"{shown(url)} changed while it was downloaded. Start again.")
    return response


def _tag(response: http.client.HTTPResponse) -> str | None:
    """What tells one version of a file from another."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


def _status(url: str, status: int, said: str) -> str:
    hint = {
        401: "It wants a login: 'pipe:curl -fsS -H \"Authorization: ...\" URL'.",
        403: "It may want a login: 'pipe:curl -fsS -H \"Authorization: ...\" URL'. Signed URLs run out.",
        404: "Check the URL, and the range in its braces.",
    }.get(status, "")
    return f"{shown(url)} cannot be downloaded: status {status} ({said}). {hint}".strip()


def _from(response: http.client.HTTPResponse, position: int) -> Iterator[bytes]:
    """What comes from `position` on; _Failed where less comes than was announced."""
    here = position if response.status == 206 else 0
    length = response.headers.get("Content-Length")
    end = here + int(length) if length and length.isdigit() else None
    while True:
        try:
            data = response.read(PIECE)
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(str(error) or type(error).__name__) from error
        if not data:
            break
        new = data[max(0, position - here) :]  # a server that starts again from 0 repeats what we have
        here += len(data)
        if new:
            yield new
    if end is not None and here < end:
        raise _Failed(f"the connection ended after {here} of {end} bytes")


class _Raw(io.RawIOBase):
    def __init__(self, source: Iterator[bytes]):
        self.source, self.ahead = source, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.ahead:
            self.ahead = memoryview(next(self.source, b""))
        count = min(len(buffer), len(self.ahead))
        buffer[:count], self.ahead = self.ahead[:count], self.ahead[count:]
        return count


def reader(source: Iterator[bytes]) -> io.BufferedReader:
    """Chunks as a file that can be read once from front to end."""
    return io.BufferedReader(_Raw(source), PIECE)


# --------------------------------------------------------------------------------------------------------------- cache


def fetch(
    source: str,
    cache: Path | None = None,
    came: Callable[[int], object] = lambda count: None,
    patience: Patience = PATIENCE,
) -> Path:
    """The file that holds a remote shard, downloaded where it is not there yet.

    `cache` None is `cache_root()`/shards; `came` is told of bytes as they come. Raises DataError where the shard cannot
    be had, is no whole tar, or the folder cannot be written (nothing is left behind).
    """
    root = (cache or cache_root() / "shards").expanduser().absolute()
    entry = root / _entry_name(source)
    locks = root / ".locks"
    if _is_good(entry):
        return entry / TAR
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{entry.name}.lock"):
            if not _is_good(entry):  # another process may have been faster
                for left in root.glob(f".{entry.name}.*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                _download(source, entry, came, patience)
    except OSError as error:
        raise DataError(
            f"the cache for shards, {root}, cannot be used: {error.strerror or error}. "
            "Name another folder: --cache FOLDER, or BCOSIFY_CACHE in the environment."
        ) from error
    return entry / TAR


def _entry_name(source: str) -> str:
    """Readable, and one for each source."""
    path = shown(source) if source.startswith("pipe:") else unquote(urlsplit(source).path)
    words = re.sub(r"[^\w.-]+", "-", path.rpartition("/")[2]).removesuffix(".tar").strip("-.")[-60:]
    return f"{words or 'shard'}-{hashlib.sha256(source.encode()).hexdigest()[:24]}"


def _is_good(entry: Path) -> bool:
    """Whether the shard is there as it was recorded."""
    try:
        record = json.loads((entry / RECORD).read_text("utf-8"))
        stat = (entry / TAR).stat()
        checked = (entry / RECORD).stat().st_mtime
        if stat.st_size != record["bytes"]:
            return False
        if stat.st_mtime_ns == record["mtime_ns"] and 0 <= time.time() - checked < TRUSTED:
            return True
        if file_digest(entry / TAR) != record["sha256"]:
            return False
        with contextlib.suppress(OSError):  # a cache may be read-only
            os.utime(entry / TAR, ns=(stat.st_atime_ns, record["mtime_ns"]))
            os.utime(entry / RECORD)
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _download(source: str, entry: Path, came: Callable[[int], object], patience: Patience) -> None:
    try:
        with new_folder(entry, overwrite=True, own=all_of_it) as scratch:
            digest, size = hashlib.sha256(), 0
            with (scratch / TAR).open("w+b") as file:
                for data in chunks(source, patience):
                    digest.update(data)
                    size += len(data)
                    file.write(data)
                    came(len(data))
                _check(file, shown(source))
            record = {
                "source": shown(source),
                "bytes": size,
                "sha256": digest.hexdigest(),
                "mtime_ns": (scratch / TAR).stat().st_mtime_ns,
            }
            (scratch / RECORD).write_text(json.dumps(record, indent=2), "utf-8")
    except CheckpointError as error:
        raise DataError(
            f"{shown(source)} cannot be kept: {error} "
            "Name another folder: --cache FOLDER, or BCOSIFY_CACHE in the environment. Or read without one: --stream."
        ) from error


def _check(file: BinaryIO, name: str) -> None:
    """DataError where the tar is not whole."""
    file.flush()
    for _ in tar.members(file, name):
        pass
