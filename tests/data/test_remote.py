"""Remote shards: what servers and commands do wrong, the cache that keeps only whole shards, and its users."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bcosify.core.errors import DataError
from bcosify.core.files import cache_root
from bcosify.data import remote
from bcosify.data.index import index_shards
from bcosify.data.names import expand
from bcosify.data.remote import chunks, fetch, shown
from PIL import Image

from loopback import QUICK, Handler, Server, cut, first, silent, status, whole


def a_tar(count: int = 3, first: int = 0) -> bytes:
    """A shard of small pictures."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for i in range(first, first + count):
            picture = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).save(picture, "PNG")
            info = tarfile.TarInfo(f"k{i:04d}.png")
            info.size = picture.tell()
            archive.addfile(info, io.BytesIO(picture.getvalue()))
    return stream.getvalue()


TAR = a_tar()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BCOSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


def left(cache: Path) -> list[str]:
    """What lies in the cache of shards but locks."""
    return sorted(path.name for path in (cache / "shards").glob("*") if path.name != ".locks")


def get(url: str) -> bytes:
    return fetch(url, patience=QUICK).read_bytes()


# ------------------------------------------------------------------------------------------------------------- servers


def test_a_shard_is_downloaded_once_and_recorded(server, cache):
    server.answers["/a.tar"] = whole(TAR)
    assert get(f"{server.url}/a.tar") == TAR
    assert get(f"{server.url}/a.tar") == TAR
    assert server.asked["/a.tar"] == 1
    (entry,) = left(cache)
    record = json.loads((cache / "shards" / entry / "shard.json").read_text())
    assert record["sha256"] == hashlib.sha256(TAR).hexdigest() and record["bytes"] == len(TAR)
    assert sorted(os.listdir(cache / "shards" / entry)) == ["shard.json", "shard.tar"]


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_what_fails_for_a_while_is_tried_again(server, code):
    server.answers["/a.tar"] = first(status(code), status(code), whole(TAR))
    assert get(f"{server.url}/a.tar") == TAR
    assert server.asked["/a.tar"] == 3


def test_a_server_may_say_how_long_to_wait(server, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    server.answers["/a.tar"] = first(status(503, Retry_After="7"), status(429, Retry_After="999"), whole(TAR))
    assert get(f"{server.url}/a.tar") == TAR
    assert slept == [7, QUICK.longest]


@pytest.mark.parametrize(
    ("code", "says"),
    [(404, "status 404 .*Check the URL, and the range"), (403, "status 403 .*It may want a login"), (401, "login"),
     (410, "status 410")],
)  # fmt: skip
def test_what_will_not_change_is_not_tried_again(server, cache, code, says):
    server.answers["/a.tar"] = status(code)
    with pytest.raises(DataError, match=says):
        get(f"{server.url}/a.tar")
    assert server.asked["/a.tar"] == 1 and left(cache) == []


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (status(500), r"status 500 .*3 tries, 0 bytes came"),
        (silent, r"timed out.*3 tries"),
        (cut(TAR, 1000, None), rf"the connection ended after 1000 of {len(TAR)} bytes \(3 tries, 1000 bytes came\)"),
    ],
    ids=["500", "timeout", "short"],
)
def test_tries_end(server, cache, answer, says):
    server.answers["/a.tar"] = answer
    with pytest.raises(DataError, match=says):
        get(f"{server.url}/a.tar")
    assert left(cache) == []


def test_nobody_listens(cache):
    closed = Server()
    closed.close()
    with pytest.raises(DataError, match=r"Connection refused \(3 tries"):
        get(f"{closed.url}/a.tar")
    assert left(cache) == []


@pytest.mark.parametrize("tag", ['"1"', 'W/"1"', None])
def test_a_lost_connection_goes_on_where_it_stopped(server, tag):
    """By a range where the server has a strong tag, else by passing over what has come."""
    server.answers["/a.tar"] = first(cut(TAR, 700, tag), cut(TAR, 2000, tag), whole(TAR, tag))
    assert b"".join(chunks(f"{server.url}/a.tar", QUICK)) == TAR
    assert server.asked["/a.tar"] == 3
    assert server.ranges[1:] == (["bytes=700-", "bytes=2000-"] if tag == '"1"' else [None, None])


def test_progress_gives_new_tries(server):
    server.answers["/a.tar"] = first(*(cut(TAR, at, '"1"') for at in range(500, 4000, 500)), whole(TAR))
    assert b"".join(chunks(f"{server.url}/a.tar", QUICK)) == TAR


def test_a_file_that_changes_meanwhile_is_not_spliced(server, cache):
    server.answers["/a.tar"] = first(cut(TAR, 700, '"1"'), whole(a_tar(4), '"2"'))
    with pytest.raises(DataError, match="changed while it was downloaded"):
        get(f"{server.url}/a.tar")
    assert left(cache) == []


