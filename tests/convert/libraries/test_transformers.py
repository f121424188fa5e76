"""transformers models: the real path, on small random models that save_pretrained wrote."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import transformers
from bcosify.convert import Source, Teacher, convert, load, load_teacher, save, token_grid
from bcosify.convert.libraries import build as build_skeleton
from bcosify.convert.libraries import bundled, reload_teacher
from bcosify.core.errors import PlanError, SourceError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import VISION, WORDS

NAFLEX = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
DUAL = {"text_config": WORDS, "vision_config": VISION}
# Model, configuration, settings, head, its features.
FAMILIES = [
    ("SiglipModel", "SiglipConfig", DUAL, "embedding", 32),
    ("SiglipVisionModel", "SiglipVisionConfig", VISION, "pooled", 32),
    ("SiglipForImageClassification", "SiglipConfig", {**DUAL, "num_labels": 5}, "classifier", 5),
    ("Siglip2Model", "Siglip2Config", {"text_config": WORDS, "vision_config": NAFLEX}, "embedding", 32),
    ("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX, "pooled", 32),
    ("CLIPModel", "CLIPConfig", {**DUAL, "projection_dim": 24}, "embedding", 24),
    ("CLIPVisionModel", "CLIPVisionConfig", VISION, "pooled", 32),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VISION, "projection_dim": 24}, "embedding", 24),
    ("CLIPForImageClassification", "CLIPConfig", {**DUAL, "num_labels": 5}, "classifier", 5),
    ("MetaClip2Model", "MetaClip2Config", {**DUAL, "projection_dim": 24}, "embedding", 24),
    ("Dinov2Model", "Dinov2Config", VISION, "pooled", 32),
    ("Dinov2Model", "Dinov2Config", {**VISION, "use_swiglu_ffn": True}, "pooled", 32),
    ("Dinov2ForImageClassification", "Dinov2Config", {**VISION, "num_labels": 5}, "classifier", 5),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", VISION, "pooled", 32),
    ("DINOv3ViTModel", "DINOv3ViTConfig", {**VISION, "num_register_tokens": 2}, "pooled", 32),
    (
        "DINOv3ConvNextModel",
        "DINOv3ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "image_size": 64},
        "pooled",
        32,
    ),
    ("ViTModel", "ViTConfig", VISION, "pooled", 32),
    ("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 5}, "classifier", 5),
    ("DeiTModel", "DeiTConfig", VISION, "pooled", 32),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**VISION, "num_labels": 5}, "classifier", 5),
    (
        "BeitForImageClassification",
        "BeitConfig",
        {**VISION, "num_labels": 5, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
        "classifier",
        5,
    ),
    ("SwinModel", "SwinConfig", SWIN, "pooled", 16),
    ("Swinv2ForImageClassification", "Swinv2Config", {**SWIN, "num_labels": 5}, "classifier", 5),
    ("ConvNextModel", "ConvNextConfig", {**STAGES, "num_stages": 2}, "pooled", 16),
    (
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {**STAGES, "num_stages": 2, "num_labels": 5},
        "classifier",
        5,
    ),
    ("ResNetModel", "ResNetConfig", {**STAGES, "embedding_size": 8}, "pooled", 16),
    ("ResNetForImageClassification", "ResNetConfig", {**STAGES, "embedding_size": 8, "num_labels": 5}, "classifier", 5),
]


def drawn(model: nn.Module) -> nn.Module:
    """The model with weights that let a wrong position table be seen."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("size", [[32, 64], [16, 64], 32])
