"""Teachers: real weights once a session, tiny timm models whose every number counts, and photographs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from bcosify.convert import Preprocess, Source, Student, Teacher, convert, load_teacher
from bcosify.convert.randomise import randomise
from bcosify.convert.trace import noise_pictures
from PIL import Image
from torch import Tensor, nn

from configs import VISION, WORDS

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """No test here asks the hub for anything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def tiny() -> Callable[..., Teacher]:
    """tiny(NAME, size=...): a timm model without published weights, with random biases and statistics."""

    def make(name: str = "test_vit", size: int | None = 64) -> Teacher:
        torch.manual_seed(0)
        teacher = load_teacher(f"timm:{name}", pretrained=False, image_size=size)
        randomise(teacher.model, noise_pictures(2, teacher.preprocess.size))
        return teacher

    return make


@pytest.fixture
def teach() -> Callable[..., Teacher]:
    """teach(MODEL): a Teacher of any module that takes a picture."""

    def make(model: nn.Module, size: int = 16) -> Teacher:
        preprocess = Preprocess((size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return Teacher(model.eval(), Source("timm:own", "timm", "own"), preprocess)

    return make


@pytest.fixture(scope="session")
def real_teachers() -> dict[str, Teacher]:
    """Both models whose real weights pip packages carry."""
    return {name: load_teacher(f"bundled:{name}") for name in ("efficientnet_lite0", "dinov2_small")}


@pytest.fixture(scope="session")
def _real_students(real_teachers) -> dict[str, Student]:
    return {name: convert(teacher) for name, teacher in real_teachers.items()}


@pytest.fixture
def real_student(_real_students) -> Callable[[str], Student]:
    """real_student(NAME): a fresh copy, free to be changed."""
    import copy

    return lambda name: dataclasses.replace(_real_students[name], model=copy.deepcopy(_real_students[name].model))


@pytest.fixture(scope="session")
def photographs() -> Callable[..., Tensor]:
    """photographs(PREPROCESS, count): (count, 3, H, W) normalised, from scikit-image's own files."""
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data"

    def read(preprocess: Preprocess, count: int = len(PHOTOGRAPHS)) -> Tensor:
        transform = preprocess.transform()
        return torch.stack([transform(Image.open(folder / name)) for name in PHOTOGRAPHS[:count]])

    return read


def write_tokenizer(folder: Path, vocabulary: str = "a red bus photo of the cat dog on grass") -> None:
    """A word tokenizer in transformers' own files, with the special tokens of `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *vocabulary.split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture
def hf_folder(tmp_path) -> Callable[..., Path]:
    """hf_folder(MODEL CLASS, CONFIG CLASS, SETTINGS...): a folder that save_pretrained wrote, of randomised weights."""

    def make(model: str, config: str, folder: str = "hf", **settings) -> Path:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        randomise(made).save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return make


@pytest.fixture
def hf_clip(hf_folder) -> Path:
    """A CLIP with image processor and tokenizer."""
    from transformers import CLIPImageProcessor

    folder = hf_folder("CLIPModel", "CLIPConfig", text_config=WORDS, vision_config=VISION, projection_dim=24)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def open_clip_folder(tmp_path) -> Callable[..., Path]:
    """open_clip_folder(VISION SETTINGS...): a folder as open_clip writes it, of randomised weights."""

    def make(folder: str = "open_clip", model: dict | None = None, text: dict | None = None, **vision) -> Path:
        import open_clip
        from safetensors.torch import save_file

        place = tmp_path / folder
        place.mkdir()
        words = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, **(text or {})}
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": words, **(model or {})}
        prepared = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
        (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": prepared}))
        torch.manual_seed(0)
        made = randomise(open_clip.create_model(f"local-dir:{place}", load_weights=False))
        state = {key: value.contiguous() for key, value in made.state_dict().items()}
        save_file(state, place / "open_clip_model.safetensors")
        return place

    return make
