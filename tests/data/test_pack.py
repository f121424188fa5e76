"""Folders of pictures become shards."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from bcosify.cli.shards import shards as shards_verb
from bcosify.core.errors import CheckpointError, DataError, OptionError
from bcosify.data.index import index_shards
from bcosify.data.names import expand
from bcosify.data.pack import write_shards
from bcosify.data.pictures import PictureWarning, decode
from PIL import Image

from exif import CAT, DAMAGED, jpeg_with_exif, png_with_exif
from tars import samples_of


def test_written_shards_hold_the_pictures(photos, tmp_path):
    written = write_shards(photos, tmp_path / "out", size=64, per_shard=2)
    assert (written.pictures, written.shards) == (5, 3)
    assert [item.path for item in written.skipped] == ["broken.jpg", "text.png"]
    assert "truncated" in written.skipped[0].reason
    paths = expand(tmp_path / "out")
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert written.bytes == sum(path.stat().st_size for path in paths)
    index = index_shards(paths)
    samples = [sample for path in paths for sample in samples_of(path)]
    assert [sample["__key__"] for sample in samples] == ["a_b/camera", "a_b/rocket", "cat_1", "coffee", "small"]
    assert [index.read(i) for i in range(5)] == [sample["jpg"] for sample in samples]
    sizes = [decode(sample["jpg"]).size for sample in samples]
    assert sizes == [(64, 64), (96, 64), (96, 64), (96, 64), (30, 40)]
    cat = np.asarray(decode(samples[2]["jpg"]), float)
    expected = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((96, 64), Image.Resampling.BICUBIC), float)
    assert np.abs(cat - expected).mean() < 4
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["broken.jpg", "text.png"]


def test_the_same_pictures_give_the_same_bytes(photos, tmp_path):
    write_shards(photos, tmp_path / "one", size=64)
    for path in photos.rglob("*"):
        os.utime(path, (1, 1))
    shutil.copytree(photos, tmp_path / "elsewhere")
    write_shards(tmp_path / "elsewhere", tmp_path / "two", size=64)
    assert (tmp_path / "one" / "00000.tar").read_bytes() == (tmp_path / "two" / "00000.tar").read_bytes()


def test_a_jpeg_that_needs_no_change_is_copied(photos, tmp_path):
    write_shards(photos, tmp_path / "out", size=None)
    samples = {sample["__key__"]: sample["jpg"] for sample in samples_of(tmp_path / "out" / "00000.tar")}
    assert samples["coffee"] == (photos / "coffee.jpeg").read_bytes()
    assert decode(samples["cat_1"]).size == (451, 300)
    camera = Image.open(io.BytesIO(samples["a_b/camera"]))
    assert camera.mode == "RGB" and camera.format == "JPEG"


def test_a_turned_jpeg_is_stored_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "in" / "a.jpg", exif=exif)
    write_shards(tmp_path / "in", tmp_path / "out", size=None)
    (sample,) = samples_of(tmp_path / "out" / "00000.tar")
    stored = Image.open(io.BytesIO(sample["jpg"]))
    assert stored.size == (300, 451) and stored.getexif().get(0x0112, 1) == 1


def test_a_picture_with_damaged_exif_is_packed_without_it(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg_with_exif(DAMAGED))
    (tmp_path / "in" / "b.png").write_bytes(png_with_exif(b"text"))
    with pytest.warns(PictureWarning, match="EXIF is damaged"):
        written = write_shards(tmp_path / "in", tmp_path / "out", size=None)
    assert written.pictures == 2 and not written.skipped
    for sample in samples_of(tmp_path / "out" / "00000.tar"):
        stored = Image.open(io.BytesIO(sample["jpg"]))
        assert stored.size == CAT.shape[1::-1] and 0x0112 not in stored.getexif()


def test_keys_are_unique_and_survive_webdataset(tmp_path):
    names = [
        "a.jpg",
        "a.png",
        "a-2.png",
        "x.y.jpg",
        "x_y.jpg",
        "__m__.jpg",
        "ü ß.jpg",
        "...jpg",
        "d.e/f g.jpg",
        "n" * 150 + ".jpg",
    ]
    for name in names:
        path = tmp_path / "100% in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")
    written = write_shards(tmp_path / "100% in", tmp_path / "100%d out")
    keys = [sample["__key__"] for sample in samples_of(Path(written.out) / "00000.tar")]
    assert len(keys) == len(set(keys)) == written.pictures == len(names) - 1  # "...jpg" is hidden
    assert not any("." in key or " " in key for key in keys)
    assert len(index_shards(expand(written.out))) == len(keys)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="holds no pictures .it holds: no files"):
        write_shards(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.txt").touch()
    with pytest.raises(DataError, match="it holds: 1 .txt"):
        write_shards(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="is no folder"):
        write_shards(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in" / "a.jpg").write_text("x")
    with pytest.raises(DataError, match=r"None of the 1 pictures .* can be read. The first is a\.jpg"):
        write_shards(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_an_existing_folder_is_kept_unless_told(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        write_shards(photos, out)
    assert os.listdir(out) == ["mine"]
    with pytest.raises(CheckpointError, match="was not written by this command.*Nothing was written"):
        write_shards(photos, out, overwrite=True)
    assert os.listdir(out) == ["mine"]
    (out / "mine").unlink()
    write_shards(photos, out, size=32, overwrite=True)
    write_shards(photos, out, size=32, overwrite=True)
    assert sorted(os.listdir(out)) == ["00000.tar", "skipped.jsonl"]


@pytest.mark.parametrize("wrong", [{"size": 0}, {"per_shard": 0}, {"quality": 0}, {"quality": 101}])
def test_numbers_out_of_range_are_refused(photos, tmp_path, wrong):
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}: must be (at least 1|between 1 and 100); got"):
        write_shards(photos, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_the_verb_returns_its_result_and_leaves_stdout_to_the_command(photos, tmp_path, capsys):
    result = shards_verb(photos, tmp_path / "out", size=32, json=True)
    printed = capsys.readouterr()
    assert printed.out == "" and json.loads(json.dumps(result))["pictures"] == 5
    assert "5 pictures in 1 shards" in printed.err and "broken.jpg" in printed.err
