"""The models of tests/regression: one small folder a method and kind of model, as the code of a schema saved it.

`python tests/regression_models.py tests/regression/SCHEMA` is run once for every schema, by the code that brings it.
What it wrote is never written again: every later version must open it and compute the same.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bcosify.align.recipe import Phase, Recipe
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import (
    BcosConfig,
    CaStreamConfig,
    CodaConfig,
    FaCnnConfig,
    KMeansConfig,
    Teacher,
    convert,
    load,
    load_teacher,
    save,
    set_strength,
)
from bcosify.convert.layers import strength_spans
from bcosify.convert.libraries import Preprocess, Source, build
from bcosify.convert.randomise import randomise
from bcosify.core.pictures import noise_pictures
from bcosify.data.pack import write_shards
from PIL import Image
from safetensors.torch import save_file

from configs import VISION, WORDS
from folders import write_hf, write_open_clip, write_tokenizer

SIDE = 32
SEED = 7
EXPECTED = "expected.safetensors"
# Where strengths are moved to, so that each of them counts.
MOVED = {"b": 1.5, "beta": 0.5, "carry": 0.25, "window": 3.0, "dampening": 0.4}
VIT = {"img_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
POOLED = {**VIT, "global_pool": "avg", "class_token": False}
RESNET = {"channels": (4, 6, 6, 8), "stem_width": 4}
CONVNEXT = {"dims": (4, 4, 8, 8), "depths": (1, 1, 1, 1)}
NAFLEX = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
SWIN = {"img_size": SIDE, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
SAME = {"channel_multiplier": 0.25, "pad_type": "same"}


def inputs(seed: int, side: int) -> torch.Tensor:
    """Two pictures (2, 3, H, W)."""
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def outputs(model: Any, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a student computes, and the maps that it shows where it explains itself."""
    with torch.no_grad():
        found = {"outputs": model(pictures)}
    if hasattr(model, "output_maps"):
        found["maps"] = model.output_maps(pictures)[1].detach()
    return {name: value.contiguous() for name, value in found.items()}


