"""Folders of models as their own libraries write them, tiny and made here; and records signed again after a change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from bcosify.convert.randomise import randomise

from configs import VISION, WORDS


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


def write_hf(folder: Path, model: str, config: str, **settings) -> Path:
    """What `save_pretrained` of a transformers model class writes, with randomised weights."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    randomise(made).save_pretrained(folder)
    return folder


def write_hf_clip(folder: Path) -> Path:
    """A CLIP of transformers with image processor and tokenizer."""
    from transformers import CLIPImageProcessor

    write_hf(folder, "CLIPModel", "CLIPConfig", text_config=WORDS, vision_config=VISION, projection_dim=24)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_open_clip(folder: Path, model: dict | None = None, text: dict | None = None, **vision) -> Path:
    """A folder as open_clip writes it, of randomised weights."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    words = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, **(text or {})}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": words, **(model or {})}
    prepared = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": prepared}))
    torch.manual_seed(0)
    made = randomise(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    state = {key: value.contiguous() for key, value in made.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def resigned(folder: Path, **changes) -> Path:
    """A student's folder with a record that was changed by someone who knows how it is signed."""
    path = folder / "bcosify.json"
    record = json.loads(path.read_text()) | changes
    for part, place in (("files", folder), ("text", folder / "text")):
        known = {name: place / name for name in record.get(part) or {}}
        record |= {part: {name: _digest(file) for name, file in known.items()}} if known else {}
    rest = {key: value for key, value in record.items() if key != "digest"}
    record["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(record))
    return folder


def _digest(file: Path) -> str:
    """sha256 of a file; of nothing where a name leads nowhere."""
    return hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()