def test_a_position_table_is_resampled_at_other_sizes_only(tmp_path, size):
    config = transformers.ViTConfig(**{**VISION, "image_size": size})
    model = drawn(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    own = (size, size) if isinstance(size, int) else tuple(size)
    transformers.ViTImageProcessor(size={"height": own[0], "width": own[1]}).save_pretrained(tmp_path)
    teacher = load_teacher(f"hf:{tmp_path}")
    pictures = torch.randn(2, 3, *own)
    assert teacher.preprocess.size == own and torch.equal(teacher.model(pictures), model(pictures).logits)
    assert convert(teacher).history.conversion.identity_error <= 1e-5
    other = torch.randn(1, 3, 48, 48)
    if size == 32:
        wanted = model(other, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(teacher.model(other), wanted, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(SourceError, match=f"for pictures of {own[0]} x {own[1]}, not 48 x 48.*square position"):
            teacher.model(other)


# Attention pools are another part's business: these tests hold with and without a rule for them.


def library_output(folder: Path, pictures: Tensor, head: str) -> Tensor:
    """What the library itself returns, by its own documented calls."""
    values = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, values["architectures"][0])
    model = model_class.from_pretrained(folder).eval()
    with torch.no_grad():
        if "Siglip2" in model_class.__name__:
            patches = (
                nn.functional.unfold(pictures, 8, stride=8).unflatten(1, (3, 8, 8)).permute(0, 4, 2, 3, 1).flatten(2)
            )
            shape = torch.tensor([[side // 8 for side in pictures.shape[-2:]]] * len(pictures))
            inputs = (patches, torch.ones(patches.shape[:2], dtype=torch.long), shape)
            output = model.get_image_features(*inputs) if head == "embedding" else model(*inputs)
        else:
            output = model.get_image_features(pictures) if hasattr(model, "get_image_features") else model(pictures)
    for name in ("logits", "image_embeds", "pooler_output"):
        if output.get(name) is not None:
            return output[name].flatten(1)
    raise AssertionError(output.keys())


@pytest.mark.parametrize(("model", "config", "settings", "head", "features"), FAMILIES)
def test_a_folder_opens_converts_and_comes_back(hf_folder, tmp_path, model, config, settings, head, features):
    folder = hf_folder(model, config, **settings)
    size = 64 if "DINOv3Conv" in model else 32
    teacher = load_teacher(f"hf:{folder}", image_size=size)
    pictures = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert teacher.model(pictures).shape == (2, features) and not teacher.model.training
        torch.testing.assert_close(
            teacher.model(pictures), library_output(folder, pictures, head), rtol=1e-4, atol=1e-5
        )
    assert teacher.source.model_args["head"] == head and teacher.labels is None
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (teacher.model, build_skeleton(teacher.source))]
    assert shapes[0] == shapes[1]
    student = convert(teacher)
    assert student.history.conversion.identity_error <= 1e-5
    shutil.rmtree(folder)
    opened = load(save(student, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(opened.model(pictures), student.model(pictures))


@pytest.mark.parametrize(("model", "config", "settings", "head", "features"), FAMILIES)
def test_a_student_takes_every_size_that_its_teacher_takes(hf_folder, model, config, settings, head, features):
    teacher = load_teacher(f"hf:{hf_folder(model, config, **settings)}", image_size=64)
    student = convert(teacher)
    for height, width in ((64, 96), (96, 64)):
        pictures = torch.randn(1, 3, height, width)
        with torch.no_grad():
            ours, theirs = student.model(pictures), teacher.model(pictures)
            grid = token_grid(teacher.source, teacher.model, pictures)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert grid.shape[2] * width == grid.shape[3] * height


def test_the_grid_holds_the_patches_in_their_order(hf_folder):
    """A patch's own feature moves most when that patch is changed."""
    teacher = load_teacher(f"hf:{hf_folder('DINOv3ViTModel', 'DINOv3ViTConfig', **VISION, num_register_tokens=2)}")
    pictures = torch.zeros(2, 3, 32, 48)
    pictures[1, :, 8:16, 32:40] = 3
    with torch.no_grad():
        grid = token_grid(teacher.source, teacher.model, pictures)
    assert grid.shape == (2, 32, 4, 6) and (grid[1] - grid[0]).norm(dim=0).argmax() == 1 * 6 + 4


def test_heads_choose_what_is_returned(hf_clip, hf_folder):
    pictures = torch.randn(2, 3, 32, 32)
    embedding, pooled = (load_teacher(f"hf:{hf_clip}", head=head) for head in ("auto", "pooled"))
    with torch.no_grad():
        tower = transformers.CLIPModel.from_pretrained(hf_clip).eval()
        torch.testing.assert_close(pooled.model(pictures), tower.vision_model(pictures).pooler_output)
        torch.testing.assert_close(embedding.model(pictures), tower.get_image_features(pictures).pooler_output)
    assert embedding.text is not None and pooled.text is None
    classifier = hf_folder("ViTForImageClassification", "ViTConfig", "vit", **VISION, num_labels=5)
    # A classifier's checkpoint has no pooler: the class token is the feature.
    assert load_teacher(f"hf:{classifier}", head="pooled").model(pictures).shape == (2, 32)
    with pytest.raises(SourceError, match=r"missing classifier\.weight|has no classifier head"):
        load_teacher(f"hf:{hf_folder('ViTModel', 'ViTConfig', 'plain', **VISION)}", head="classifier")
    with pytest.raises(SourceError, match="'vit' has no embedding head. Pass another --head"):
        load_teacher(f"hf:{classifier}", head="embedding")
    with pytest.raises(SourceError, match="no head 'pool'. Did you mean 'pooled'"):
        load_teacher(f"hf:{classifier}", head="pool")
    with pytest.raises(SourceError, match="--head pooled is for transformers models"):
        load_teacher("timm:test_vit", head="pooled")


def test_names_of_classes_are_kept_and_placeholders_are_not(hf_folder, tmp_path):
    names = {0: "tabby", 1: "dog", 2: "bus"}
    folder = hf_folder("ViTForImageClassification", "ViTConfig", **VISION, id2label=names)
    teacher = load_teacher(f"hf:{folder}")
    assert teacher.labels == ("tabby", "dog", "bus")
    assert load(save(convert(teacher), tmp_path / "out")).labels == teacher.labels


def test_the_same_source_opens_the_same_teacher_again(hf_clip):
    teacher = load_teacher(f"hf:{hf_clip}", head="pooled")
    again = reload_teacher(teacher.source)
    pictures = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.model(pictures), teacher.model(pictures))


# ------------------------------------------------------------------------------------------ one's own weights


@pytest.mark.parametrize("written_by", ["save_pretrained", "state_dict"])
@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        ("ViTForImageClassification", "ViTConfig", VISION),
        ("Dinov2ForImageClassification", "Dinov2Config", VISION),
        ("ResNetForImageClassification", "ResNetConfig", {**STAGES, "embedding_size": 8}),
    ],
)
def test_own_weights_bring_their_number_of_classes(hf_folder, tmp_path, model, config, settings, written_by):
    folder = hf_folder(model, config, **settings, num_labels=5)
    tuned = hf_folder(model, config, "tuned", **settings, num_labels=3)
    file = tuned / "model.safetensors"
    if written_by == "state_dict":
        state = getattr(transformers, model).from_pretrained(tuned).state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    teacher = load_teacher(f"hf:{folder}", weights=file)
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher.model(pictures), load_teacher(f"hf:{tuned}").model(pictures)) or (
            written_by == "state_dict" and teacher.model(pictures).shape == (2, 3)
        )
        opened = load(save(convert(teacher), tmp_path / "out"))
        assert opened.model(pictures).shape == (2, 3)


def test_weights_of_another_architecture_are_refused_with_the_first_mismatches(hf_folder, tmp_path):
    folder = hf_folder("ViTForImageClassification", "ViTConfig", **VISION)
    other = hf_folder("ResNetForImageClassification", "ResNetConfig", "other", **STAGES, embedding_size=8)
    with pytest.raises(SourceError, match=r"does not fit ViTForImageClassification: missing .*; and \d+ more"):
        load_teacher(f"hf:{folder}", weights=other / "model.safetensors")
    wide = hf_folder("ViTForImageClassification", "ViTConfig", "wide", **{**VISION, "intermediate_size": 48})
    with pytest.raises(SourceError, match=r"is \(48, 32\), should be \(64, 32\)"):
        load_teacher(f"hf:{folder}", weights=wide / "model.safetensors")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "state_dict.module.", "ema.model."])
