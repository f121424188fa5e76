"""The loop itself, on a tiny model and real photographs: same seed same losses, killed and resumed, two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from bcosify.align import compiling, log, state
from bcosify.align.objectives import OBJECTIVES, observe
from bcosify.align.optimizers import make_optimizer, scales
from bcosify.align.phases import Stepper
from bcosify.align.pictures import Pictures
from bcosify.align.recipe import Phase, dump, from_values, list_recipes, load_recipe
from bcosify.align.run import Learner
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import check_teacher, load, set_strength
from bcosify.convert.memory import laid_out
from bcosify.convert.original import teacher_of
from bcosify.core.errors import BcosifyError, CheckpointError, DataError, RecipeError, SourceError
from bcosify.core.pictures import noise_pictures
from safetensors.torch import load_file

from runs import CNN_PHASES, CNN_RECIPE, PHASES, RECIPE, aligned, rows

# Everything that a checkpoint must carry beside weights and moments.
MUON_RECIPE = dataclasses.replace(
    RECIPE,
    phases=(
        PHASES[0],
        dataclasses.replace(PHASES[1], optimizer="muon", adaptive_clip=0.01, settings={"weight_norm": 1.0}),
    ),
    average=0.9,
)

# All that views can be.
VIEWS_RECIPE = dataclasses.replace(CNN_RECIPE, turn=20, colour=0.4, mixup=0.4, cutmix=0.4)


def test_same_seed_same_losses_and_student_learns(run, shards, tmp_path):
    first, second = (aligned(run, shards, tmp_path / name) for name in ("a", "b"))
    assert first == second
    other = aligned(run, shards, tmp_path / "c", dataclasses.replace(RECIPE, seed=1))
    assert [r["loss"] for r in other if "loss" in r] != [r["loss"] for r in first if "loss" in r]
    losses = [row["loss"] for row in first if row.get("objective") == "block-local" and "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert load_file(tmp_path / "a/model.safetensors").keys() == load_file(tmp_path / "b/model.safetensors").keys()
    student = load(tmp_path / "a")
    assert student.history.alignment.pictures == 80
    assert student.history.alignment.curve[0]["raw_cosine"] == pytest.approx(1, abs=1e-4)


def test_the_student_keeps_the_size_that_it_was_trained_at(run, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, image_size=48, phases=(dataclasses.replace(PHASES[1], pictures=4),))
    aligned(run, shards, tmp_path / "out", recipe)
    before, after = load(run).preprocess, load(tmp_path / "out").preprocess
    assert before.size == (64, 64) and after == before.at(48)
    found = load(tmp_path / "out")
    conversion = found.history.conversion
    assert conversion.size == (64, 64)  # by which its teacher is known again, here and where a folder does not say it
    older = found.with_history(conversion=dataclasses.replace(conversion, size=None))
    teacher = SimpleNamespace(model=teacher_of(load(run)), preprocess=before)
    for student in (found, older):
        check_teacher(student, teacher)
    other = dataclasses.replace(conversion, teacher=tuple(-value for value in conversion.teacher))
    for size in ((64, 64), None):
        with pytest.raises(SourceError, match="is not the teacher"):
            check_teacher(found.with_history(conversion=dataclasses.replace(other, size=size)), teacher)


def test_batch_statistics_are_learned_from_the_batches_and_saved(cnn, shards, tmp_path):
    aligned(cnn, shards, tmp_path / "out", CNN_RECIPE)
    before, after = (load_file(path / "model.safetensors") for path in (cnn, tmp_path / "out"))
    moved = [key for key in before if key.endswith("running_var") and not torch.equal(before[key], after[key])]
    assert len(moved) == sum(key.endswith("running_var") for key in before) > 0
    student = load(tmp_path / "out")
    assert not any(module.training for module in student.model.modules())


def test_workers_do_not_change_the_run(run, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, phases=PHASES[:1])
    expected = aligned(run, shards, tmp_path / "0", recipe)
    assert aligned(run, shards, tmp_path / "2", dataclasses.replace(recipe, workers=2)) == expected


ALIGN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bcosify.align import log, trainer
from bcosify.align.recipe import load_recipe
kill_at = int(sys.argv[5])
plain = log.PhaseLog.step
def step(self, progress, losses, norm):
    plain(self, progress, losses, norm)
    if progress.step == kill_at:
        os.kill(os.getpid(), getattr(signal, sys.argv[6]))
log.PhaseLog.step = step
run, data, out, recipe = sys.argv[1:5]
trainer.align(trainer.AlignConfig(Path(run), data, Path(out), load_recipe(recipe), quiet=True))
"""


