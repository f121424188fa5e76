"""Two real processes under accelerate see, step by step, exactly what one process sees: indexed and as a stream."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from bcosify.data.index import index_shards
from bcosify.data.loader import training_batches
from bcosify.data.names import expand
from bcosify.data.stream import Stream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

SIZES = (5, 1, 4, 3)  # 13 pictures: neither shards nor pictures divide by two processes or by the batch
STEPS, BATCH = 10, 4

RANK = """
import json, sys
from accelerate import Accelerator
sys.path.insert(0, sys.argv[1])
from test_processes import seen, sources
if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    assert world == 2
    found = {name: seen(source, rank, world, workers=1) for name, source in sources(sys.argv[2]).items()}
    open(f"{sys.argv[3]}/{rank}.json", "w").write(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()
"""


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (10, 12, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


PICTURES = [picture(i) for i in range(40)]


def write(folder: Path, sizes: tuple[int, ...] | list[int]) -> Path:
    """Shards of so many pictures, all different."""
    number = 0
    for i, size in enumerate(sizes):
        with tarfile.open(folder / f"{i:02d}.tar", "w") as archive:
            for _ in range(size):
                info = tarfile.TarInfo(f"{number:03d}.png")
                info.size = len(PICTURES[number])
                archive.addfile(info, io.BytesIO(PICTURES[number]))
                number += 1
    return folder


def sources(data: str) -> dict:
    return {"index": index_shards(expand(data)), "stream": Stream(expand(data), buffer=4)}


def seen(source, rank: int = 0, world: int = 1, workers: int = 0, **changes) -> list[list[tuple[int, str]]]:
    """For each step, id and content of each picture."""
    wanted = {"seed": 5, "global_batch": BATCH, "steps": STEPS, "size": 8} | changes
    batches = list(training_batches(source, rank=rank, world_size=world, workers=workers, **wanted))
    if isinstance(source, Stream):
        source.close()
    return [
        [
            (id, hashlib.sha256(view.numpy().tobytes()).hexdigest())
            for id, view in zip(batch.ids.tolist(), batch.pictures, strict=True)
        ]
        for batch in batches
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("BCOSIFY_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_two_processes_see_what_one_sees(tmp_path):
    """With a worker each, against one process without."""
    (tmp_path / "shards").mkdir()
    data = str(write(tmp_path / "shards", SIZES))
    (tmp_path / "rank.py").write_text(RANK)
    config = Path(__file__).resolve().parents[2] / "recipes/accelerate/cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    subprocess.run(
        [*launch, str(tmp_path / "rank.py"), str(Path(__file__).parent), data, str(tmp_path)],
        check=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
    )  # fmt: skip
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name, source in sources(data).items():
        one = seen(source)
        two = [[tuple(item) for rank in ranks for item in rank[name][step]] for step in range(STEPS)]
        assert two == one
        ids = [id for step in one for id, _ in step]
        if name == "index":  # an epoch is 3 steps of 4: none of 13 pictures twice, one is left for other epochs
            for begin in range(0, 36, 12):
                assert len(set(ids[begin : begin + 12])) == 12
            assert set(ids) == set(range(13))
        else:
            assert ids == list(range(STEPS * BATCH))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_any_shards_and_any_processes_show_the_same_pictures(tmp_path_factory, sizes, world, share, first_step):
    """Real tars, decoded: the ranks' slices of each step are one process's batch, and an epoch shows none twice."""
    folder = write(tmp_path_factory.mktemp("shards"), sizes)
    count, batch = sum(sizes), world * share
    kinds = ["index", "stream"] if batch <= count else ["stream"]  # an index refuses a batch that it cannot fill
    for kind in kinds:
        wanted = {"global_batch": batch, "steps": 4, "first_step": first_step}
        one = seen(sources(str(folder))[kind], **wanted)
        ranks = [seen(sources(str(folder))[kind], rank, world, **wanted) for rank in range(world)]
        assert [[item for rank in ranks for item in rank[step]] for step in range(4)] == one
        if kind == "index":
            per_epoch = count // batch
            for epoch in range(first_step // per_epoch, (first_step + 3) // per_epoch + 1):
                steps = [s for s in range(4) if (first_step + s) // per_epoch == epoch]
                ids = [id for s in steps for id, _ in one[s]]
                assert len(ids) == len(set(ids))
