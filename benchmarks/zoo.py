"""Which architectures the coverage sweep looks at: at least one small member of every family, at a small size.

timm's families are its model modules. A family that appears in timm and not in this table is swept too, with the
first member that timm lists. open_clip's towers are its own configurations with fewer layers, transformers' models
small configurations, both with random weights.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from bcosify.convert import Preprocess, Source, Teacher, load_teacher
from bcosify.convert.libraries import build
from bcosify.convert.libraries.comparison import odd_pictures, odd_square, picture_difference
from bcosify.convert.libraries.open_clip.preprocess import preprocess_of as open_clip_record
from bcosify.convert.libraries.open_clip.text import TINY_TEXT
from bcosify.convert.libraries.timm.models import load as load_timm
from bcosify.convert.libraries.transformers.preprocess import SIBLINGS, pixels_of
from bcosify.convert.libraries.transformers.towers import library_output as library_output_of
from bcosify.convert.randomise import randomise
from bcosify.core.pictures import noise_pictures
from bcosify.core.tensors import relative_error

__all__ = ["Entry", "compare_entry", "entries", "first_of_families", "load_entry"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One architecture of the sweep: `size` pixels a side, and `size + step` to see whether it takes another."""

    library: str
    family: str
    architecture: str
    size: int | None = None
    step: int = 32
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


def _timm(family: str, architecture: str, size: int | None = None, step: int = 32, **args: Any) -> Entry:
    return Entry("timm", family, architecture, size, step, {"num_classes": 10, **args})


