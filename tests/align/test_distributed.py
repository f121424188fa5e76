"""Several real processes: shards (FSDP2) and copies (DDP) against one process; signals, deaths and Slurm's script."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from bcosify.align import state
from bcosify.align.distributed import check_sharded, make_accelerator
from bcosify.align.log import METRICS
from bcosify.align.recipe import Phase, Recipe, dump
from bcosify.convert import convert, load_teacher, save
from bcosify.core.errors import RecipeError
from bcosify.data.pack import write_shards
from PIL import Image
from safetensors.torch import load_file

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
LIMIT = 280  # seconds until a run counts as hanging
# Both objectives, batches in parts, B and beta on the move with gains that follow, weights that a phase never touches.
RECIPE = Recipe(
    "B rises to 2 and all biases go",
    64,
    4,
    (
        Phase("block-local", 24, 5e-3, b=(1.0, 2.0), beta=(1.0, 0.0), calibrate=8, recalibrate_every=2),
        Phase("end-to-end", 24, 2e-3, settings={"centre": True}),
    ),
    accumulate=2,
    held_out=8,
    evaluate_every=20,
    checkpoint_every=8,
    log_every=1,
    workers=0,
)  # fmt: skip

# `bcosify align` with one fault: process RANK of the run sends itself SIGNAL after step AT. Gradients are kept in OUT.
FAULTY = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from bcosify.align.log import PhaseLog
from bcosify.align.phases import Stepper
from bcosify.align.distributed import whole
from bcosify.cli.main import main
from safetensors.torch import save_file
rank, at, name, kept = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
plain, backward, steps = PhaseLog.step, Stepper._backward, []
def step(self, progress, losses, norm):
    plain(self, progress, losses, norm)
    if progress.step == at and self.run.accelerator.process_index == rank:
        os.kill(os.getpid(), getattr(signal, name))
def noted(self, pictures):
    losses = backward(self, pictures)
    held = ((n, p.grad) for n, p in self.prepared.model.named_parameters() if p.grad is not None)
    grads = {n: whole(grad).clone(memory_format=torch.contiguous_format) for n, grad in held}
    steps.append(grads)
    if self.run.accelerator.is_main_process:
        save_file(grads, os.path.join(kept, f"{len(steps)}.safetensors"))
    return losses
PhaseLog.step, Stepper._backward = step, noted
sys.argv[1:] = ["align", *sys.argv[5:]]
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 48 crops of photographs, a tiny converted ViT, the recipe, and the program with the fault."""
    from skimage import data

    folder = tmp_path_factory.mktemp("distributed")
    (folder / "pictures").mkdir()
    for name, array in {"cat": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket()}.items():
        for i in range(16):
            crop = Image.fromarray(array).crop((12 * i, 6 * i, 12 * i + 160, 6 * i + 160)).resize((96, 96))
            crop.save(folder / "pictures" / f"{name}-{i}.jpg")
    write_shards(folder / "pictures", folder / "shards", size=None, per_shard=20, progress=False)
    torch.manual_seed(0)
    save(convert(load_teacher("timm:test_vit", pretrained=False, image_size=64)), folder / "run")
    (folder / "recipe.yaml").write_text(dump(RECIPE))
    (folder / "faulty.py").write_text(FAULTY)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def arguments(folder: Path, out: str) -> list[str]:
    return [
        str(folder / "run"), "--data", str(folder / "shards"), "--recipe", str(folder / "recipe.yaml"),
        "--out", str(folder / out),
    ]  # fmt: skip


def launched(
    folder: Path, out: str, config: str | None, *more: str, fault: tuple[int, int, str] = (0, 0, "SIGTERM")
) -> subprocess.CompletedProcess[str]:
    """Runs the program, under `config` on two processes, or alone; its gradients are kept in OUT.gradients."""
    kept = folder / f"{out}.gradients"
    kept.mkdir(exist_ok=True)
    launch = [] if config is None else ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    launch += ["--num_processes", "2", "--main_process_port", "0"] if launch else []
    words = [str(folder / "faulty.py"), *map(str, fault), str(kept), *arguments(folder, out), *more]
    return subprocess.run(
        [sys.executable, *launch, *words], env=environment(), capture_output=True, text=True, timeout=LIMIT
    )


