"""transformers: the model type `bcosify`, for `AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and
`AutoImageProcessor`, whatever library the student's source is of.

`from_pretrained` opens the folder as `load` does, with all its checks, instead of transformers' own loading, which
draws what is missing at random. Weights keep the student's own names, below `network`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..convert import Preprocess, Student, load, save
from ..convert.hub import CONFIG, student_folder
from ..convert.libraries import CLASSES, FEATURES, LABELS, REGRESSION, find_library
from ..convert.library_files import ARCHITECTURE
from ..convert.output import output_kind
from ..core.errors import CheckpointError

__all__ = [
    "BcosifyConfig",
    "BcosifyForImageClassification",
    "BcosifyImageProcessor",
    "BcosifyModel",
    "BcosifyOutput",
    "register",
]

# What config.json may say to transformers: what `library_files.config_of` writes, and what transformers itself adds.
CONFIG_KEYS = {
    *("architecture", "num_classes", "num_features", "model_args", "pretrained_cfg", "model_type", "architectures"),
    *("image_processor_type", "id2label", "label2id", "num_labels", "bcosify", "transformers_version", "dtype"),
    *("problem_type", "torch_dtype", "_name_or_path"),
}
# Options of `from_pretrained` that say where the files are; `load` hands them to huggingface_hub.
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# Options that transformers adds itself, or that ask for what is always so here.
IGNORED = ("trust_remote_code", "adapter_kwargs", "_from_auto", "use_safetensors", "low_cpu_mem_usage", "proxies")


def register() -> None:
    """Adds the model type to transformers' auto classes."""
    AutoConfig.register(ARCHITECTURE, BcosifyConfig, exist_ok=True)
    AutoModel.register(BcosifyConfig, BcosifyModel, exist_ok=True)
    AutoModelForImageClassification.register(BcosifyConfig, BcosifyForImageClassification, exist_ok=True)
    processors = {"torchvision": BcosifyImageProcessor, "pil": BcosifyImageProcessor}
    AutoImageProcessor.register(BcosifyConfig, image_processor_classes=processors, exist_ok=True)


class BcosifyConfig(PreTrainedConfig):
    """What config.json says to transformers: classes and their names. What builds the network is bcosify.json's."""

    model_type = ARCHITECTURE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """As transformers does, of what is known here alone: other keys name kernels or code that it would fetch."""
        return super().from_dict({key: value for key, value in config_dict.items() if key in CONFIG_KEYS}, **options)


@dataclasses.dataclass
class BcosifyOutput(ModelOutput):
    """What a student without its classifier says of pictures.

    Attributes:
        last_hidden_state: the source's last features before pooling, as its own library lays them out; None where it
            does not show them.
        pooler_output: (B, D) what is pooled of them: where the student has no classes, exactly its output.
        image_embeds: (B, D) the embedding of a dual encoder, which is its output then.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    image_embeds: Tensor | None = None


class _Opened(PreTrainedModel):
    """A student's network as a model of transformers."""

    config_class = BcosifyConfig
    main_input_name = "pixel_values"
    network: nn.Module

    def __init__(self, config: BcosifyConfig, student: Student | None = None) -> None:
        if student is None:
            raise CheckpointError(
                f"{type(self).__name__} has no configuration to be built from: a student is made by `bcosify convert`, "
                f"and opened with {type(self).__name__}.from_pretrained(FOLDER or ORG/REPO)."
            )
        super().__init__(config)
        self.student, self.network = student, student.model
        self.output = output_kind(student).kind
        self.has_classes = self.output != FEATURES

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, config: Any = None, **options: Any) -> Self:
        """The student in a folder or a hub repository, in eval mode.

        Args:
            options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`; `dtype`, `device_map` (one
                device).

        Raises:
            CheckpointError: as `load`; or an option that a converted model does not have.
        """
        hub = {name: options.pop(name) for name in HUB if options.get(name) is not None}
        dtype = _dtype(options.pop("dtype", None), options.pop("torch_dtype", None))
        device = _device(options.pop("device_map", None))
        wrong = [name for name, value in options.items() if name not in (*HUB, *IGNORED) and value is not None]
        if wrong:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: a converted model is not opened with {', '.join(wrong)}. Options "
                f"that it takes: dtype, device_map, {', '.join(HUB)}."
            )
        student = load(pretrained_model_name_or_path, **hub)
        cls._check(student, pretrained_model_name_or_path)
        if not isinstance(config, BcosifyConfig):
            config = BcosifyConfig.from_pretrained(student_folder(pretrained_model_name_or_path, **hub))
        model: Any = cls(config, student)
        model.name_or_path = str(pretrained_model_name_or_path)
        if dtype is not None:
            model.to(dtype)
        return (model if device is None else model.to(device)).eval()

    @classmethod
    def _check(cls, student: Student, place: Any) -> None:
        """Raises CheckpointError where this class has nothing to say of the student."""

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Writes the student's folder, as `bcosify.convert.save` does; raises CheckpointError where there is one."""
        save(self.student, save_directory)

    def push_to_hub(self, repo_id: str, *_: Any, **__: Any) -> Any:
        """Always raises CheckpointError: a student has a card, a licence and checks of its own to pass."""
        raise CheckpointError(f"Use `bcosify publish FOLDER {repo_id}`, which checks the folder and writes its card.")