# Sizes: as small as the architecture allows, since a larger picture checks nothing more.
TIMM = (
    _timm("beit", "beit_base_patch16_224", 64, img_size=64, depth=3, embed_dim=96, num_heads=3),
    _timm("byoanet", "halonet26t", 256),
    _timm("byoanet", "eca_botnext26ts_256", 256),
    _timm("byoanet", "lambda_resnet26t", 128),
    _timm("byobnet", "test_byobnet", 96),
    _timm("byobnet", "repvgg_a0", 64),
    _timm("byobnet", "mobileone_s1", 64),
    _timm("byobnet", "gernet_s", 64),
    _timm("byobnet", "resnet50_clip", 64, img_size=64),
    _timm("cait", "cait_xxs24_224", 64, img_size=64, depth=4),
    _timm("coat", "coat_tiny", 64, img_size=64),
    _timm("coat", "coat_lite_tiny", 64, img_size=64),
    _timm("convit", "convit_tiny", 224, depth=12),
    _timm("convmixer", "convmixer_768_32", 64),
    _timm("convnext", "test_convnext", 96),
    _timm("convnext", "convnextv2_atto", 64),
    _timm("convnext", "convnext_atto_ols", 64),
    _timm("cpubone", "cpubone_nano", 64),
    _timm("crossvit", "crossvit_tiny_240", 240),
    _timm("csatv2", "csatv2", 256),
    _timm("cspnet", "cs3darknet_s", 64),
    _timm("cspnet", "cs3darknet_focus_s", 64),
    _timm("cspnext", "cspnext_tiny", 64),
    _timm("davit", "davit_tiny", 64, depths=(1, 1, 2, 1)),
    _timm("deepseek_vit", "deepseek_vit_412m", 56, 28, depth=2),
    _timm("deit", "deit_tiny_patch16_224", 64, img_size=64, depth=4),
    _timm("deit", "deit_tiny_distilled_patch16_224", 64, img_size=64, depth=4),
    _timm("deit", "deit3_small_patch16_224", 64, img_size=64, depth=4),
    _timm("densenet", "densenet121", 64),
    _timm("densenet", "densenetblur121d", 64),
    _timm("dla", "dla46_c", 64),
    _timm("dpn", "dpn48b", 64),
    _timm("edgenext", "edgenext_xx_small", 64),
    _timm("efficientformer", "efficientformer_l1", 224),
    _timm("efficientformer_v2", "efficientformerv2_s0", 224),
    _timm("efficientnet", "test_efficientnet", 96),
    _timm("efficientnet", "efficientnet_lite0", 64),
    _timm("efficientnet", "tf_efficientnet_cc_b0_4e", 64),
    _timm("efficientnet", "mixnet_s", 64),
    _timm("efficientnet", "mobilenetv4_hybrid_medium", 64),
    _timm("efficientnet", "tinynet_e", 64),
    _timm("efficientvim", "efficientvim_m1", 64),
    _timm("efficientvit_mit", "efficientvit_b0", 64),
    _timm("efficientvit_msra", "efficientvit_m0", 224),
    _timm("eva", "eva02_tiny_patch14_224", 56, 28, img_size=56, depth=4),
    _timm("eva", "vit_tiny_patch16_dinov3_qkvb", 64, depth=4),
    _timm("eva", "vit_pe_spatial_tiny_patch16_512", 64, img_size=64, depth=4),
    _timm("fasternet", "fasternet_t0", 64),
    _timm("fastvit", "fastvit_t8", 64),
    _timm("focalnet", "focalnet_tiny_srf", 64),
    _timm("gcvit", "gcvit_xxtiny", 224),
    _timm("gemma4_vit", "gemma4_vit_167m", 96, 48, depth=2),
    _timm("ghostnet", "ghostnet_050", 64),
    _timm("ghostnet", "ghostnetv3_050", 128),
    _timm("hardcorenas", "hardcorenas_a", 64),
    _timm("hgnet", "hgnetv2_b0", 64),
    _timm("hiera", "hiera_tiny_224", 64, img_size=64),
    _timm("hieradet_sam2", "sam2_hiera_tiny", 64),
    _timm("hrnet", "hrnet_w18_small", 64),
    _timm("iformer", "iformer_t", 64),
    _timm("inception_next", "inception_next_atto", 64),
    _timm("inception_resnet_v2", "inception_resnet_v2", 96),
    _timm("inception_v3", "inception_v3", 96),
    _timm("inception_v4", "inception_v4", 96),
    _timm("lcnetv2", "lcnetv2_small", 64),
    _timm("levit", "levit_128s", 224),
    _timm("levit", "levit_conv_128s", 224),
    _timm("lowformer", "lowformer_b0", 64),
    _timm("mambaout", "test_mambaout", 96),
    _timm("maxxvit", "test_coatnet", 160),
    _timm("maxxvit", "test_maxvit", 160),
    _timm("metaformer", "poolformer_s12", 64),
    _timm("metaformer", "caformer_s18", 64),
    _timm("mlp_mixer", "gmlp_ti16_224", 64, img_size=64),
    _timm("mlp_mixer", "mixer_s32_224", 64, img_size=64),
    _timm("mlp_mixer", "resmlp_12_224", 64, img_size=64),
    _timm("mobilenetv3", "mobilenetv3_small_050", 64),
    _timm("mobilenetv5", "mobilenetv5_base", 128),
    _timm("mobilevit", "mobilevit_xxs", 64),
    _timm("mobilevit", "mobilevitv2_050", 64),
    _timm("mvitv2", "mvitv2_tiny", 64, img_size=64),
    _timm("naflexvit", "naflexvit_base_patch16_gap", 64, depth=2, embed_dim=96, num_heads=3),
    _timm("nasnet", "nasnetalarge", 96),
    _timm("nest", "nest_tiny", 128, img_size=128),
    _timm("nextvit", "nextvit_small", 64),
    _timm("nfnet", "test_nfnet", 96),
    _timm("nfnet", "nf_regnet_b0", 64),
    _timm("pit", "pit_ti_224", 224),
    _timm("pit", "pit_ti_distilled_224", 224),
    _timm("pnasnet", "pnasnet5large", 96),
    _timm("pvt_v2", "pvt_v2_b0", 64),
    _timm("qwen3_vit", "qwen3_vit_88m", 64, depth=2),
    _timm("rdnet", "rdnet_tiny", 64),
    _timm("regnet", "regnetx_002", 64),
    _timm("regnet", "regnety_002", 64),
    _timm("repghost", "repghostnet_050", 64),
    _timm("repvit", "repvit_m1", 64),
    _timm("res2net", "res2net50_14w_8s", 64),
    _timm("resnest", "resnest14d", 64),
    _timm("resnet", "test_resnet", 96),
    _timm("resnet", "resnet18", 64),
    _timm("resnet", "seresnet50", 64),
    _timm("resnet", "ecaresnet26t", 64),
    _timm("resnet", "resnetblur50", 64),
    _timm("resnetv2", "resnetv2_50x1_bit", 64),
    _timm("resnetv2", "resnetv2_18d", 64),
    _timm("rexnet", "rexnet_100", 64),
    _timm("selecsls", "selecsls42", 64),
    _timm("senet", "legacy_seresnet18", 64),
    _timm("sequencer", "sequencer2d_s", 64, img_size=64),
    _timm("shvit", "shvit_s1", 128),
    _timm("sknet", "skresnet18", 64),
    _timm("starnet", "starnet_s050", 64),
    _timm("swiftformer", "swiftformer_xs", 224),
    _timm("swin_transformer", "swin_tiny_patch4_window7_224", 224, depths=(2, 2, 2, 2), embed_dim=48),
    _timm("swin_transformer_v2", "swinv2_tiny_window8_256", 256, depths=(2, 2, 2, 2), embed_dim=48),
    _timm("swin_transformer_v2_cr", "swinv2_cr_tiny_224", 224, depths=(2, 2, 2, 2), embed_dim=48),
    _timm("tiny_vit", "tiny_vit_5m_224", 224),
    _timm("tnt", "tnt_s_patch16_224", 64, img_size=64, depth=4),
    _timm("tresnet", "tresnet_m", 64),
    _timm("twins", "twins_svt_small", 64, img_size=64, depths=(1, 1, 2, 1)),
    _timm("twins", "twins_pcpvt_small", 64, img_size=64, depths=(1, 1, 2, 1)),
    _timm("vgg", "vgg11", 64),
    _timm("vgg", "vgg11_bn", 64),
    _timm("visformer", "visformer_tiny", 224),
    _timm("vision_transformer", "test_vit", 64, img_size=64),
    _timm("vision_transformer", "vit_small_patch14_dinov2", 56, 14, img_size=56, depth=4),
    _timm("vision_transformer", "vit_base_patch16_siglip_224", 64, img_size=64, depth=3),
    _timm("vision_transformer", "vit_small_patch14_reg4_dinov2", 56, 14, img_size=56, depth=4),
    _timm("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 64, img_size=64),
    _timm("vision_transformer_relpos", "test_vit_relpos", 64, img_size=64),
    _timm("vision_transformer_sam", "samvit_base_patch16_224", 64, img_size=64, depth=3, embed_dim=96, num_heads=3),
    _timm("vitamin", "vitamin_small_224", 64, img_size=64),
    _timm("volo", "volo_d1_224", 64, img_size=64),
    _timm("vovnet", "ese_vovnet19b_slim_dw", 64),
    _timm("xception", "legacy_xception", 96),
    _timm("xception_aligned", "xception41", 96),
    _timm("xcit", "xcit_nano_12_p16_224", 64),
)


def _open_clip(family: str, architecture: str, size: int, step: int = 32, **vision: Any) -> Entry:
    return Entry("open_clip", family, architecture, size, step, {"image_size": size, **vision})


OPEN_CLIP = (
    _open_clip("ViT", "ViT-B-32", 64, layers=3),
    _open_clip("ViT (quickgelu)", "ViT-S-16", 48, layers=3),
    _open_clip("ViT CLIPA (average pool)", "ViT-L-14-CLIPA", 56, 14, layers=2),
    _open_clip("ResNet", "RN50", 64, layers=[1, 1, 1, 1]),
    _open_clip("CoCa", "coca_ViT-B-32", 64, layers=3),
    _open_clip("ConvNeXt", "convnext_tiny", 64),
    _open_clip("SigLIP", "ViT-B-16-SigLIP", 224),
    _open_clip("SigLIP2", "ViT-B-32-SigLIP2-256", 256),
    _open_clip("EVA", "EVA02-B-16", 224),
    _open_clip("MobileCLIP", "MobileCLIP-S1", 64),
    _open_clip("MobileCLIP2", "MobileCLIP2-S0", 64),
    _open_clip("PE", "PE-Core-T-16-384", 384),
    _open_clip("ViTamin", "ViTamin-S", 224),
    _open_clip("Swin", "swin_base_patch4_window7_224", 224),
)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}
WINDOWS: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 2,
}