def rows(folder: Path, out: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{out}.run" / METRICS).read_text().splitlines()]


@pytest.fixture(scope="module")
def one(folder: Path) -> str:
    """One process."""
    done = launched(folder, "one", None)
    assert done.returncode == 0, done.stderr
    return "one"


@pytest.fixture(scope="module")
def two(folder: Path) -> str:
    """Two processes, DDP."""
    done = launched(folder, "two", "cpu.yaml")
    assert done.returncode == 0, done.stderr
    return "two"


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference over the largest value, the worst of all tensors that both hold.

    But for the biases of keys: softmax does not see them, so their gradient is rounding, and Adam makes steps of it.
    """
    assert ours.keys() & theirs.keys()
    names = {name for name in ours.keys() & theirs.keys() if not name.endswith("qkv.bias")}
    pairs = [(ours[name].double(), theirs[name].double()) for name in names]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs)


def assert_same_training(folder: Path, ours: str, theirs: str, weights: float) -> None:
    """The same rows but for the speed; the same gradients (1e-5) as long as the weights are the same; the weights."""
    first, second = ([row for row in rows(folder, name) if "loss" in row] for name in (ours, theirs))
    assert len(first) == len(second) == sum(RECIPE.steps)
    for a, b in zip(first, second, strict=True):
        assert {a[k] == b[k] for k in ("step", "learning_rate", "b", "beta")} == {True}
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5, abs=1e-6)
    a, b = (load_file(folder / f"{name}.gradients" / "1.safetensors") for name in (ours, theirs))
    assert far(a, b) < 1e-5
    a, b = (load_file(folder / name / "model.safetensors") for name in (ours, theirs))
    assert a.keys() == b.keys()
    assert far(a, b) < weights


@pytest.mark.timeout(4 * LIMIT)
def test_two_processes_have_the_gradients_of_one(folder, one, two):
    assert rows(folder, two)[0]["run"] == {"processes": 2, "device": "cpu:0", "distributed": "MULTI_CPU"}
    assert_same_training(folder, one, two, weights=1e-4)


@pytest.mark.timeout(4 * LIMIT)
def test_shards_train_as_copies_do_and_their_checkpoints_are_whole(folder, two):
    """FSDP2, stopped by a signal to one process, resumed."""
    done = launched(folder, "fsdp", "fsdp.yaml", fault=(1, 8, "SIGUSR1"))
    assert done.returncode == 0, done.stderr
    assert not (folder / "fsdp").exists()
    found = state.latest(folder / "fsdp.run/checkpoints")
    assert found is not None and found[1].step == 8
    shapes = {name: tensor.shape for name, tensor in load_file(found[0] / "student.safetensors").items()}
    assert shapes == {name: tensor.shape for name, tensor in load_file(folder / "run/model.safetensors").items()}
    gradients = (folder / "fsdp.gradients/1.safetensors").read_bytes()
    done = launched(folder, "fsdp", "fsdp.yaml", "--resume")
    assert done.returncode == 0, done.stderr
    (folder / "fsdp.gradients/1.safetensors").write_bytes(gradients)
    assert rows(folder, "fsdp")[0]["run"]["distributed"] == "FSDP"
    assert_same_training(folder, "fsdp", two, weights=1e-4)


def test_a_convolutional_network_trains_in_shards(folder, tmp_path):
    """FSDP takes no weights in channels-last memory; the run is that of one process all the same."""
    torch.manual_seed(0)
    save(convert(load_teacher("timm:test_resnet", pretrained=False, image_size=64)), tmp_path / "run")
    recipe = dataclasses.replace(RECIPE, phases=(Phase("end-to-end", 24, 2e-3),))
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    for name in ("shards", "faulty.py"):
        (tmp_path / name).symlink_to(folder / name)
    for out, config in (("one", None), ("fsdp", "fsdp.yaml")):
        done = launched(tmp_path, out, config)
        assert done.returncode == 0, done.stderr
    ours, theirs = ([row["loss"] for row in rows(tmp_path, out) if "loss" in row] for out in ("fsdp", "one"))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert far(*(load_file(tmp_path / f"{out}.gradients/1.safetensors") for out in ("fsdp", "one"))) <= 1e-4


@pytest.mark.timeout(4 * LIMIT)
def test_reference_gains_and_a_floor_are_those_of_one_process(folder, tmp_path):
    """Sizes of the whole batch, in copies and in shards; everyone walks as the main process has measured."""
    torch.manual_seed(0)
    save(convert(load_teacher("timm:test_resnet", pretrained=False, image_size=64)), tmp_path / "run")
    phase = Phase(
        "end-to-end", 16, 2e-3, b=(1.3, 2.0), beta=(1.0, 0.0), carry=(0.0, 1.0), window=3.0, reference_gains=True
    )  # fmt: skip
    # Not in parts: a part has gains of its own, and two processes make other parts.
    recipe = dataclasses.replace(RECIPE, phases=(phase,), accumulate=1, keep=0.01)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    for name in ("shards", "faulty.py"):
        (tmp_path / name).symlink_to(folder / name)
    for out, config in (("one", None), ("two", "cpu.yaml"), ("fsdp", "fsdp.yaml")):
        done = launched(tmp_path, out, config)
        assert done.returncode == 0, done.stderr
    one, *others = ([row for row in rows(tmp_path, out) if "loss" in row] for out in ("one", "two", "fsdp"))
    assert len(one) == 4 and one[0]["b"] == pytest.approx(1.3)
    for other, out in zip(others, ("two", "fsdp"), strict=True):
        assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in one], rel=1e-3)
        assert [row["b"] for row in other] == [row["b"] for row in one]
        assert far(*(load_file(tmp_path / f"{name}.gradients/1.safetensors") for name in ("one", out))) <= 1e-4
        weights = [load_file(tmp_path / f"{name}/model.safetensors") for name in ("one", out)]
        assert weights[0].keys() == weights[1].keys() and far(*weights) < 1e-2


@pytest.mark.timeout(4 * LIMIT)
def test_through_death_and_preemption_under_slurm_bit_for_bit(folder, two, tmp_path):
    """Two processes: one is killed; Slurm's script goes on, is signalled, requeues; and goes on to the end."""
    done = launched(folder, "slurm", "cpu.yaml", fault=(1, 5, "SIGKILL"))
    assert done.returncode != 0
    found = state.latest(folder / "slurm.run/checkpoints")
    assert found is not None and found[1].step == 4
    cluster = Cluster(tmp_path, nodes=1, config=CONFIGS / "cpu.yaml", gpus=2)
    cluster.program("accelerate", f'shift; exec {sys.executable} -m accelerate.commands.launch "$@"')
    process = cluster.start(*arguments(folder, "slurm"))
    wait_for(lambda: max(row.get("step", 0) for row in rows(folder, "slurm")) >= 6, process)
    os.killpg(int((tmp_path / "task").read_text()), signal.SIGUSR1)  # what Slurm does: the task and its group
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    assert cluster.requeued() and not (folder / "slurm").exists()
    found = state.latest(folder / "slurm.run/checkpoints")
    assert found is not None and found[1].step == max(row.get("step", 0) for row in rows(folder, "slurm"))
    again = cluster.start(*arguments(folder, "slurm"))
    _, said = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, said
    assert not cluster.requeued()
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("slurm", two))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------------------- Slurm


