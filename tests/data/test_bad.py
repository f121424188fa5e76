"""Broken pictures are counted, listed once, and stop a run where they are too many."""

from __future__ import annotations

import json

import pytest
from bcosify.core.errors import DataError
from bcosify.data.bad import BadSample, BadSamples

from batches import COUNT, train


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