def _hf(family: str, model: str, size: int = 32, step: int = 8, **config: Any) -> Entry:
    return Entry("transformers", family, model, size, step, config)


TRANSFORMERS = (
    _hf("SigLIP", "SiglipVisionModel", **SMALL),
    _hf("SigLIP2 (NaFlex)", "Siglip2VisionModel", **{**SMALL, "num_patches": 16}),
    _hf("CLIP vision", "CLIPVisionModel", **SMALL),
    _hf("CLIP vision with projection", "CLIPVisionModelWithProjection", **SMALL, projection_dim=16),
    _hf("DINOv2", "Dinov2Model", **SMALL),
    _hf("DINOv2 (SwiGLU)", "Dinov2Model", **SMALL, use_swiglu_ffn=True),
    _hf("DINOv2 with registers", "Dinov2WithRegistersModel", **SMALL, num_register_tokens=4),
    _hf("DINOv3 ViT", "DINOv3ViTModel", **SMALL, num_register_tokens=4),
    _hf("DINOv3 ViT (gated MLP)", "DINOv3ViTModel", **SMALL, num_register_tokens=4, use_gated_mlp=True),
    _hf("DINOv3 ConvNeXt", "DINOv3ConvNextModel", 64, 32, **STAGES),
    _hf("ViT", "ViTForImageClassification", **SMALL, num_labels=10),
    _hf("DeiT", "DeiTForImageClassificationWithTeacher", **SMALL, num_labels=10),
    _hf("BEiT", "BeitForImageClassification", **SMALL, num_labels=10, use_relative_position_bias=True),
    _hf("Swin", "SwinForImageClassification", **WINDOWS, num_labels=10),
    _hf("SwinV2", "Swinv2ForImageClassification", **WINDOWS, num_labels=10),
    _hf("ConvNeXt", "ConvNextForImageClassification", 64, 32, **STAGES, num_labels=10),
    _hf("ConvNeXtV2", "ConvNextV2ForImageClassification", 64, 32, **STAGES, num_labels=10),
    _hf("ResNet", "ResNetForImageClassification", 64, 32, embedding_size=16, **STAGES, num_labels=10),
)