NODES = ("localhost", "node-b")


class Cluster:
    """Stand-ins for Slurm's programs on PATH; a task runs in a process group of its own, as Slurm starts it."""

    def __init__(self, folder: Path, nodes: int, config: Path | None = None, gpus: int = 8) -> None:
        self.folder, self.nodes = folder, nodes
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.program(
            "scontrol", f'[ "$1" = show ] && printf "%s\\n" {" ".join(NODES[:nodes])} || echo "$@" >> {folder}/requeued'
        )
        self.program("srun", f'shift; exec {sys.executable} {folder}/srun.py "$@"')
        self.program("python", f'exec {sys.executable} "$@"')
        (folder / "srun.py").write_text(
            "import os, pathlib, subprocess, sys\n"
            f"tasks = [subprocess.Popen(sys.argv[1:], start_new_session=True, env={{**os.environ, 'SLURM_NODEID': "
            f"str(i)}}) for i in range({nodes})]\n"
            f"pathlib.Path({str(folder / 'task')!r}).write_text(str(tasks[0].pid))\n"
            "sys.exit(max(task.wait() for task in tasks))\n"
        )
        self.environment = {
            **environment(), "PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus),
        }  # fmt: skip
        if config is not None:
            self.environment["CONFIG"] = str(config)

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, run: str, *more: str) -> subprocess.Popen[str]:
        """sbatch; `more` as for `bcosify align`."""
        words = list(more)
        at = words.index("--out")
        out = words[at + 1]
        del words[at : at + 2]
        command = ["bash", str(CONFIGS / "slurm.sh"), run, out, *words]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def requeued(self) -> bool:
        """Whether the job was put into the queue again since it was asked last."""
        path = self.folder / "requeued"
        found = path.is_file() and path.read_text() == f"requeue {self.environment['SLURM_JOB_ID']}\n"
        path.unlink(missing_ok=True)
        return found