HTML = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (HTML, "is a web page or an error message, no tar archive: it begins with '<!DOCTYPE html>"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page or an error message"),
        (b"not a tar at all" * 100, "is no tar archive"),
        (b"", r"is empty \(0 bytes\)"),
        (b"\x1f\x8b" + bytes(600), "is compressed"),
        (TAR[:1500], "is truncated"),
        (TAR.rstrip(b"\0") + bytes(-len(TAR.rstrip(b"\0")) % 512), "is truncated"),
    ],
    ids=["html", "xml", "text", "empty", "gzip", "cut", "no-end"],
)
def test_what_is_no_whole_tar_is_not_kept(server, cache, body, says):
    server.answers["/a.tar"] = whole(body)
    with pytest.raises(DataError, match=rf"127\.0\.0\.1:\d+/a\.tar {says}") as caught:
        index_shards([f"{server.url}/a.tar"])
    assert str(cache) not in str(caught.value) and left(cache) == []


def test_a_server_that_tells_no_length_is_checked_by_the_tar(server, cache):
    def answer(handler: Handler, before: int) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(TAR if before else TAR[:1500])

    server.answers["/a.tar"] = answer
    with pytest.raises(DataError, match="truncated"):
        get(f"{server.url}/a.tar")
    assert get(f"{server.url}/a.tar") == TAR


def test_redirects_are_followed(server):
    server.answers["/a.tar"] = status(302, Location="/there.tar")
    server.answers["/there.tar"] = whole(TAR)
    assert get(f"{server.url}/a.tar") == TAR


def test_secrets_are_not_printed(server, cache):
    with pytest.raises(DataError) as caught:
        get(f"{server.url}/a.tar?X-Signature=hidden")
    assert "hidden" not in str(caught.value) and "/a.tar?..." in str(caught.value)
    assert "hidden" not in shown("pipe:curl -H 'Authorization: Bearer hidden' -u me:hidden https://h/a?token=hidden")
    server.answers["/a.tar?X-Signature=hidden"] = whole(TAR)
    get(f"{server.url}/a.tar?X-Signature=hidden")
    (entry,) = left(cache)
    assert "hidden" not in entry and "hidden" not in (cache / "shards" / entry / "shard.json").read_text()


# ------------------------------------------------------------------------------------------------------------ commands


def test_a_command_is_run_once(tmp_path, cache):
    (tmp_path / "a.tar").write_bytes(TAR)
    source = f"pipe:echo x >> {tmp_path}/runs; cat {tmp_path}/a.tar | cat"
    assert get(source) == get(source) == TAR
    assert (tmp_path / "runs").read_text() == "x\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("cat {}/a.tar; echo no such bucket >&2; exit 3", "exit status 3: no such bucket"),
        ("cat {}/none.tar", "exit status 1: cat: .*none.tar"),
        ("no-such-command-at-all", "exit status 127"),
        ("head -c 1500 {}/a.tar", "is truncated"),
        ("true", "is empty"),
    ],
)
def test_a_command_that_fails_leaves_nothing(tmp_path, cache, command, says):
    (tmp_path / "a.tar").write_bytes(TAR)
    with pytest.raises(DataError, match=says):
        get("pipe:" + command.format(tmp_path))
    assert left(cache) == []


def test_a_command_that_is_not_read_to_its_end_is_ended(tmp_path):
    pieces = chunks(f"pipe:echo $$ > {tmp_path}/pid; exec yes")
    assert len(next(pieces)) == remote.PIECE
    pid = int((tmp_path / "pid").read_text())
    pieces.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# --------------------------------------------------------------------------------------------------------------- cache


def test_where_the_cache_is(monkeypatch):
    for name in ("BCOSIFY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root() == Path("/home/me/.cache/bcosify")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/bcosify")
    monkeypatch.setenv("BCOSIFY_CACHE", "~/own")
    assert cache_root() == Path("/home/me/own")


@pytest.mark.parametrize("harm", ["length", "bytes", "bytes-unseen", "record", "no-record", "touched"])
def test_a_shard_that_is_not_as_recorded_is_fetched_again(server, cache, harm):
    server.answers["/a.tar"] = whole(TAR)
    path = fetch(f"{server.url}/a.tar")
    stat, record = path.stat(), path.with_name("shard.json")
    if harm == "length":
        path.write_bytes(TAR[:-1])
    elif harm.startswith("bytes"):
        path.write_bytes(TAR[:600] + bytes([TAR[600] ^ 1]) + TAR[601:])
        if harm == "bytes-unseen":  # same size and time: found once a day
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            os.utime(record, (time.time() - 2 * remote.TRUSTED,) * 2)
    elif harm == "record":
        record.write_text('{"bytes": ')
    elif harm == "no-record":
        record.unlink()
    else:
        os.utime(path)
    assert get(f"{server.url}/a.tar") == TAR
    assert server.asked["/a.tar"] == (1 if harm == "touched" else 2)
    if harm == "touched":  # the same bytes: the time is put back, so that the index still holds
        assert path.stat().st_mtime_ns == stat.st_mtime_ns