def timm_teacher(name: str, side: int = SIDE, **args: Any) -> Teacher:
    """A timm model of eight classes with random weights, every one of which counts."""
    torch.manual_seed(0)
    source = Source(f"timm:{name}", "timm", name, {"num_classes": 8, **args}, weights="random")
    preprocess = Preprocess((side, side), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = randomise(build(source), noise_pictures(2, preprocess.size))
    return Teacher(model, source, preprocess, tuple("abcdefgh"))


def clip_teacher(scratch: Path) -> Teacher:
    """A CLIP of transformers, with its text tower."""
    from transformers import CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    seen = {"image_size": 16, "patch_size": 4}
    parts = {"text_config": {**WORDS, **small}, "vision_config": {**VISION, **small, **seen}, "projection_dim": 8}
    folder = write_hf(scratch / "hf", "CLIPModel", "CLIPConfig", **parts)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    write_tokenizer(folder)
    return load_teacher(f"hf:{folder}")


def open_clip_teacher(scratch: Path, **vision: Any) -> Teacher:
    folder = write_open_clip(scratch / f"open_clip{len(vision)}", image_size=SIDE, **vision)
    # Without the text tower, whose words need megabytes.
    return dataclasses.replace(load_teacher(f"open_clip:local-dir:{folder}"), text=None)


def teachers(scratch: Path) -> dict[str, tuple[Teacher, Any]]:
    """Name of a folder -> the teacher, and the settings of its conversion."""
    clip_vit = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    clip_cnn = {"layers": [1, 1, 1, 1], "width": 2, "head_width": 8}
    return {
        "bcos-vit": (timm_teacher("test_vit", 16, **VIT), BcosConfig()),
        "bcos-cnn": (timm_teacher("test_resnet", **RESNET), BcosConfig(keep=("layer1",))),
        "bcos-same": (timm_teacher("test_efficientnet", **SAME), BcosConfig(scale="unbounded")),
        "bcos-grn": (timm_teacher("convnextv2_atto", **CONVNEXT), BcosConfig()),
        "bcos-entrance": (timm_teacher("naflexvit_base_patch16_gap", 16, **NAFLEX), BcosConfig()),
        "bcos-clip": (clip_teacher(scratch), BcosConfig()),
        "bcos-open-clip": (open_clip_teacher(scratch, **clip_vit), BcosConfig()),
        "bcos-attention-pool": (open_clip_teacher(scratch, **clip_cnn), BcosConfig()),
        "coda-cnn": (timm_teacher("test_resnet", **RESNET), CodaConfig(rank=2)),
        "coda-vit": (timm_teacher("test_vit", 16, **VIT), CodaConfig(squash="sq", rank=2, basis=0)),
        "coda-same": (timm_teacher("test_efficientnet", **SAME), CodaConfig(rank=1, basis=2)),
        "fa-cnn": (timm_teacher("test_resnet", 64, **RESNET), FaCnnConfig()),
        "fa-cnn-norm": (timm_teacher("test_convnext", 64, **CONVNEXT), FaCnnConfig(dampening="branch")),
        "fa-cnn-tokens": (timm_teacher("test_vit", 16, **POOLED), FaCnnConfig()),
        "fa-cnn-channels-last": (timm_teacher("swin_tiny_patch4_window7_224", **SWIN), FaCnnConfig()),
        "ca-stream-cnn": (timm_teacher("test_resnet", 64, **RESNET), CaStreamConfig()),
        "ca-stream-token": (timm_teacher("test_vit", 16, **VIT), CaStreamConfig(stages=1, value="linear")),
        "kmeans-maps": (timm_teacher("test_resnet", 64, **RESNET), KMeansConfig(prototypes=2, concepts=4)),
        "kmeans-token": (timm_teacher("test_vit", 16, **{**VIT, "depth": 4}), KMeansConfig(prototypes=2)),
    }


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Strengths away from their start, and every new weight different from where it starts."""
    spans = strength_spans(model)
    set_strength(model, **{name: value for name, value in MOVED.items() if name in spans})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.isfinite().all():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def write_students(out: Path, scratch: Path) -> None:
    for name, (teacher, config) in teachers(scratch).items():
        student = convert(teacher, config)
        # Without the place on this machine.
        reference, architecture = (
            text.replace(str(scratch), "models") for text in (student.source.reference, student.source.architecture)
        )
        source = dataclasses.replace(student.source, reference=reference, architecture=architecture)
        student = dataclasses.replace(student, source=source)
        moved(student.model)
        folder = save(student, out / name)
        found = outputs(student.model, inputs(SEED, student.preprocess.size[0]))
        save_file(found, folder / EXPECTED, metadata={"seed": str(SEED)})
        layers = ", ".join(f"{count} {kind}" for kind, count in student.plan.counts().items())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}: {size // 1024} kB, {layers}")


RECIPE = Recipe(
    "B is 1.5 and half of the biases are left",
    32,
    4,
    (Phase("end-to-end", 32, 1e-3, b=(1.0, 1.5), beta=(1.0, 0.5)),),
    held_out=4,
    evaluate_every=16,
    checkpoint_every=16,
    log_every=4,
    workers=0,
)


def write_run(out: Path) -> None:
    """A run that was stopped half way: its student, its shard, its checkpoint, and what it came to in the end."""
    pictures = out / "pictures"
    pictures.mkdir(parents=True)
    for number in range(16):
        noise = 0.5 + 0.2 * noise_pictures(1, (24, 24), number)[0].clamp(-2, 2)
        Image.fromarray((noise * 255).byte().movedim(0, -1).numpy()).save(pictures / f"{number:02}.jpg")
    write_shards(pictures, out / "data", size=None, progress=False)
    shutil.rmtree(pictures)
    save(convert(timm_teacher("test_vit", 16, **VIT)), out / "student")
    align(AlignConfig(out / "student", str(out / "data"), out / "whole", RECIPE, quiet=True))
    student = load(out / "whole")
    found = outputs(student.model, inputs(SEED, student.preprocess.size[0]))
    save_file(found, out / EXPECTED, metadata={"seed": str(SEED)})
    run = out / "out.run"
    (out / "whole.run").rename(run)
    shutil.rmtree(out / "whole")
    kept = "step-00000004"
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name != kept:
            shutil.rmtree(checkpoint)
    assert (run / "checkpoints" / kept).is_dir()


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        write_students(target, Path(folder))
    write_run(target / "run")
