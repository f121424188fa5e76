"""Pictures are prepared as the source library prepares them, on photographs of all shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from bcosify.convert import Preprocess
from bcosify.convert.libraries.base import transforms
from bcosify.convert.libraries.comparison import check_outputs
from bcosify.convert.libraries.open_clip.preprocess import preprocess_of as open_clip_record
from bcosify.convert.libraries.transformers.preprocess import preprocess_of
from bcosify.core.errors import SourceError
from bcosify.core.pictures import without_ends
from bcosify.data.pictures import read_picture
from PIL import Image
from torch import nn
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

PROCESSORS = {
    "vit": ("ViTImageProcessor", {}),
    "vit small": ("ViTImageProcessor", {"size": {"height": 96, "width": 64}, "resample": 3}),
    "clip": ("CLIPImageProcessor", {}),
    "clip odd": ("CLIPImageProcessor", {"size": {"shortest_edge": 65}, "crop_size": {"height": 64, "width": 64}}),
    "dinov2": (
        "BitImageProcessor",
        {
            "size": {"shortest_edge": 256},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ),
    "siglip": ("SiglipImageProcessor", {}),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    "convnext large": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "deit": ("DeiTImageProcessor", {}),
    "beit": ("BeitImageProcessor", {"do_center_crop": True, "size": {"height": 256, "width": 256}}),
    "no mean": ("ViTImageProcessor", {"do_normalize": False, "resample": 1}),
    "bytes": ("ViTImageProcessor", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}),
    "plus minus one": (
        "ViTImageProcessor",
        {"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ),
    "dinov3": ("DINOv3ViTImageProcessor", {}),
    "nearest": ("ViTImageProcessor", {"size": {"height": 48, "width": 48}, "resample": 0}),
    "no rescaling": ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
    "efficientnet": ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}, "resample": 0}),
    "offset": (
        "EfficientNetImageProcessor",
        {
            "size": {"height": 72, "width": 72},
            "crop_size": {"height": 64, "width": 64},
            "do_center_crop": True,
            "rescale_factor": 1 / 127.5,
            "rescale_offset": True,
            "include_top": False,
        },
    ),
    "levit": ("LevitImageProcessor", {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}),
    "poolformer": (
        "PoolFormerImageProcessor",
        {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}, "crop_pct": 0.95},
    ),
    "convnext share": ("ConvNextImageProcessor", {"size": {"shortest_edge": 96}, "crop_pct": 0.8}),
    "segformer": ("SegformerImageProcessor", {"size": {"height": 96, "width": 64}}),
}


def photograph(name: str) -> Image.Image:
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    return Image.open(Path(spec.submodule_search_locations[0]) / "data" / name).convert("RGB")


def upright(name: str) -> Image.Image:
    return photograph(name).crop((10, 0, 242, 299))


def record_of(kind: str, folder: Path) -> tuple[Preprocess, object]:
    name, settings = PROCESSORS[kind]
    processor = getattr(transformers, name)(**settings)
    processor.save_pretrained(folder)
    return preprocess_of(folder, SimpleNamespace(image_size=32)), processor


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("read", [photograph, upright], ids=["wide", "upright"])
def test_a_picture_becomes_what_transformers_own_processor_makes_of_it(tmp_path, kind, read):
    record, processor = record_of(kind, tmp_path)
    picture = read("chelsea.png")
    ours = record.transform()(picture)
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    assert ours.shape == theirs.shape == (3, *record.size)
    # One grey level, in the processor's own units.
    level = 1 / 255 / min(record.std)
    assert (ours - theirs).abs().max() <= 1e-5 + 0.01 * level


def classifiers() -> list[str]:
    """Every image processor, slow and fast, that a type of image classifiers in transformers names."""
    kinds = set(IMAGE_PROCESSOR_MAPPING_NAMES) & set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES) - {"timm_wrapper"}
    return sorted({name for kind in kinds for name in IMAGE_PROCESSOR_MAPPING_NAMES[kind].values()})


FOLLOWED = "Beit Bit CLIP ConvNext DeiT EfficientNet Levit MobileNetV1 MobileNetV2 PoolFormer Pvt Segformer Siglip ViT"


@pytest.mark.parametrize("name", classifiers())
def test_every_image_processor_of_a_classifier_is_followed_or_refused_by_name(tmp_path, name):
    getattr(transformers, name)().save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    kind = type(processor).__name__
    try:
        record = preprocess_of(tmp_path, SimpleNamespace(image_size=32))
    except SourceError as error:
        assert kind in str(error) and kind.partition("Image")[0] not in FOLLOWED.split()
        return
    if kind != "Siglip2ImageProcessor":  # cuts patches, of pictures that keep their aspect
        picture = photograph("coffee.png")
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        assert (record.transform()(picture) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("MobileViTImageProcessor", {}, "do_flip_channel_order=True"),
        ("ViTImageProcessor", {"do_resize": False}, "does not resize"),
        ("ViTImageProcessor", {"size": {"longest_edge": 64}}, "not one size for all pictures"),
        ("ViTImageProcessor", {"size": {"height": 99999, "width": 64}}, "99,999 pixels a side"),
        ("ViTImageProcessor", {"rescale_factor": 0.0}, "rescales by 0"),
        ("PerceiverImageProcessor", {}, "adds a border"),
        ("CLIPImageProcessor", {"crop_size": {"height": 256, "width": 256}}, "adds a border"),
        ("PerceiverImageProcessor", {"crop_size": {"height": 200, "width": 200}}, "an odd-sized picture differs"),
        ("ViltImageProcessor", {}, "do_pad=True, size_divisor=32"),
    ],
)
def test_a_processor_that_is_not_followed_is_refused_by_name(tmp_path, name, settings, why):
    getattr(transformers, name)(**settings).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=why) as error:
        preprocess_of(tmp_path, SimpleNamespace(image_size=32), "hf:here")
    assert str(error.value).startswith(f"hf:here: its image processor {name}")


def test_a_setting_that_nobody_knows_is_not_ignored_and_a_missing_processor_is_not_guessed(tmp_path):
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_blur": 3}))
    with pytest.raises(SourceError, match="do_blur=3"):
        preprocess_of(tmp_path, SimpleNamespace(image_size=32))
    file.unlink()
    with pytest.raises(SourceError, match="no preprocessor_config.json in it, and transformers has no image processor"):
        preprocess_of(tmp_path, SimpleNamespace(image_size=32, model_type="unheard"))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_pillows_arithmetic_is_that_of_processors_without_torchvision(interpolation):
    settings = {"size": {"height": 65, "width": 49}, "resample": Image.Resampling[interpolation.upper()]}
    theirs = transformers.ViTImageProcessorPil(**settings)
    record = Preprocess((65, 49), (0.5,) * 3, (0.5,) * 3, interpolation, 1.0, "squash", "transformers-pil")
    picture = photograph("chelsea.png")
    wanted = theirs(images=picture, return_tensors="pt")["pixel_values"][0]
    assert (record.transform()(picture) - wanted).abs().max() <= 1e-5


def test_a_model_that_differs_from_its_librarys_own_is_refused():
    torch.manual_seed(0)
    model, pictures = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(1, 3, 2, 2)
    theirs = model(pictures).detach()
    check_outputs("timm:x", model, theirs, pictures, "Model")
    with pytest.raises(SourceError, match="timm:x: the teacher differs from the library's own Model by .* of 2 x 2"):
        check_outputs("timm:x", model, theirs * 1.001, pictures, "Model")


def test_a_record_goes_through_the_size_and_json(tmp_path):
    record, _ = record_of("dinov2", tmp_path)
    assert record.crop_pct == 224 / 256 and record.at(112).transform()(photograph("coffee.png")).shape == (3, 112, 112)
    assert record.library == "transformers" and record.mean == (0.485, 0.456, 0.406)


def test_without_a_processor_the_model_types_own_is_taken_at_the_models_size(tmp_path):
    for config, mean, size in (
        (transformers.ViTConfig(image_size=48), 0.5, 48),
        (transformers.SiglipVisionConfig(image_size=64), 0.5, 64),
        (transformers.CLIPVisionConfig(), 0.48145466, 224),
        (transformers.DINOv3ConvNextConfig(), 0.485, 224),
    ):
        record = preprocess_of(tmp_path, config)
        assert record.mean[0] == pytest.approx(mean) and record.size == (size, size)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [64, (48, 80)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_picture_becomes_what_open_clips_own_transform_makes_of_it(mode, size, interpolation):
    import open_clip

    values = {"mean": [0.5] * 3, "std": 0.25, "interpolation": interpolation, "resize_mode": mode, "fill_color": 7}
    record = open_clip_record(values, size)
    theirs = open_clip.image_transform(
        size, False, (0.5,) * 3, (0.25,) * 3, resize_mode=mode, interpolation=interpolation, fill_color=7
    )
    for read in (photograph, upright):
        picture = read("chelsea.png")
        assert torch.equal(record.transform()(picture), theirs(picture))


def test_an_unknown_librarys_arithmetic_is_refused():
    with pytest.raises(SourceError, match="cannot prepare pictures as 'caffe' does"):
        Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, library="caffe").transform()


THIN = """
import resource, sys
import torch
from PIL import Image
from bcosify.convert import Preprocess
torch.set_num_threads(1)
preprocess = Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, crop_pct=0.875, library=sys.argv[1])
transform = preprocess.transform()
transform(Image.new("RGB", (300, 200)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in ((1, 3000), (3000, 1)):
    assert transform(Image.new("RGB", size)).shape == (3, 224, 224)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does, in KiB")
@pytest.mark.parametrize("library", ["timm", "open_clip", "transformers", "transformers-float"])
def test_a_thin_picture_is_cropped_before_it_is_enlarged(library):
    """Enlarged first it would have 256 x 768,000 pixels: 590 MB."""
    ended = subprocess.run([sys.executable, "-c", THIN, library], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 50 * 1024


@pytest.mark.parametrize("library", ["timm", "open_clip", "transformers", "transformers-float"])
@pytest.mark.parametrize("size", [(900, 20), (20, 901), (631, 17), (27, 1000)])
def test_a_thin_picture_is_what_the_library_shows(library, size):
    strip = photograph("chelsea.png").resize(size)
    preprocess = Preprocess((64, 64), (0.0,) * 3, (1.0,) * 3, crop_pct=0.875, library=library)
    assert without_ends(strip) is not strip
    found, wanted = preprocess.transform()(strip), transforms()[library](preprocess)(strip)
    assert found.shape == wanted.shape == (3, 64, 64)
    # Sizes are rounded to whole pixels, so what is left is enlarged by a thousandth more or less.
    assert (found - wanted).abs().max() < 1.01 / 255 and (found - wanted).abs().mean() < 1e-4


def test_modes_that_show_the_whole_picture_show_its_ends_too():
    picture = photograph("chelsea.png").resize((900, 20))
    for mode in ("squash", "border"):
        preprocess = Preprocess((64, 64), (0.0,) * 3, (1.0,) * 3, crop_mode=mode)
        assert torch.equal(preprocess.transform()(picture), transforms()["timm"](preprocess)(picture))


def test_a_preprocess_normalises_and_back():
    preprocess = Preprocess((4, 4), (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    colours = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor(preprocess.mean).view(3, 1, 1), torch.tensor(preprocess.std).view(3, 1, 1)
    torch.testing.assert_close(preprocess.normalise(colours), (colours - mean) / std)
    torch.testing.assert_close(preprocess.denormalise(preprocess.normalise(colours)), colours)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_what_pillow_opens_is_read_by_the_same_rule_as_files(tmp_path, mode):
    cat = photograph("chelsea.png")
    grey = np.asarray(cat.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    transform = Preprocess((32, 32), (0.5,) * 3, (0.25,) * 3, crop_mode=mode).transform()
    for name, wanted in (("turned", cat.transpose(Image.Transpose.ROTATE_270)), ("deep", Image.fromarray(grey))):
        for opened in (Image.open(tmp_path / f"{name}.png"), read_picture(tmp_path / f"{name}.png")):
            assert torch.equal(transform(opened), transform(wanted))


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_picture_too_thin_to_be_shown_whole_loses_its_ends(library, size):
    record = Preprocess((32, 32), (0.5,) * 3, (0.25,) * 3, crop_mode="border", library=library)
    assert record.transform()(Image.new("RGB", size, "red")).shape == (3, 32, 32)
