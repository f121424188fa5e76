"""What a run shows while it goes, and what it stops for: trackers, explanations, early stopping, several sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bcosify.align import log, trackers
from bcosify.align.callbacks import EarlyStopping
from bcosify.align.pictures import Pictures
from bcosify.align.recipe import Phase
from bcosify.align.schedule import arrived
from bcosify.align.sheets import explained_pictures
from bcosify.align.state import Progress
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import load
from bcosify.convert.output import OutputKind
from bcosify.core.errors import BcosifyError
from bcosify.data.bad import BadSamples
from bcosify.data.index import index_shards
from bcosify.data.loader import held_out_batches
from bcosify.data.names import expand
from bcosify.data.views import size_at, to_model_input
from bcosify.explain import explain
from PIL import Image
from safetensors.torch import load_file

from runs import CNN_PHASES, RECIPE, rows

END_TO_END = Phase("end-to-end", 40, 1e-3)
# Ten steps; the student starts as its teacher and has nothing to gain, so the first evaluation is the best.
RESTLESS = Phase("end-to-end", 40, 0.1, b=(1.0, 1.0), beta=(1.0, 1.0), warmup=0.0, patience=2)


class Crash(Exception):
    pass


def crashed_and_resumed(monkeypatch, run: Path, shards: Path, out: Path, recipe, at: int, **options) -> dict:
    """A run that dies after step `at`, and goes on from its last checkpoint."""
    plain = log.PhaseLog.step

    def step(self, progress, losses, norm):
        plain(self, progress, losses, norm)
        if progress.step == at:
            raise Crash

    config = AlignConfig(run, str(shards), out, recipe, quiet=True, **options)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(log.PhaseLog, "step", step)
        align(config)
    return align(dataclasses.replace(config, resume=True))


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours_, theirs_ = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert ours_.keys() == theirs_.keys()
    assert all(torch.equal(ours_[name], theirs_[name]) for name in ours_)


# ------------------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_shows_the_rows_once_also_after_a_resume(run, shards, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = dataclasses.replace(RECIPE, phases=(END_TO_END,), probe_pictures=2, probe_every=20)
    crashed_and_resumed(monkeypatch, run, shards, tmp_path / "x", recipe, 8, trackers=("tensorboard",))
    shown = EventAccumulator(str(tmp_path / "x.run/trackers/bcosify"), {"images": 0, "scalars": 0}).Reload()
    written = [row for row in rows(tmp_path / "x") if "loss" in row]
    losses = shown.Scalars("train/loss")
    assert [event.step for event in losses] == [row["step"] for row in written] == list(range(1, 11))
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in written], rel=1e-6)
    assert [event.step for event in shown.Scalars("held_out/centred_cosine")] == [0, 10]
    pictures = shown.Images("explanations")
    assert [event.step for event in pictures] == [0, 5, 10]
    with Image.open(tmp_path / "x.run/explanations/00000040.png") as sheet:
        assert (pictures[-1].width, pictures[-1].height) == sheet.size


def test_a_tracker_that_cannot_be_had_is_refused_before_anything_is_written(run, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    for name, said in (("wandb", "not installed.*pip install wandb"), ("tensorbord", "Did you mean 'tensorboard'")):
        with pytest.raises(BcosifyError, match=said):
            align(AlignConfig(run, str(shards), tmp_path / "x", RECIPE, quiet=True, trackers=(name,)))
    assert not list(tmp_path.iterdir())


def test_what_a_tracker_says_when_it_refuses_is_not_repeated(tmp_path):
    class Refusing:
        log_with = ("wandb",)
        is_main_process = True

        def init_trackers(self, *_):
            raise RuntimeError("key 0123secret is wrong")

    with pytest.raises(BcosifyError, match=r"wandb: it could not be started \(RuntimeError\)") as caught:
        trackers.start_trackers(Refusing(), RECIPE, tmp_path / "x", tmp_path / "x.run", Progress(0, 0, "d"))  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_every_tracker_gets_numbers_and_pictures_in_the_shape_it_takes():
    row = {"step": 3, "loss": 0.5, "objective": "end-to-end", "gradient_norm": None}
    assert trackers.scalars(row) == {"train/step": 3, "train/loss": 0.5}
    assert trackers.scalars({"held_out": {"raw_cosine": 0.25, "phase": "start"}}) == {"held_out/raw_cosine": 0.25}
    seen = []
    tracker = SimpleNamespace(name="wandb", log_images=lambda values, step, **options: seen.append((values, step)))
    picture = Image.new("RGB", (4, 2), "red")
    trackers.log_picture(SimpleNamespace(trackers=[tracker]), "sheet", picture, 7)  # type: ignore[arg-type]
    (values, step) = seen[0]
    assert step == 7 and np.array_equal(values["sheet"][0], np.asarray(picture))


# --------------------------------------------------------------------------------------------------------- explanations


@pytest.mark.parametrize("model", ["run", "cnn"])
def test_explanations_do_not_touch_the_training(model, shards, tmp_path, request):
    """Not even where the student's blocks are run again (ViT) or its BatchNorms learn from the batches (CNN)."""
    phase = END_TO_END if model == "run" else dataclasses.replace(CNN_PHASES[0], pictures=32)
    recipe = dataclasses.replace(RECIPE, phases=(phase,), gradient_checkpointing=model == "run")
    shown = dataclasses.replace(recipe, probe_pictures=3, probe_every=12)
    for name, wanted in (("without", recipe), ("with", shown)):
        config = AlignConfig(request.getfixturevalue(model), str(shards), tmp_path / name, wanted, quiet=True)
        align(config)
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without.run/explanations").exists()
    sheets = sorted(path.name for path in (tmp_path / "with.run/explanations").iterdir())
    end = phase.pictures
    assert sheets == [f"{count:08d}.png" for count in sorted({0, *range(12, end, 12), end})]
    first, last = (np.asarray(Image.open(tmp_path / "with.run/explanations" / sheets[i])) for i in (0, -1))
    assert first.shape == last.shape and not np.array_equal(first, last)