def entries(*, every_test_model: bool = True) -> list[Entry]:
    """All entries, with all of timm's `test_*` models and a member of any timm family that the table lacks."""
    import timm

    listed = list(TIMM)
    known = {entry.architecture for entry in listed}
    if every_test_model:
        for family in timm.list_modules():
            tests = [name for name in timm.list_models("test_*", module=family) if name not in known]
            listed += [_timm(family, name) for name in tests]
    families = {entry.family for entry in listed}
    for family in timm.list_modules():
        members = timm.list_models(module=family)
        if family not in families and members:
            listed.append(_timm(family, members[0]))
    listed.sort(key=lambda entry: entry.family)
    return [*listed, *OPEN_CLIP, *TRANSFORMERS]


def first_of_families() -> list[Entry]:
    """One entry of every family: the first that the tables name, and the first that timm lists of the others."""
    found: dict[tuple[str, str], Entry] = {}
    for entry in [*TIMM, *entries(every_test_model=False)]:
        found.setdefault((entry.library, entry.family), entry)
    return sorted(found.values(), key=lambda entry: [*LOADERS].index(entry.library))


def compare_entry(entry: Entry) -> tuple[float, float]:
    """How far an entry's teacher is from the library's own: (of prepared odd pictures, of outputs at its own size).

    The first over the largest number where that is above 1, the second relative. Both with random weights.
    """
    torch.manual_seed(0)
    teacher, pictures, theirs, own = COMPARISONS[entry.library](entry)
    with torch.no_grad():
        # SigLIP2's own keeps the aspect of a picture, which a batch of one size cannot.
        shown = odd_square() if "Siglip2" in entry.architecture else odd_pictures()
        prepared = picture_difference(teacher.preprocess.transform(), own, shown)
        return prepared, relative_error(teacher.model(pictures), theirs)


Compared = tuple[Teacher, torch.Tensor, torch.Tensor, Callable[[Any], torch.Tensor]]


@torch.no_grad()
def _compare_timm(entry: Entry) -> Compared:
    """timm's model of the same weights, without any argument of ours, and its transform."""
    import timm

    teacher = load_timm(entry.architecture, pretrained=False, **entry.args)
    model: Any = timm.create_model(entry.architecture, pretrained=False, **entry.args).eval()
    randomise(teacher.model, noise_pictures(2, _size(entry, teacher)))
    model.load_state_dict(teacher.model.state_dict())
    pictures = noise_pictures(1, _size(entry, teacher))
    config = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined]
    transform: Any = timm.data.create_transform(**config, is_training=False)  # type: ignore[attr-defined]
    return teacher, pictures, model(pictures), transform


