"""open_clip models: small ones of its own kinds of towers, from folders as it writes them."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from bcosify.convert import convert, load, load_teacher, save, token_grid
from bcosify.convert.libraries import build
from bcosify.convert.libraries.open_clip.files import locate
from bcosify.core.errors import PlanError, SourceError
from safetensors.torch import load_file, save_file

VIT = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
COCA_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
# Tower, settings of the whole model, of its text tower, and whether it takes other sizes.
TOWERS = {
    "vit": (VIT, {}, {}, True),
    "quick gelu": (VIT, {"quick_gelu": True}, {}, True),
    "coca": (
        {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        {"custom_text": True, "multimodal_cfg": {**COCA_TEXT, "attn_pooler_heads": 2}},
        {"embed_cls": True, "output_tokens": True},
        True,
    ),
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}, {}, {}, False),
    "timm vit": (
        {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
        {"custom_text": True, "init_logit_bias": -10.0, "init_logit_scale": 1.0},
        {},
        True,
    ),
    "timm convnext": (
        {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        {"custom_text": True},
        {},
        True,
    ),
}


@pytest.fixture(params=TOWERS)
def tower(request, open_clip_folder) -> tuple[str, Path]:
    vision, model, text, _ = TOWERS[request.param]
    return request.param, open_clip_folder(model=model, text=text, **vision)


def test_a_folder_opens_converts_and_comes_back(tower, tmp_path):
    kind, folder = tower
    teacher = load_teacher(f"open_clip:local-dir:{folder}")
    whole = open_clip.create_model(f"local-dir:{folder}").eval()
    pictures = torch.randn(2, 3, *teacher.preprocess.size)
    with torch.no_grad():
        theirs = whole.visual(pictures)
        assert torch.equal(teacher.model(pictures), theirs[0] if isinstance(theirs, tuple) else theirs)
        assert token_grid(teacher.source, teacher.model, pictures).dim() == 4
    keys = {key for key in whole.state_dict() if key.startswith("visual.")}
    assert set(teacher.model.state_dict()) == set(build(teacher.source).state_dict()) == keys
    assert teacher.preprocess.std == (0.25,) * 3 and teacher.preprocess.interpolation == "bilinear"
    student = convert(teacher)
    assert student.history.conversion.identity_error <= 1e-4
    shutil.rmtree(folder)
    opened = load(save(student, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(opened.model(pictures), student.model(pictures))


def test_a_student_takes_every_size_that_open_clip_can_build(tower):
    kind, folder = tower
    reference = f"open_clip:local-dir:{folder}"
    if not TOWERS[kind][3]:
        with pytest.raises(SourceError, match="pixels only, not 96: its attention pool has"):
            load_teacher(reference, image_size=96)
        return
    whole = open_clip.create_model(f"local-dir:{folder}", force_image_size=96).eval()
    student, resized = (convert(load_teacher(reference, image_size=size)) for size in (None, 96))
    assert resized.preprocess.size == (96, 96)
    pictures = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        theirs = whole.visual(pictures)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        for model in (student.model, resized.model, build(resized.source)):
            assert model(pictures).shape == theirs.shape
        torch.testing.assert_close(student.model(pictures), theirs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(resized.model(pictures), theirs, rtol=1e-3, atol=1e-4)
        assert student.model(torch.randn(1, 3, 64, 96)).shape == theirs.shape


@pytest.mark.parametrize("part", ["whole", "image tower"])
def test_own_weights_are_taken(open_clip_folder, tmp_path, part):
    folder, tuned = open_clip_folder(**VIT), open_clip_folder("tuned", **{**VIT, "image_size": 64})
    state = {key: value + 0.1 for key, value in load_file(tuned / "open_clip_model.safetensors").items()}
    if part != "whole":
        state = {key: value for key, value in state.items() if key.startswith("visual.")}
    save_file(state, tmp_path / "own.safetensors")
    teacher = load_teacher(f"open_clip:local-dir:{folder}", weights=tmp_path / "own.safetensors")
    assert torch.equal(teacher.model.visual.proj, state["visual.proj"]) and teacher.source.revision is None
    # Without the text half there is nothing to compare the embeddings with.
    assert (teacher.text is not None) == (part == "whole")


def test_weights_of_another_architecture_are_refused_with_the_first_mismatches(open_clip_folder):
    folder, other = open_clip_folder(**VIT), open_clip_folder("other", **{**VIT, "width": 48})
    with pytest.raises(SourceError, match=r"does not fit CLIP: visual\.\S+ is \(48.*should be \(32.*; and \d+ more"):
        load_teacher(f"open_clip:local-dir:{folder}", weights=other / "open_clip_model.safetensors")


def test_pickles_are_refused_unread(open_clip_folder):
    folder = open_clip_folder(**VIT)
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(SourceError, match=r"only open_clip_pytorch_model.bin. Pickles can run code.*--weights"):
        load_teacher(f"open_clip:local-dir:{folder}")
    assert load_teacher(f"open_clip:local-dir:{folder}", pretrained=False).text is not None


def test_every_tag_leads_to_a_safetensors_file_or_is_refused(monkeypatch):
    """No name that open_clip knows may lead to a pickle."""
    asked = []

    def download(repository: str, file: str, **_) -> str:
        asked.append(file)
        return f"/snapshots/abc/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    refused = 0
    for architecture, tag in open_clip.list_pretrained():
        try:
            locate(f"{architecture}/{tag}", published=True)
        except SourceError as error:
            assert "is published as a pickle only" in str(error)
            refused += 1
    assert asked and all(file.endswith(".safetensors") for file in asked)
    assert refused < 0.1 * len(open_clip.list_pretrained())


def test_a_tag_brings_its_own_preprocessing_and_activation():
    place = locate("ViT-B-32/openai", published=False)
    assert place.quick_gelu is True and place.preprocess["mean"][0] == pytest.approx(0.4815, abs=1e-4)
    assert locate("ViT-B-16-SigLIP/webli", published=False).preprocess["resize_mode"] == "squash"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("open_clip:ViT-B-33", "no architecture 'ViT-B-33'. Did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32", "names no weights. Pass open_clip:ViT-B-32/TAG .*openai.*--no-pretrained"),
        ("open_clip:ViT-B-32/opnai", "has no weights tagged 'opnai'. Did you mean 'openai'"),
        ("open_clip:ViT-B-32/openai", r"cannot be reached \(.*--weights FILE.*--no-pretrained.*local-dir:PATH"),
        ("open_clip:hf-hub:nobody/nothing@abc", "cannot be reached"),
        ("open_clip:hf-hub:", "no name of a hub repository|cannot"),
        ("open_clip:local-dir:nowhere", "no open_clip_config.json in this folder"),
    ],
)
def test_a_wrong_reference_says_what_is_close(monkeypatch, tmp_path, reference, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=said):
        load_teacher(reference)


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("{}", "has no embed_dim, text_cfg, vision_cfg")])
def test_a_broken_configuration_is_refused(open_clip_folder, text, said):
    folder = open_clip_folder(**VIT)
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(SourceError, match=said):
        load_teacher(f"open_clip:local-dir:{folder}")


def test_a_folder_of_two_libraries_is_not_guessed(open_clip_folder):
    folder = open_clip_folder(**VIT)
    assert load_teacher(f"dir:{folder}").source.library == "open_clip"
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    with pytest.raises(SourceError, match=r"timm and open_clip at once. Say which: timm:local-dir:.* or open_clip:"):
        load_teacher(f"dir:{folder}")


def test_a_folder_never_touches_the_network(open_clip_folder, tmp_path, monkeypatch):
    folder = open_clip_folder(**TOWERS["timm convnext"][0])
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    student = load(save(convert(load_teacher(f"open_clip:local-dir:{folder}")), tmp_path / "out"))
    assert student.text.embed(["a red bus"]).shape == (1, 16)


def test_a_picture_smaller_than_a_patch_is_refused(open_clip_folder):
    with pytest.raises((PlanError, SourceError), match="4"):
        convert(load_teacher(f"open_clip:local-dir:{open_clip_folder(**VIT)}", image_size=4))