def test_weights_with_another_beginning_are_recognised_and_said(hf_folder, tmp_path, prefix):
    folder = hf_folder("ViTForImageClassification", "ViTConfig", **VISION)
    state = {f"{prefix}{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    save_file({**state, "optimizer.step": torch.ones(1)}, tmp_path / "own.safetensors")
    with pytest.warns(UserWarning, match=rf"without '{prefix}' in front; 1 tensors .* are left out, such as optimizer"):
        teacher = load_teacher(f"hf:{folder}", weights=tmp_path / "own.safetensors")
    pictures = torch.randn(1, 3, 32, 32)
    assert torch.equal(teacher.model(pictures), load_teacher(f"hf:{folder}").model(pictures))


def test_a_position_table_of_another_size_is_that_of_its_own_model(tmp_path):
    models = {}
    for size in (32, 64):
        models[size] = drawn(
            transformers.ViTForImageClassification(transformers.ViTConfig(**VISION | {"image_size": size}))
        )
        models[size].save_pretrained(tmp_path / str(size))
    with pytest.warns(UserWarning, match="position_embeddings is for pictures of 64 pixels, not 32"):
        teacher = load_teacher(f"hf:{tmp_path / '32'}", weights=tmp_path / "64" / "model.safetensors")
    for size in (64, 32):
        pictures = torch.randn(1, 3, size, size)
        wanted = models[64](pictures, interpolate_pos_encoding=size != 64).logits
        torch.testing.assert_close(teacher.model(pictures), wanted, rtol=1e-4, atol=1e-5)
    pictures = torch.randn(1, 3, 32, 32)
    assert torch.equal(load(save(convert(teacher), tmp_path / "out")).model(pictures), convert(teacher).model(pictures))


def test_random_weights_need_the_configuration_only(hf_folder):
    folder = hf_folder("ViTForImageClassification", "ViTConfig", **VISION)
    (folder / "model.safetensors").unlink()
    assert load_teacher(f"hf:{folder}", pretrained=False).model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


# --------------------------------------------------------------------------------------- the same weights in timm

VIT_NAMES = (
    (r"^vit\.", ""),
    (r"^vision_model\.", ""),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.patch_embedding", "patch_embed.proj"),
    (r"encoder\.layers?\.(\d+)\.", r"blocks.\1."),
    (r"layernorm_before|layer_norm1", "norm1"),
    (r"layernorm_after|layer_norm2", "norm2"),
    (r"attention\.output\.dense|self_attn\.out_proj", "attn.proj"),
    (r"(attention\.attention|self_attn)\.(query|q_proj)", "attn.q"),
    (r"(attention\.attention|self_attn)\.(key|k_proj)", "attn.k"),
    (r"(attention\.attention|self_attn)\.(value|v_proj)", "attn.v"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"^(post_)?layernorm\.", "norm."),
    (r"^classifier", "head"),
)


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The saved names of transformers' ViT and SigLIP -> timm's."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in VIT_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value[None] if key == "pos_embed" and value.dim() == 2 else value
    joined = {key: value for key, value in renamed.items() if not re.search(r"\.attn\.[qkv]\.", key)}
    for key in renamed:
        if ".attn.q." in key:
            parts = [renamed[key.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            joined[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return joined


def siglip_pool(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's attention pool in timm's names."""
    rest = {key: value for key, value in state.items() if not key.startswith("head.")}
    pool = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
    weight, bias = (pool[f"attention.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
    found = {
        "latent": pool["probe"],
        "q.weight": weight[0],
        "q.bias": bias[0],
        "kv.weight": torch.cat(weight[1:]),
        "kv.bias": torch.cat(bias[1:]),
        "proj.weight": pool["attention.out_proj.weight"],
        "proj.bias": pool["attention.out_proj.bias"],
        **{key.replace("layernorm.", "norm."): pool[key] for key in pool if key.startswith(("layernorm.", "mlp."))},
    }
    return {**rest, **{f"attn_pool.{key}": value for key, value in found.items()}}


SAME = {
    "vit": (
        ("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 5, "layer_norm_eps": 1e-6}),
        {"num_classes": 5},
        timm_names,
    ),
    "dinov2": (
        ("Dinov2Model", "Dinov2Config", {**VISION, "mlp_ratio": 2}),
        {"num_classes": 0, "init_values": 1.0},
        lambda state: bundled._timm_dinov2(state, state["embeddings.position_embeddings"]),
    ),
    "siglip": (
        ("SiglipVisionModel", "SiglipVisionConfig", {**VISION, "hidden_act": "gelu"}),
        {"num_classes": 0, "class_token": False, "global_pool": "map"},
        lambda state: siglip_pool(timm_names(state)),
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_weights_through_timm_and_transformers_are_the_same_students(hf_folder, tmp_path, kind):
    import timm

    (model, config, settings), options, rename = SAME[kind]
    folder = hf_folder(model, config, **settings)
    timm_model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, **options
    )
    state = rename(load_file(folder / "model.safetensors"))
    assert set(state) == set(timm_model.state_dict())
    timm_model.load_state_dict(state)
    theirs = load_teacher(f"hf:{folder}")
    ours = Teacher(timm_model.eval(), Source("timm:own", "timm", "own"), theirs.preprocess)
    students = [convert(teacher) for teacher in (ours, theirs)]
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        a, b = (student.model(pictures) for student in students)
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    stems = [[step for step in student.plan.swaps if "SixChannel" in str(step.becomes)] for student in students]
    assert len(stems[0]) == len(stems[1]) == 1


# --------------------------------------------------------------------------------------------------- wrong ones


def changed(folder: Path, **values) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, r"wants its own code to be run .*auto_map.*never executed"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"is quantised \(bitsandbytes\)"),
        ({"model_type": "vitt"}, "has no model type 'vitt'. Did you mean 'vit'"),
        ({"model_type": None}, r"names no model type \(model_type is None\)"),
        ({"architecture": "vit_tiny"}, r"is a timm model. Pass timm:local-dir:\S+ instead"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel reads input_ids, not pictures"),
        ({"hidden_size": 48}, r"its weights do not fill ViTForImageClassification .*should be .*48"),
    ],
)
def test_what_cannot_be_opened_is_refused_by_name(hf_folder, values, said):
    folder = hf_folder("ViTForImageClassification", "ViTConfig", **VISION)
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(SourceError, match=said):
        load_teacher(changed(folder, **values))


def test_missing_weights_are_an_error_and_never_random(hf_folder):
    folder = hf_folder("ViTForImageClassification", "ViTConfig", **VISION)
    state = load_file(folder / "model.safetensors")
    state.pop("classifier.bias")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="do not fill ViTForImageClassification .*missing classifier.bias"):
        load_teacher(f"hf:{folder}")


def test_pickled_weights_are_refused_unread(hf_folder):
    folder = hf_folder("ViTForImageClassification", "ViTConfig", **VISION)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"only pytorch_model.bin: pickles can run code.*save_pretrained"):
        load_teacher(f"hf:{folder}")


@pytest.mark.parametrize("reference", ["hf:nobody/nothing", "hf:nobody/nothing@0123abc", "hf:hf-hub:nobody/nothing"])
def test_an_unreachable_repository_says_what_to_pass_instead(monkeypatch, tmp_path, reference):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"cannot be reached \(.*hf:PATH"):
        load_teacher(reference)


@pytest.mark.parametrize("reference", ["hf:./nowhere", "hf:local-dir:nowhere", "hf:/nowhere/at/all"])
def test_an_absent_folder_is_refused(reference):
    with pytest.raises(SourceError, match="there is no such folder"):
        load_teacher(reference)


def test_a_folder_never_touches_the_network(hf_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for reference in (f"hf:{hf_clip}", f"hf:local-dir:{hf_clip}", f"dir:{hf_clip}"):
        student = load(save(convert(load_teacher(reference)), tmp_path / "out", overwrite=True))
        assert student.source.reference == reference and student.text.embed(["a red bus"]).shape == (1, 24)


def test_a_size_that_the_model_cannot_take_is_refused(hf_folder):
    folder = hf_folder("Siglip2VisionModel", "Siglip2VisionConfig", **NAFLEX)
    with pytest.raises(PlanError, match="picture of 33x33: the sides must be multiples of 8"):
        convert(load_teacher(f"hf:{folder}", image_size=33))


@pytest.mark.parametrize("kind", ["compiled", "scripted", "quantised"])
def test_a_model_whose_layers_cannot_be_read_is_refused(tiny, kind):
    teacher = tiny("test_resnet", 32)
    if kind == "compiled":
        wrong, said = torch.compile(teacher.model), "is compiled. Pass the model inside it"
    elif kind == "scripted":
        wrong, said = torch.jit.trace(teacher.model, torch.zeros(1, 3, 32, 32)), "TorchScript"
    else:
        wrong = nn.Sequential(nn.Linear(2, 2))
        wrong[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
        said = r"holds 0\.weight as torch.int8: it is quantised"
    with pytest.raises(SourceError, match=said):
        convert(dataclasses.replace(teacher, model=wrong))
