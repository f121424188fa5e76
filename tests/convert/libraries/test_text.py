"""Text towers: unchanged beside the student, opened when they are needed, and no other than what was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from bcosify.convert import convert, embed_texts, load, load_teacher, probabilities, save
from bcosify.convert.libraries import SavedText
from bcosify.core.errors import CheckpointError, SourceError
from bcosify.explain import SimilarityTarget, explain
from safetensors.torch import load_file

TEXTS = ["a red bus", "a photo of the cat", "dog on grass"]
CONVNEXT = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}


@pytest.fixture(params=["transformers", "open_clip"])
def pair(request) -> tuple[str, str, Path]:
    """(library, reference, folder) of a dual encoder all of whose layers have rules."""
    if request.param == "transformers":
        folder = request.getfixturevalue("hf_clip")
        return request.param, f"hf:{folder}", folder
    options = {"custom_text": True, "init_logit_bias": -10.0, "init_logit_scale": 1.0}
    folder = request.getfixturevalue("open_clip_folder")(model=options, **CONVNEXT)
    return request.param, f"open_clip:local-dir:{folder}", folder


def library_embeddings(library: str, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        if library == "open_clip":
            model = open_clip.create_model(f"local-dir:{folder}").eval()
            return model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS))
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        return transformers.CLIPModel.from_pretrained(folder).eval().get_text_features(**tokens).pooler_output


def test_a_students_text_tower_is_its_teachers(pair, tmp_path):
    library, reference, folder = pair
    teacher = load_teacher(reference)
    theirs = library_embeddings(library, folder)
    torch.testing.assert_close(teacher.text.embed(TEXTS), theirs)
    # Twice, as alignment does: from memory, then from a folder that is gone afterwards.
    once = load(save(convert(teacher), tmp_path / "once"))
    shutil.rmtree(folder)
    assert isinstance(once.text, SavedText)
    twice = load(save(once, tmp_path / "twice"))
    shutil.rmtree(tmp_path / "once")
    assert torch.equal(twice.text.embed(TEXTS), teacher.text.embed(TEXTS))
    assert (twice.text.logit_scale, twice.text.logit_bias) == (teacher.text.logit_scale, teacher.text.logit_bias)


def test_scale_and_bias_are_the_checkpoints(pair):
    library, reference, folder = pair
    text = load_teacher(reference).text
    name = "open_clip_model.safetensors" if library == "open_clip" else "model.safetensors"
    state = load_file(folder / name)
    assert text.logit_scale == pytest.approx(float(state["logit_scale"].exp()))
    assert text.logit_bias == (pytest.approx(float(state["logit_bias"])) if library == "open_clip" else None)


def test_contributions_and_constants_are_the_cosines_of_several_texts_from_one_forward(pair):
    _, reference, _ = pair
    student = convert(load_teacher(reference))
    forwards = []
    student.model.register_forward_hook(lambda *_: forwards.append(1))
    pictures = torch.randn(3, 3, *student.preprocess.size)
    directions = embed_texts(student.text, TEXTS)
    explanation = explain(student.model, pictures, SimilarityTarget(directions))
    assert len(forwards) == 1 and explanation.scores.shape == (3, len(TEXTS))
    with torch.no_grad():
        cosines = torch.nn.functional.cosine_similarity(student.model(pictures)[:, None], directions, dim=-1)
    total = explanation.contributions.sum((-2, -1)) + explanation.constant_part
    assert (total - cosines).abs().max() <= 1e-5
    assert explanation.input_part.abs().max() > 1e-3


def test_templates_are_ensembled_as_open_clip_does(open_clip_folder):
    folder = open_clip_folder(**CONVNEXT)
    text = load_teacher(f"open_clip:local-dir:{folder}").text
    templates = ["{}", "a photo of a {}", "a {} on grass"]
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        theirs = open_clip.build_zero_shot_classifier(
            model,
            open_clip.get_tokenizer(f"local-dir:{folder}"),
            ["cat", "dog"],
            [lambda name, template=template: template.format(name) for template in templates],
        )
    torch.testing.assert_close(embed_texts(text, ["cat", "dog"], templates, batch_size=4), theirs.T)


def test_probabilities_are_what_the_pair_was_trained_to_say(hf_clip, open_clip_folder):
    cosines = torch.tensor([[0.3, 0.2]])
    clip = load_teacher(f"hf:{hf_clip}").text
    torch.testing.assert_close(probabilities(clip, cosines), (clip.logit_scale * cosines).softmax(-1))
    folder = open_clip_folder(model={"custom_text": True, "init_logit_bias": -1.0}, **CONVNEXT)
    siglip = load_teacher(f"open_clip:local-dir:{folder}").text
    expected = (siglip.logit_scale * cosines + siglip.logit_bias).sigmoid()
    torch.testing.assert_close(probabilities(siglip, cosines), expected)


def test_nothing_is_opened_before_it_is_needed(pair, tmp_path, monkeypatch):
    _, reference, _ = pair
    out = save(convert(load_teacher(reference)), tmp_path / "out")
    monkeypatch.setattr(
        "bcosify.convert.libraries.saved_text.load_file", lambda *_: pytest.fail("opened the text tower")
    )
    student = load(out)
    with torch.no_grad():
        student.model(torch.randn(1, 3, *student.preprocess.size))


@pytest.mark.parametrize("what", ["weights", "record", "missing"])
def test_a_changed_text_tower_is_refused(pair, tmp_path, what):
    _, reference, _ = pair
    out = save(convert(load_teacher(reference)), tmp_path / "out")
    if what == "missing":
        (out / "text" / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="model.safetensors is missing"):
            load(out)
        return
    file = out / "text" / ("model.safetensors" if what == "weights" else "text.json")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} (was changed|cannot be read)"):
        load(out).text.embed(TEXTS)
    with pytest.raises(CheckpointError, match="was changed"):
        save(load(out), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_without_its_tokenizer_a_pair_converts_and_says_what_is_missing(hf_clip, tmp_path):
    for file in hf_clip.glob("tokenizer*"):
        file.unlink()
    student = load(save(convert(load_teacher(f"hf:{hf_clip}")), tmp_path / "out"))
    with pytest.raises(
        SourceError, match="tokenizer of this transformers text tower cannot be had .* Convert .* again"
    ):
        student.text.embed(TEXTS)


def test_a_model_without_a_text_tower_keeps_none(tiny, tmp_path):
    out = save(convert(tiny("test_resnet", 32)), tmp_path / "out")
    assert load(out).text is None and not (out / "text").exists()
    # Folders of before have no such entry.
    record = json.loads((out / "bcosify.json").read_text())
    assert "text" not in record