def wait_for(happened, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT
    while not happened():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)


def test_slurm_script_starts_one_launcher_a_node(tmp_path):
    cluster = Cluster(tmp_path, nodes=2)
    cluster.program("accelerate", f'printf "%s\\n" "$@" > {tmp_path}/said-$SLURM_NODEID; exit ${{FAIL:-0}}')
    out = tmp_path / "out"
    words = ["runs/dino", "--data", "a {0..3}.tar", "--out", str(out), "--recipe", "bcos/vit"]
    assert cluster.start(*words).wait(LIMIT) == 0
    for rank in range(2):
        config, *said = (tmp_path / f"said-{rank}").read_text().splitlines()[2:]
        assert Path(config).name == "several_nodes.yaml" and Path(config).is_file()
        port = str(20000 + os.getpid() % 20000)
        assert said == [
            "--num_machines", "2", "--num_processes", "16", "--machine_rank", str(rank),
            "--main_process_ip", "localhost", "--main_process_port", port, "-m", "bcosify.cli", "align",
            "runs/dino", "--out", str(out), "--data", "a {0..3}.tar", "--recipe", "bcos/vit",
        ]  # fmt: skip
    assert cluster.requeued()  # it ended well, and there is no result yet
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run/recipe.yaml").touch()
    out.mkdir()
    (out / "bcosify.json").touch()
    assert cluster.start(*words).wait(LIMIT) == 0
    assert (tmp_path / "said-1").read_text().splitlines()[-1] == "--resume"
    assert not cluster.requeued()
    (out / "bcosify.json").unlink()
    cluster.environment["FAIL"] = "3"
    assert cluster.start(*words).wait(LIMIT) == 3
    assert not cluster.requeued()
    assert subprocess.run(["bash", str(CONFIGS / "slurm.sh")], capture_output=True).returncode == 2


def test_fsdp_1_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RecipeError, match="only FSDP 2"):
        make_accelerator(RECIPE.precision)


def test_what_shards_do_not_do_is_refused():
    accelerator = types.SimpleNamespace(distributed_type=DistributedType.FSDP)
    check_sharded(accelerator, RECIPE)
    phases = (RECIPE.phases[0], dataclasses.replace(RECIPE.phases[1], optimizer="muon"))
    with pytest.raises(RecipeError, match=r"FSDP: average, phases\.1\.optimizer needs whole weights"):
        check_sharded(accelerator, dataclasses.replace(RECIPE, phases=phases, average=0.99))
