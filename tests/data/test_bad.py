"""Broken pictures are counted, listed once, and stop a run where they are too many."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from bcosify.align.pictures import Pictures
from bcosify.core.errors import DataError
from bcosify.data.bad import BadSample, BadSamples
from bcosify.data.index import ShardIndex, index_shards

from batches import COUNT, train
from tars import simple_tar


def test_bad_samples_are_counted_and_listed_once(broken, tmp_path):
    index, ids = broken
    bad = BadSamples(index, tmp_path / "run" / "bad_samples.jsonl", limit=0.2)
    for batch in train(index, steps=18):
        bad.add(batch.bad)
    assert len(bad) == 4 and bad.share == 4 / COUNT
    lines = [json.loads(line) for line in bad.path.read_text().splitlines()]
    assert {line["key"] for line in lines} == {index.key(id) for id in ids} and len(lines) == 4
    assert all(line["shard"].endswith("bad.tar") and line["reason"] for line in lines)


def test_a_run_that_resumes_goes_on_counting(broken, tmp_path):
    index, _ = broken
    path = tmp_path / "bad_samples.jsonl"
    first, second = BadSamples(index, path, limit=1), None
    first.add([BadSample(0, "a", "s.tar", "x"), BadSample(1, "b", "s.tar", "y")])
    with path.open("a") as stream:
        stream.write('{"key": "cut he')  # a crash in the middle of a line
    second = BadSamples(index, path, limit=1)
    assert len(second) == 2
    second.add([BadSample(0, "a", "s.tar", "x"), BadSample(1, "b", "s.tar", "y")])
    assert len(second) == 2 and len(path.read_text().splitlines()) == 3


def test_too_many_bad_samples_stop(broken, tmp_path):
    index, _ = broken
    bad = BadSamples(index, tmp_path / "bad_samples.jsonl", limit=3 / COUNT)
    bad.add([BadSample(i, str(i), "s.tar", "x") for i in range(3)])
    with pytest.raises(DataError, match=r"4 of 24 pictures \(16\.67%\) .* limit is 12\.50%.*bad_samples\.jsonl"):
        bad.add([BadSample(3, "3", "s.tar", "x")])
    assert len(bad.path.read_text().splitlines()) == 4


def test_no_bad_sample_makes_no_list(index, tmp_path):
    bad = BadSamples(index, tmp_path / "bad_samples.jsonl", limit=0)
    bad.add([])
    assert not bad.path.exists()


def test_a_picture_is_counted_once_wherever_its_shard_lies(folder, tmp_path):
    """Shards of several folders may have the same names and keys; a resumed run may find them in another place."""
    path = tmp_path / "bad_samples.jsonl"
    here, there = (
        index_shards([simple_tar(tmp_path / place / part / "0.tar", 3) for part in "ab"]) for place in ("here", "there")
    )
    assert here.digest == there.digest

    def broken(index: ShardIndex) -> list[BadSample]:
        return [BadSample(i, index.key(i), index.file(i).path, "x") for i in (0, 3)]

    bad = BadSamples(here, path, limit=1)
    bad.add(broken(here))
    assert len(bad) == 2  # one key and one name of a shard, but two pictures
    resumed = BadSamples(there, path, limit=1)
    resumed.add(broken(there))
    assert len(resumed) == 2 and len(path.read_text().splitlines()) == 2


def test_lists_of_older_versions_count_too(folder, tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"key": "k0001", "shard": "/elsewhere/a.tar", "reason": "x"}\n')
    index = index_shards([simple_tar(tmp_path / "a.tar", 3)])
    bad = BadSamples(index, path, limit=1)
    bad.add([BadSample(1, "k0001", index.file(1).path, "x")])
    assert len(bad) == 1 and len(path.read_text().splitlines()) == 1
    bad.add([BadSample(2, "k0002", index.file(2).path, "x")])
    assert len(bad) == 2


def test_all_processes_count_the_same_and_one_lists_them(index, tmp_path, monkeypatch):
    """What each of two processes has met, gathered as accelerate does."""
    met = [[BadSample(i, str(i), "s.tar", "x") for i in ids] for ids in ([0, 1, 2], [2, 3])]
    monkeypatch.setattr("bcosify.align.pictures.gather_object", lambda mine: [*met[0], *met[1]])
    ranks = []
    for rank in range(2):
        bad = BadSamples(index, tmp_path / "bad.jsonl", limit=3 / COUNT, writes=rank == 0)
        accelerator: Any = SimpleNamespace(num_processes=2)
        ranks.append(Pictures(None, accelerator, None, index, index, bad))  # type: ignore[arg-type]
    for pictures, mine in zip(ranks, met, strict=True):
        pictures.note(mine)
        assert len(pictures.bad) == 0 and pictures.noted == mine
    for pictures in ranks:
        with pytest.raises(DataError, match="4 of 24 pictures"):
            pictures.share_noted()
        assert len(pictures.bad) == 4 and not pictures.noted
    lines = [json.loads(line)["id"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert lines == [0, 1, 2, 3]