@pytest.mark.parametrize(
    ("model", "wanted", "kill_at"),
    [("run", RECIPE, 7), ("run", MUON_RECIPE, 12), ("cnn", VIEWS_RECIPE, 12)],
    ids=["vit-first-phase", "vit-second-phase-muon-average", "cnn-mixed-views"],
)  # five steps a checkpoint, ten steps a phase
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(model, wanted, kill_at, shards, tmp_path, request):
    run, recipe = request.getfixturevalue(model), tmp_path / "recipe.yaml"
    recipe.write_text(dump(wanted))

    def call(out: str, kill: int, name: str = "SIGKILL") -> int:
        """In a process of its own, which a signal ends."""
        arguments = [str(run), str(shards), str(tmp_path / out), str(recipe), str(kill), name]
        return subprocess.run([sys.executable, "-c", ALIGN, *arguments], timeout=200).returncode

    def finish(out: str, resume: bool) -> None:
        align(AlignConfig(run, str(shards), tmp_path / out, load_recipe(str(recipe)), quiet=True, resume=resume))

    finish("whole", False)
    assert call("parts", kill_at) == -signal.SIGKILL
    assert not (tmp_path / "parts").exists()
    newest = tmp_path / "parts.run/checkpoints/step-00000015"
    newest.mkdir()  # a half-written newest checkpoint: no COMPLETE marker
    (newest / "student.safetensors").write_bytes(b"half")
    finish("parts", True)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    # Told to stop, a run writes a checkpoint of that very step, ends with 0, and goes on from there.
    assert call("polite", kill_at, "SIGTERM") == 0 and not (tmp_path / "polite").exists()
    assert state.latest(tmp_path / "polite.run/checkpoints")[1].step == kill_at
    finish("polite", True)
    assert rows(tmp_path / "polite") == rows(tmp_path / "whole")
    whole, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts", "polite"))
    assert all(torch.equal(whole[name], other[name]) for other in others for name in whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_in_channels_last_is_exact(cnn, tmp_path, optimizer):
    """Written in torch's own format and read back into the model's, weights, average and moments."""
    phase = dataclasses.replace(CNN_PHASES[0], optimizer=optimizer)
    pictures = noise_pictures(4, (64, 64)).contiguous(memory_format=torch.channels_last)

    def made():
        student = load(cnn)
        laid_out(student.model)
        set_strength(student.model, b=1.5, beta=1)
        learner = Learner(student, 0.5, torch.device("cpu"))
        return learner, make_optimizer(learner.model, phase, CNN_RECIPE, scales(learner.model, True))

    def train(learner, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            learner.model(pictures).square().mean().backward()
            optimizer.step()
            learner.stepped()

    learner, moments = made()
    learner.begin()
    train(learner, moments, 2)
    checkpoint = state.write(tmp_path, learner.model, moments, state.Progress(2, 0, ""), learner.average)
    again, restored = made()
    again.restore(checkpoint)
    state.restore_optimizer(checkpoint, restored)
    for ours, theirs in ((again.model, learner.model), (again.average, learner.average)):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.stride() == other.stride() and torch.equal(one, other)
    assert any(p.dim() == 4 and not p.is_contiguous() for p in again.model.parameters())
    for index, part in moments.state_dict()["state"].items():
        for name, value in part.items():
            found = restored.state_dict()["state"][index][name]
            assert found == value if isinstance(value, bool) else torch.equal(found, value)
            assert isinstance(value, bool) or found.stride() == value.stride()
    train(learner, moments, 2)
    train(again, restored, 2)
    for one, other in zip(again.model.parameters(), learner.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model", ["run", "cnn"])
def test_convolutional_networks_run_channels_last(model, shards, tmp_path, request, monkeypatch):
    """Teacher, student and pictures of a CNN, in every step; a ViT's stay as they were."""
    found, plain = [], Stepper.take

    def take(self, k, batch):
        models = (self.run.teacher, self.prepared.model, self.run.learner.result)
        weights = [m.weight for one in models for m in one.modules() if isinstance(m, torch.nn.Conv2d)]
        for tensor in (*weights, self.run.pictures.normalised(batch.pictures)):
            if tensor.shape[1] > 1 and tensor.shape[2] > 1:
                found.append(tensor.is_contiguous(memory_format=torch.channels_last))
        return plain(self, k, batch)

    monkeypatch.setattr(Stepper, "take", take)
    phases = (dataclasses.replace(PHASES[1], pictures=8),)
    aligned(request.getfixturevalue(model), shards, tmp_path / "out", dataclasses.replace(RECIPE, phases=phases))
    assert set(found) == {model == "cnn"}
    assert all(tensor.is_contiguous() for tensor in load(tmp_path / "out").model.parameters())


@pytest.mark.parametrize(
    ("model", "phases"),
    [("run", (dataclasses.replace(PHASES[1], calibrate=8),)), ("cnn", CNN_PHASES)],
    ids=["vit", "cnn"],
)
def test_two_processes_see_the_same_batches(model, phases, shards, tmp_path, request):
    """`accelerate launch` on two CPU processes: the same global batches (and statistics), so nearly the same losses."""
    run, recipe = request.getfixturevalue(model), dataclasses.replace(RECIPE, phases=phases)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    command = ["-m", "bcosify.cli", "align", str(run), "--data", str(shards), "--recipe", str(tmp_path / "recipe.yaml")]
    config = Path(__file__).resolve().parents[2] / "recipes/accelerate/cpu.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *launch, *command, "--out", str(tmp_path / "two")],
        check=True, timeout=280, env=environment, capture_output=True,
    )  # fmt: skip
    one = aligned(run, shards, tmp_path / "one", recipe)
    two = rows(tmp_path / "two")
    assert [rows_[0]["run"]["processes"] for rows_ in (one, two)] == [1, 2]
    assert [row.get("step") for row in one] == [row.get("step") for row in two]
    losses = [(ours["loss"], theirs["loss"]) for ours, theirs in zip(one, two, strict=True) if "loss" in ours]
    assert losses[0][1] == pytest.approx(losses[0][0], rel=1e-5)
    # Rounding grows from step to step: Adam's first steps are signs of gradients, however small these are.
    assert all(theirs == pytest.approx(ours, rel=1e-3) for ours, theirs in losses)


def test_teacher_and_student_see_the_same_mixture_and_gains_see_none(cnn, shards, tmp_path, monkeypatch):
    found, plain = [], Stepper._backward

    def noted(self, pictures):
        taken = []
        models = (self.run.teacher, self.prepared.model)
        hooks = [model.register_forward_pre_hook(lambda _, args: taken.append(args[0].clone())) for model in models]
        losses = plain(self, pictures)
        for hook in hooks:
            hook.remove()
        found.append((self.gain_pictures, *taken))
        return losses

    monkeypatch.setattr(Stepper, "_backward", noted)
    phases = (dataclasses.replace(PHASES[1], pictures=16, calibrate=8),)
    gains = {}
    for mixup in (0.0, 1.0):
        found.clear()
        recipe = dataclasses.replace(RECIPE, phases=phases, mixup=mixup)
        aligned(cnn, shards, tmp_path / str(mixup), recipe)
        for gain_pictures, theirs, ours in found:
            assert torch.equal(theirs, ours)
            gains[mixup] = gain_pictures, ours
    assert torch.equal(gains[0.0][0], gains[1.0][0]) and not torch.equal(gains[0.0][1], gains[1.0][1])


def test_resume_refuses_another_recipe_and_other_data(run, shards, tmp_path):
    aligned(run, shards, tmp_path / "x", dataclasses.replace(RECIPE, phases=PHASES[:1]))
    with pytest.raises(RecipeError, match="learning_rate: 0.5"):
        changed = (dataclasses.replace(PHASES[0], learning_rate=0.5),)
        aligned(run, shards, tmp_path / "x", dataclasses.replace(RECIPE, phases=changed), resume=True, overwrite=True)
    with pytest.raises(CheckpointError, match="no run"):
        aligned(run, shards, tmp_path / "nothing", resume=True)
    with pytest.raises(CheckpointError, match="exists already"):
        aligned(run, shards, tmp_path / "x")
    one_shard = shards / "00000.tar"
    shutil.rmtree(tmp_path / "x")  # a finished run only says that it is finished
    with pytest.raises(RecipeError, match="not the data"):
        aligned(
            run, one_shard, tmp_path / "x", dataclasses.replace(RECIPE, phases=PHASES[:1]), resume=True, overwrite=True
        )


def test_resuming_with_other_libraries_is_said(run, shards, tmp_path):
    aligned(run, shards, tmp_path / "x", dataclasses.replace(RECIPE, phases=PHASES[:1]))
    shutil.rmtree(tmp_path / "x")
    for path in (tmp_path / "x.run/checkpoints").glob("step-*/state.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "versions": {**record["versions"], "torch": "1.0"}}))
        (path.parent / "COMPLETE").write_text("")  # as checkpoints had it before it held sizes
    with pytest.warns(UserWarning, match=r"no longer bit for bit: torch 1.0 -> "):
        aligned(run, shards, tmp_path / "x", dataclasses.replace(RECIPE, phases=PHASES[:1]), resume=True)


def test_a_batch_in_parts_has_the_same_gradient(run, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, phases=(dataclasses.replace(PHASES[1], pictures=12),))
    whole, parts = (aligned(run, shards, tmp_path / str(n), dataclasses.replace(recipe, accumulate=n)) for n in (1, 2))
    for ours, theirs in zip(whole, parts, strict=True):
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
            assert theirs["gradient_norm"] == pytest.approx(ours["gradient_norm"], rel=1e-3)


def test_gradient_checkpointing_changes_memory_alone(run, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, phases=(dataclasses.replace(PHASES[1], pictures=12),))
    plain, checkpointed = (
        aligned(run, shards, tmp_path / str(on), dataclasses.replace(recipe, gradient_checkpointing=on))
        for on in (False, True)
    )
    for ours, theirs in zip(plain, checkpointed, strict=True):
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)


def test_a_compiled_run_is_the_plain_run(run, shards, tmp_path, monkeypatch):
    """Gains that follow and measuring included, which look inside the blocks."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    local = dataclasses.replace(PHASES[0], pictures=20, b=(1.0, 2.0), beta=(1.0, 0.0), recalibrate_every=2)
    recipe = dataclasses.replace(RECIPE, phases=(local, dataclasses.replace(PHASES[1], pictures=20)))
    plain, compiled = (
        aligned(run, shards, tmp_path / str(on), dataclasses.replace(recipe, compile=on)) for on in (False, True)
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert len(plain) == len(compiled)
    for ours, theirs in zip(plain, compiled, strict=True):
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("model", ["run", "cnn"])
def test_no_step_but_one_that_is_logged_reads_the_device(model, shards, tmp_path, request, monkeypatch):
    """`.item()` and its like, by which Python waits for the device: none in 19 of 20 steps."""
    reads, per_step = [], []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _p=plain, _n=name, **k: (reads.append(_n), _p(self, *a, **k))[1]
        )
    step = log.PhaseLog.step

    def noted(self, progress, losses, norm):
        per_step.append(len(reads))
        step(self, progress, losses, norm)
        if progress.step % 10 == 0:
            assert len(reads) > per_step[-1]  # the row: the counter counts

    batches = Pictures.batches

    def fetched(self, first, end):
        for batch in batches(self, first, end):
            reads.clear()  # cropping asks for numbers, on the CPU and usually in a worker
            yield batch

    monkeypatch.setattr(log.PhaseLog, "step", noted)
    monkeypatch.setattr(Pictures, "batches", fetched)
    phase = Phase("end-to-end", 80, 1e-3, b=(1.0, 2.0), beta=(1.0, 0.0), ramp=0.9, batch_statistics=model == "cnn")
    recipe = dataclasses.replace(RECIPE, phases=(phase,), log_every=10, evaluate_every=1000, checkpoint_every=1000)
    aligned(request.getfixturevalue(model), shards, tmp_path / "out", recipe)
    assert per_step == [0] * 20


def test_a_new_run_starts_from_another_students_weights(run, cnn, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, phases=(dataclasses.replace(PHASES[1], pictures=20),))
    first = aligned(run, shards, tmp_path / "first", recipe)
    again = aligned(run, shards, tmp_path / "again", recipe, init_from=tmp_path / "first")
    losses = [[row["loss"] for row in rows_ if "loss" in row] for rows_ in (first, again)]
    assert losses[1][0] < losses[0][0]
    with pytest.raises(CheckpointError, match="another plan"):
        aligned(cnn, shards, tmp_path / "other", CNN_RECIPE, init_from=tmp_path / "first")


def test_val_pictures_must_not_be_trained_on(run, shards, tmp_path):
    with pytest.raises(DataError, match="48 of its pictures are in --data too"):
        aligned(run, shards, tmp_path / "x", val=str(shards))
    assert not (tmp_path / "x.run").exists()


def test_broken_pictures_are_substituted_counted_and_listed(run, tmp_path, shards):
    import io
    import tarfile

    broken = tmp_path / "broken.tar"
    with tarfile.open(shards / "00000.tar") as source, tarfile.open(broken, "w") as out:
        for i, member in enumerate(source):
            data = source.extractfile(member).read()  # type: ignore[union-attr]
            data = data[: len(data) // 3] if i == 3 else data
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    recipe = dataclasses.replace(RECIPE, phases=PHASES[:1], held_out=4, max_bad=0.2)
    result = align(AlignConfig(run, str(broken), tmp_path / "few", recipe, quiet=True))
    assert result["bad_pictures"] == 1
    assert len((tmp_path / "few.run/bad_samples.jsonl").read_text().splitlines()) == 1
    with pytest.raises(DataError):
        strict = dataclasses.replace(recipe, max_bad=0.01)
        align(AlignConfig(run, str(broken), tmp_path / "many", strict, quiet=True))
    assert not (tmp_path / "many").exists()


def test_loss_that_is_no_number_stops_the_run(run, shards, tmp_path):
    wild = (dataclasses.replace(PHASES[0], learning_rate=1e30, clip=1e30),)
    with pytest.raises(BcosifyError, match="the loss is .*largest gradient: .*weight.*learning_rate"):
        aligned(run, shards, tmp_path / "nan", dataclasses.replace(RECIPE, phases=wild))
    assert not (tmp_path / "nan").exists()
    for checkpoint in (tmp_path / "nan.run/checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "student.safetensors").values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_a_gradient_under_its_pressure_and_none_without(run, objective):
    student = load(run)
    teacher = load(run).model.requires_grad_(False)
    pictures = torch.randn(4, 3, 64, 64)
    loss = OBJECTIVES[objective](student.model, RECIPE)
    calls, output = observe(teacher, pictures, loss.taps)
    if objective not in ("pairwise", "decisions"):  # which push on even where both are equal
        assert loss(pictures, calls, output)["total"].item() < 1e-4  # an exact start has nothing to learn
    set_strength(student.model, b=2.0, beta=0.0)
    loss(pictures, calls, output)["total"].backward()
    norms = [parameter.grad.norm() for parameter in student.model.parameters() if parameter.grad is not None]
    assert sum(norms) > 1e-3


def test_checkpoints_are_pruned_after_the_new_one_is_whole(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for step in (1, 2, 3):
        state.write(tmp_path, model, optimizer, state.Progress(step, 0, "d"))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003/COMPLETE").unlink()
    found = state.latest(tmp_path)
    assert found is not None and found[1].step == 2
    other = torch.nn.Linear(2, 2)
    moments = torch.optim.AdamW(other.parameters())
    state.restore(found[0], other)
    state.restore_optimizer(found[0], moments)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(moments.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state.write(tmp_path, model, optimizer, state.Progress(1, 0, "d"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        state.write(tmp_path, model, optimizer, state.Progress(2, 0, "d"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_recipes_round_trip_and_name_every_fault():
    assert from_values(json.loads(json.dumps(dataclasses.asdict(RECIPE)))) == RECIPE
    for name in list_recipes():
        recipe = load_recipe(name)
        assert from_values(yaml.safe_load(dump(recipe))) == recipe
        assert recipe.pressure and recipe.phases
    with pytest.raises(RecipeError) as caught:
        from_values({"pressure": "p", "image_size": "big", "batchsize": 2, "phases": [{"objctive": "end-to-end"}]})
    lines = str(caught.value).splitlines()
    assert any("unknown key batchsize" in line and "'batch_size'" in line for line in lines)
    assert any("image_size: must be int; got 'big'" in line for line in lines)
    assert any("unknown key phases.0.objctive" in line and "'objective'" in line for line in lines)
    assert any("missing key phases.0.learning_rate" in line for line in lines)
    with pytest.raises(RecipeError, match="bcos/vit"):
        load_recipe("bcos/vitt")
    with pytest.raises(RecipeError, match="no place"):
        load_recipe("smoke", ["phases.7.pictures=1"])
    assert load_recipe("smoke", ["phases.0.pictures=8"]).phases[0].pictures == 8
    assert load_recipe("smoke", ["phases.0.learning_rate=3e-4"]).phases[0].learning_rate == 3e-4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["turn=181"], "turn: must be between 0 and 180; got 181"),
        (["turn=-1"], "turn: must be between 0 and 180; got -1"),
        (["colour=1.5"], "colour: must be between 0 and 1; got 1.5"),
        (["mixup=2"], "mixup: must be between 0 and 1; got 2"),
        (["cutmix=-0.1"], "cutmix: must be between 0 and 1; got -0.1"),
        (["cutmix=.nan"], "cutmix: must be between 0 and 1; got nan"),
        (["mixup=0.6", "cutmix=0.6"], "chances may add up to 1; got 1.2"),
        (["mixup=0.5", "batch_size=1"], "a batch of 1 has no two pictures to mix; set batch_size to 2 or more"),
    ],
)
def test_views_that_cannot_be_are_refused_by_name(changes, says):
    with pytest.raises(RecipeError) as caught:
        load_recipe("smoke", changes)
    assert says in str(caught.value) and "has 1 fault(s)" in str(caught.value)
    values = {
        word.split("=")[0]: float(word.split("=")[1].lstrip(".") if "nan" in word else word.split("=")[1])
        for word in changes
    }
    if "batch_size" in values:
        values["batch_size"] = int(values["batch_size"])
    with pytest.raises(RecipeError, match=re.escape(says)):
        dataclasses.replace(RECIPE, **values)


def test_views_at_their_limits_are_taken():
    recipe = load_recipe("smoke", ["turn=180", "colour=1", "mixup=0.4", "cutmix=0.6", "batch_size=2"])
    assert (recipe.turn, recipe.colour, recipe.mixup, recipe.cutmix) == (180, 1, 0.4, 0.6)
    assert load_recipe("smoke", ["batch_size=1"]).batch_size == 1


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The run dies after this step."""
    plain = log.PhaseLog.step

    def dying(self, progress, losses, norm):
        plain(self, progress, losses, norm)
        if progress.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(log.PhaseLog, "step", dying)


def test_a_stream_is_trained_on_resumed_and_refused_where_it_changes(run, shards, tmp_path, monkeypatch):
    """Sources that nothing is kept of; five steps a checkpoint, ten steps a phase."""
    monkeypatch.setenv("BCOSIFY_CACHE", str(tmp_path / "cache"))
    data = f"pipe:cat {shards}/{{00000..00001}}.tar"
    options = {"stream": True, "val": str(shards / "00002.tar")}

    def aligned_on(data: str, name: str, **changes) -> list[dict]:
        align(AlignConfig(run, data, tmp_path / name, RECIPE, quiet=True, **options, **changes))
        return rows(tmp_path / name)

    whole = aligned_on(data, "whole")
    assert len([row for row in whole if "loss" in row]) == 20
    assert not (tmp_path / "cache/shards").exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 13)
        aligned_on(data, "parts")
    with pytest.raises(RecipeError, match=r"is not the data .*\(its shards or --stream differ"):
        aligned_on(f"pipe:cat {shards}/{{00001..00000}}.tar", "parts", resume=True)
    assert aligned_on(data, "parts", resume=True) == whole
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_stream_needs_val_and_none_of_its_pictures(run, shards, tmp_path):
    with pytest.raises(DataError, match="--stream holds no pictures back.* pass --val SHARDS"):
        aligned(run, shards, tmp_path / "out", stream=True)
    with pytest.raises(DataError, match=r"--val is no measure: its picture 'rocket-\d+' .* is in --data too"):
        aligned(run, shards, tmp_path / "out", stream=True, val=str(shards / "00002.tar"))
    assert not (tmp_path / "out").exists()


def test_remote_shards_are_kept_where_the_run_says(run, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, phases=PHASES[:1])
    data = f"pipe:cat {shards}/{{00000..00002}}.tar"
    align(AlignConfig(run, data, tmp_path / "away", recipe, quiet=True, cache=tmp_path / "kept"))
    assert len([path for path in (tmp_path / "kept").iterdir() if path.name != ".locks"]) == 3
    assert rows(tmp_path / "away") == aligned(run, shards, tmp_path / "local", recipe)
