"""A small teacher for every test that needs one."""

from __future__ import annotations

import torch
from bcosify.convert import Teacher, load_teacher
from bcosify.convert.randomise import randomise
from bcosify.core.pictures import noise_pictures


def tiny_teacher(name: str = "test_vit", size: int | None = 64) -> Teacher:
    """A timm model without published weights, with biases and statistics at random: every number of it counts."""
    torch.manual_seed(0)
    teacher = load_teacher(f"timm:{name}", pretrained=False, image_size=size)
    randomise(teacher.model, noise_pictures(2, teacher.preprocess.size))
    return teacher