@torch.no_grad()
def _compare_open_clip(entry: Entry) -> Compared:
    """open_clip's image tower of the same weights, and its transform."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    teacher = _load_open_clip(entry)
    config = teacher.source.model_args["config"]
    text = open_clip.CLIPTextCfg(**TINY_TEXT)
    visual: Any = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], text, config["quick_gelu"]).visual
    randomise(teacher.model, noise_pictures(2, _size(entry, teacher)))
    visual.eval().load_state_dict(teacher.model.get_submodule("visual").state_dict())
    pictures = noise_pictures(1, _size(entry, teacher))
    settings = PreprocessCfg(size=_size(entry, teacher))
    own = visual(pictures)
    record = open_clip_record(dataclasses.asdict(settings), settings.size)
    own = own if isinstance(own, torch.Tensor) else own[0]
    return dataclasses.replace(teacher, preprocess=record), pictures, own, image_transform_v2(settings, is_train=False)


@torch.no_grad()
def _compare_transformers(entry: Entry) -> Compared:
    """transformers' own model, called as its users call it, and the image processor of its type."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    model_class: Any = getattr(transformers, entry.architecture)
    model = model_class(model_class.config_class(**entry.args)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    kind = model.config.model_type.removesuffix("_vision_model")
    config_class: Any = transformers.AutoConfig.for_model(SIBLINGS.get(kind, kind))
    processor = IMAGE_PROCESSOR_MAPPING[type(config_class)]["torchvision"]()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        teacher = load_teacher(f"hf:{folder}")
    own = library_output_of(model, teacher.source.model_args["head"], model.config)
    assert own is not None
    return teacher, *own, lambda picture: pixels_of(processor(images=picture, return_tensors="pt"))


def _size(entry: Entry, teacher: Teacher) -> tuple[int, int]:
    return teacher.preprocess.at(entry.size).size


def load_entry(entry: Entry, dtype: torch.dtype = torch.float32) -> Teacher:
    """The teacher of an entry, with random weights that make a check mean something."""
    torch.manual_seed(0)
    teacher = LOADERS[entry.library](entry)
    # The pictures that `convert` checks on: with statistics of others, deep networks of random weights are chaotic.
    randomise(teacher.model, noise_pictures(2, teacher.preprocess.size))
    teacher.model.to(dtype)
    return teacher


def _load_timm(entry: Entry) -> Teacher:
    teacher = load_timm(entry.architecture, pretrained=False, **entry.args)
    return dataclasses.replace(teacher, preprocess=teacher.preprocess.at(entry.size))


def _load_open_clip(entry: Entry) -> Teacher:
    """The image tower of a configuration of open_clip's, with the entry's changes."""
    import open_clip

    config: Any = open_clip.get_model_config(entry.architecture)
    quick_gelu = bool(config.get("quick_gelu", False))
    vision = {**config["vision_cfg"], **entry.args}
    args = {
        "config": {"embed_dim": config["embed_dim"], "vision_cfg": vision, "quick_gelu": quick_gelu},
        "image_size": None,
    }
    source = Source(f"open_clip:{entry.architecture}", "open_clip", entry.architecture, args)
    assert entry.size is not None
    return Teacher(build(source), source, Preprocess((entry.size, entry.size), MEAN, STD))


def _load_transformers(entry: Entry) -> Teacher:
    """A small model that `save_pretrained` wrote, opened as any folder of a user's is."""
    import transformers

    model_class: Any = getattr(transformers, entry.architecture)
    with tempfile.TemporaryDirectory() as folder:
        model_class(model_class.config_class(**entry.args)).save_pretrained(folder)
        return load_teacher(f"hf:{folder}", image_size=entry.size)


LOADERS: dict[str, Callable[[Entry], Teacher]] = {
    "timm": _load_timm,
    "open_clip": _load_open_clip,
    "transformers": _load_transformers,
}
COMPARISONS: dict[str, Callable[[Entry], Compared]] = {
    "timm": _compare_timm,
    "open_clip": _compare_open_clip,
    "transformers": _compare_transformers,
}
