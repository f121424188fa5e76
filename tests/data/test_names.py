"""Naming shards: patterns, globs, folders, remote sources, and what is said where they name nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from bcosify.core.errors import DataError
from bcosify.data.names import expand


@pytest.fixture
def three(tmp_path) -> Path:
    for i in range(3):
        (tmp_path / f"train-{i:05d}.tar").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    ["{}/train-{{00000..00002}}.tar", "{}/*.tar", "{}", "{0}/train-00000.tar::{0}/train-0000[12].tar", "file:{}/*.tar"],
)
def test_expand_takes_every_way_to_name_shards(three, pattern):
    assert [path.name for path in expand(pattern.format(three))] == [f"train-{i:05d}.tar" for i in range(3)]


def test_expand_takes_lists_in_their_order_and_each_shard_once(three):
    names = [path.name for path in expand([three / "train-00002.tar", f"{three}/*.tar"])]
    assert names == ["train-00002.tar", "train-00000.tar", "train-00001.tar"]


def test_expand_takes_a_name_that_exists_as_it_is(tmp_path):
    path = tmp_path / "odd{1,2}[x]::name.tar"
    path.touch()
    assert expand(str(path)) == [path]


def test_expand_says_which_shards_are_missing(three):
    with pytest.raises(DataError, match=r"2 of 5 shards do not exist: .*train-00003.tar.*holds 3 \.tar files"):
        expand(f"{three}/train-{{00000..00004}}.tar")


def test_expand_names_the_near_miss(three):
    with pytest.raises(DataError, match=r"No shard .*trian-00001.tar.*Did you mean 'train-00001.tar'"):
        expand(f"{three}/trian-00001.tar")


def test_expand_says_that_the_folder_is_missing(tmp_path):
    with pytest.raises(DataError, match="There is no folder .*nowhere"):
        expand(f"{tmp_path}/nowhere/a.tar")


def test_expand_leaves_remote_shards_as_they_are_spelt(three):
    data = [f"http://host/{{0..1}}.tar?v=2::pipe:cat {three}/train-{{00000..00001}}.tar | cat", three]
    assert expand(data) == [
        "http://host/0.tar?v=2",
        "http://host/1.tar?v=2",
        f"pipe:cat {three}/train-00000.tar | cat",
        f"pipe:cat {three}/train-00001.tar | cat",
        *sorted(three.glob("*.tar")),
    ]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("s3://b/a.tar", r"s3:// are not supported; .* Read it as 'pipe:aws s3 cp s3://b/a.tar -'"),
        ("htps://b/a.tar", "htps:// are not supported; .* Did you mean 'https'"),
        ("pipe: ", "names no command"),
        ("https:///a.tar", "a URL is https://HOST/PATH"),
        ("https://me:secret@host/a.tar?key=hidden", "password is needed: 'pipe:curl"),
    ],
)
def test_expand_refuses_what_it_cannot_read(source, says):
    with pytest.raises(DataError, match=says) as caught:
        expand(source)
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["", [], "a{0..1.tar", "${NOT_SET_ANYWHERE}/a.tar"])
def test_expand_refuses_what_is_no_pattern(pattern):
    with pytest.raises(DataError):
        expand(pattern)


def test_a_folder_of_pictures_is_told_how_to_become_shards(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=r"no \.tar files \(it holds: 1 \.jpg\).*bcosify shards"):
        expand(tmp_path)