@pytest.mark.parametrize("embedding", [False, True])
def test_a_probe_explains_the_teachers_answer_and_leaves_nothing_behind(run, shards, tmp_path, embedding):
    student = load(run)
    index = index_shards(expand(str(shards)), progress=False)
    recipe, here = dataclasses.replace(RECIPE, probe_pictures=2), SimpleNamespace(device=torch.device("cpu"))
    held_out = Pictures(recipe, here, student.preprocess, index, index, BadSamples(index, tmp_path / "bad"))  # type: ignore[arg-type]
    labels = None if embedding else tuple(f"class {i}" for i in range(student.model.num_classes))  # type: ignore[arg-type]
    output = OutputKind("features") if labels is None else OutputKind("classes", len(labels), labels)
    probe = explained_pictures(student.model, held_out, output)
    pictures = torch.cat([batch.pictures for batch in held_out_batches(index, size=64)])
    assert torch.equal(probe.shown, pictures[:2])
    with torch.no_grad():
        outputs = student.model(to_model_input(pictures, student.preprocess.mean, student.preprocess.std))
    if embedding:
        centred = outputs - outputs.mean(0)
        expected = (outputs * torch.nn.functional.normalize(centred)).sum(1)[:2]
    else:
        expected = outputs.max(1).values[:2]
        assert probe.captions == tuple(f"class {i}" for i in outputs.argmax(1)[:2].tolist())
    scores = explain(student.model, probe.pictures, probe.target).scores[:, 0]
    assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-4)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    modes = [module.training for module in student.model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sheet = probe.write(student.model, tmp_path / "sheets/0.png")
    assert sheet is not None and Image.open(tmp_path / "sheets/0.png").size == sheet.size
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.model.state_dict().items())
    assert all(parameter.grad is None for parameter in student.model.parameters())
    assert modes == [module.training for module in student.model.modules()]
    # In half precision nothing adds up: that is said, and is no reason to stop.
    with pytest.warns(UserWarning, match="no explanations in .*the run goes on: .*cannot be explained exactly"):
        assert probe.write(student.model.half(), tmp_path / "sheets/1.png") is None
    assert not (tmp_path / "sheets/1.png").exists()


# ------------------------------------------------------------------------------------------------------- early stopping


def test_a_score_is_judged_against_the_best_before_it():
    stopping, best, seen = EarlyStopping(), 0, []
    for step, score in enumerate((0.2, 0.5, 0.5, float("nan"), 0.4, 0.6), start=1):
        best = step if stopping.better(score) else best
        seen.append((best, stopping.waited))
    assert seen == [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (6, 0)]
    stopping.begin(None)  # type: ignore[arg-type]
    assert stopping.score is None and stopping.waited == 0
    assert not stopping.better(float("nan")) and stopping.waited == 1


def test_nothing_is_judged_before_b_and_beta_are_at_their_ends():
    moving = Phase("end-to-end", 40, 1e-3, b=(1.0, 2.0), ramp=0.5)
    assert [arrived(moving, k, 10) for k in (0, 4, 5, 9)] == [False, False, True, True]
    assert arrived(END_TO_END, 0, 10)


def test_a_phase_that_no_longer_improves_ends_with_its_best_weights(run, shards, tmp_path, monkeypatch):
    """And so it does when it dies between the best evaluation and the last one, bit for bit."""
    after = dataclasses.replace(END_TO_END, pictures=12, b=(1.0, 1.0), beta=(1.0, 1.0), learning_rate=1e-9)
    recipe = dataclasses.replace(RECIPE, phases=(RESTLESS, after), evaluate_every=8, checkpoint_every=12)
    result = align(AlignConfig(run, str(shards), tmp_path / "whole", recipe, quiet=True))
    first = [point for point in result["curve"] if point["phase"] == 0]
    *measured, kept = first
    best = max(measured, key=lambda point: point["centred_cosine"])
    # Which evaluation is the best is for rounding to say; behind it there are as many as patience waits for.
    end = best["pictures"] + 16
    assert [point["pictures"] for point in measured] == list(range(8, end + 1, 8)) and end < 40
    assert kept == {**best, "pictures": end, "weights_of": best["pictures"]}
    assert result["pictures"] == end + 12
    second = [point for point in result["curve"] if point["phase"] == 1]
    assert second[-1]["centred_cosine"] == pytest.approx(best["centred_cosine"], abs=2e-4)  # it went on from there
    crashed_and_resumed(monkeypatch, run, shards, tmp_path / "parts", recipe, best["pictures"] // 4 + 3)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


# -------------------------------------------------------------------------------------------------------- several sizes


def test_a_step_has_one_size_whatever_came_before():
    drawn = [size_at((48, 64, 80), 3, step) for step in range(300)]
    assert drawn == [size_at((48, 64, 80), 3, step) for step in range(300)]
    assert all(80 <= drawn.count(size) <= 120 for size in (48, 64, 80))
    assert drawn != [size_at((48, 64, 80), 4, step) for step in range(300)]


def test_a_run_at_several_sizes_resumes_bit_for_bit(run, shards, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, phases=(END_TO_END,), image_sizes=(48, 64, 80))
    align(AlignConfig(run, str(shards), tmp_path / "whole", recipe, quiet=True))
    crashed_and_resumed(monkeypatch, run, shards, tmp_path / "parts", dataclasses.replace(recipe, workers=1), 7)
    ours, theirs = rows(tmp_path / "parts"), rows(tmp_path / "whole")
    assert ours == theirs
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