def test_a_killed_download_is_swept_up(server, cache):
    server.answers["/a.tar"] = whole(TAR)
    path = fetch(f"{server.url}/a.tar")
    path.unlink()
    half = path.parent.with_name(f".{path.parent.name}.abc.tmp")
    half.mkdir()
    (half / "shard.tar").write_bytes(TAR[:700])
    assert get(f"{server.url}/a.tar") == TAR
    assert left(cache) == [path.parent.name]


def test_a_full_disk_leaves_nothing(server, cache, monkeypatch):
    server.answers["/a.tar"] = whole(TAR)

    def full(file, name):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_check", full)
        with pytest.raises(DataError, match="(?s)No space left on device.*--cache FOLDER.*--stream"):
            get(f"{server.url}/a.tar")
    assert left(cache) == []
    assert get(f"{server.url}/a.tar") == TAR


def test_a_cache_that_cannot_be_written(server, tmp_path):
    server.answers["/a.tar"] = whole(TAR)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cache for shards, .*file/x, cannot be used: .*BCOSIFY_CACHE"):
        index_shards([f"{server.url}/a.tar"], cache=tmp_path / "file" / "x")


PROCESS = """
import sys
from bcosify.data.remote import fetch
import hashlib
print(hashlib.sha256(fetch(sys.argv[1]).read_bytes()).hexdigest())
"""


def test_processes_that_want_the_same_shard_download_it_once(server, cache):
    def slow(handler: Handler, before: int) -> None:
        time.sleep(0.5)
        whole(TAR)(handler, before)

    server.answers["/a.tar"] = slow
    command = [sys.executable, "-c", PROCESS, f"{server.url}/a.tar"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0].strip() for process in running}
    assert answers == {hashlib.sha256(TAR).hexdigest()}
    assert server.asked["/a.tar"] == 1 and len(left(cache)) == 1


def test_threads_that_want_the_same_shard_download_it_once(server):
    server.answers["/a.tar"] = lambda handler, before: (time.sleep(0.2), whole(TAR)(handler, before))[1]
    index = index_shards([f"{server.url}/a.tar"] * 4)
    assert server.asked["/a.tar"] == 1 and len(index) == 12


# --------------------------------------------------------------------------------------------------------------- index


def test_a_remote_index_is_the_index_of_the_files(server, tmp_path):
    names = [f"s-{i:02d}.tar" for i in range(12)]
    for i, name in enumerate(names):
        body = a_tar(1 + i % 3, 10 * i)
        (tmp_path / name).write_bytes(body)
        server.answers[f"/{name}"] = whole(body)
    local = index_shards(expand(f"{tmp_path}/s-*.tar"))
    for data in (f"{server.url}/s-{{00..11}}.tar", f"pipe:cat {tmp_path}/s-{{00..11}}.tar"):
        away = index_shards(expand(data))
        assert away.digest == local.digest
        assert all(away.read(i) == local.read(i) for i in range(len(local)))
    mixed = index_shards(expand([tmp_path / names[0], f"{server.url}/{names[1]}::pipe:cat {tmp_path}/{names[2]}"]))
    assert mixed.digest == index_shards([tmp_path / name for name in names[:3]]).digest


def test_all_that_cannot_be_downloaded_is_listed_but_not_without_end(server):
    server.answers["/0.tar"] = whole(TAR)
    with pytest.raises(DataError, match=r"(?s)2 of 3 shards cannot be used:.*/1\.tar.*404.*/2\.tar.*404"):
        index_shards(expand(f"{server.url}/{{0..2}}.tar"))
    with pytest.raises(DataError, match="(?s)10 of 500 shards .*the shards after these were not tried"):
        index_shards(expand(f"{server.url}/x{{000..499}}.tar"))
    assert sum(server.asked.values()) < 60


def test_an_interrupt_does_not_wait_for_downloads(tmp_path, cache):
    """The endless shard ends too: its next piece finds out."""
    # What runs in the background of a shell ignores interrupts, and so would its children: ours does not.
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += "import bcosify.data.index as s; s.index_shards(sys.argv[1:])"
    endless = f"pipe:touch {tmp_path}/begun; exec cat /dev/zero"
    running = subprocess.Popen([sys.executable, "-c", script, endless], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert said.decode().strip().splitlines()[-1] == "KeyboardInterrupt" and left(cache) == []


def test_patience_doubles():
    patience, slept = dataclasses.replace(QUICK, pause=1.0), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", slept.append)
        for failures in range(1, 9):
            patience.wait(failures)
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]