class BcosifyModel(_Opened):
    """Pictures -> features or embeddings (see BcosifyOutput)."""

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **_: Any) -> Any:
        library = find_library(self.student.source.library)
        output = BcosifyOutput(*library.features(self.network, pixel_values, self.has_classes))
        return output if return_dict is not False else output.to_tuple()


def _squared_error(values: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.mse_loss(values, labels.to(values).reshape(values.shape))


def _label_error(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits))


LOSSES = {CLASSES: nn.functional.cross_entropy, LABELS: _label_error, REGRESSION: _squared_error}


class BcosifyForImageClassification(_Opened):
    """Pictures -> logits, and where labels are given the loss that transformers has for outputs of this kind."""

    @classmethod
    def _check(cls, student: Student, place: Any) -> None:
        if output_kind(student).kind == FEATURES:
            raise CheckpointError(
                f"{place} has no classes: its outputs are features. Open it with AutoModel.from_pretrained({place!r})."
            )

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **_: Any
    ) -> Any:
        logits = self.network(pixel_values)
        loss: Any = None if labels is None else LOSSES[self.output](logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()


class BcosifyImageProcessor(BaseImageProcessor):
    """Pictures -> `pixel_values`, by the student's own transform: the arithmetic of the library that it comes from."""

    model_input_names = ["pixel_values"]

    def __init__(self, bcosify: dict[str, Any] | None = None, **_: Any) -> None:
        """Args: bcosify: that part of config.json; raises CheckpointError where it says nothing of pictures."""
        super().__init__()
        self.bcosify = bcosify
        try:
            record = Preprocess.from_json((bcosify or {})["preprocess"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"config.json does not say how pictures are prepared ({error!r}): no converted model, or one saved by "
                "an older version. Save it again: bcosify.convert.save(load(FOLDER), OTHER)."
            ) from error
        self._transform = record.transform()

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json, which holds this too."""
        options.setdefault("image_processor_filename", CONFIG)
        return super().get_image_processor_dict(pretrained_model_name_or_path, **options)

    def to_dict(self) -> dict[str, Any]:
        """What builds it again."""
        return {"image_processor_type": type(self).__name__, "bcosify": self.bcosify}

    def preprocess(self, images: Any, return_tensors: Any = "pt", **_: Any) -> BatchFeature:
        """One picture or several (PIL, arrays or tensors in 0..255) -> `pixel_values` (B, 3, H, W)."""
        flat: Any = make_flat_list_of_images(images)
        tensors = torch.stack([self._transform(to_pil_image(picture)) for picture in flat])
        return BatchFeature({"pixel_values": tensors}, tensor_type=return_tensors)


def _dtype(*given: Any) -> torch.dtype | None:
    """The precision asked for; "auto" is the folder's own."""
    value = next((one for one in given if one is not None and one != "auto"), None)
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not isinstance(found, torch.dtype):
        raise CheckpointError(
            f"dtype={value!r} is none of torch's. Pass torch.float32, torch.bfloat16 or torch.float16."
        )
    return found


def _device(device_map: Any) -> Any:
    """The one device asked for: {"": device}, or its name or number; "auto" is a GPU where there is one."""
    value = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else device_map
    if isinstance(value, dict) or value in ("balanced", "balanced_low_0", "sequential"):
        raise CheckpointError(f"device_map={device_map!r}: a converted model stays on one device. Pass its name.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if value == "auto" else value
