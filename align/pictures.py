"""The pictures of a run: batches to train on, those that gains and statistics come from, those to measure on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..convert import Preprocess
from ..data.bad import BadSample, BadSamples
from ..data.index import ShardIndex
from ..data.loader import Batch, held_out_batches, training_batches
from ..data.stream import Stream
from ..data.views import Augment, Mixing, to_model_input
from .recipe import Recipe

__all__ = ["Pictures"]

# The student that is measured and saved has statistics of so many pictures, in batches of this size.
STATISTICS_PICTURES, STATISTICS_BATCH = 256, 32


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """What a run sees of its shards.

    Attributes:
        preprocess: the teacher's, by which pictures are normalised.
        train, val: to train and to measure on.
        bad: the broken pictures of `train`, of all processes.
        noted: those of this process since `share_noted`.
        memory_format: in which the models read pictures.
    """

    recipe: Recipe
    accelerator: Accelerator
    preprocess: Preprocess
    train: ShardIndex | Stream
    val: ShardIndex
    bad: BadSamples
    memory_format: torch.memory_format = torch.contiguous_format
    noted: list[BadSample] = dataclasses.field(default_factory=list)

    def note(self, bad: Sequence[BadSample]) -> None:
        """Counts the broken pictures of a batch: at once, or with those of other processes when all share theirs."""
        self.noted.extend(bad)
        if self.accelerator.num_processes == 1:
            self.share_noted()

    def share_noted(self) -> None:
        """Tells all processes what each has noted; all must call it at the same step.

        Raises DataError in every process where too many pictures are broken.
        """
        noted, self.noted[:] = list(self.noted), []
        self.bad.add(gather_object(noted) if self.accelerator.num_processes > 1 else noted)

    @property
    def augment(self) -> Augment:
        recipe = self.recipe
        return Augment(scale=recipe.crop_scale, flip=recipe.flip, turn=recipe.turn, colour=recipe.colour)

    def normalised(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) to what teacher and student take, on the device."""
        taken = to_model_input(pictures, self.preprocess.mean, self.preprocess.std, self.accelerator.device)
        return taken.contiguous(memory_format=self.memory_format)

    def batches(self, first: int, end: int) -> Iterator[Batch]:
        """This process's batches of steps [first, end)."""
        batches = training_batches(
            self.train,
            seed=self.recipe.seed,
            global_batch=self.recipe.batch_size,
            first_step=first,
            steps=end - first,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            size=self.recipe.image_sizes or self.recipe.image_size,
            augment=self.augment,
            mixing=Mixing(self.recipe.mixup, self.recipe.cutmix),
            workers=self.recipe.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(batches)

    def calibration(self, count: int) -> Tensor:
        """The same pictures in every process and after every resume: gains must agree, or DDP's copies part.

        Where there are fewer pictures than asked for, they come again, each in another crop.
        """
        batch = min(16, count, len(self.train)) if isinstance(self.train, ShardIndex) else min(16, count)
        batches = training_batches(
            self.train,
            seed=self.recipe.seed + 1,
            global_batch=batch,
            steps=-(-count // batch),
            size=self.recipe.image_size,
            augment=self.augment,
        )
        return self.normalised(torch.cat([item.pictures for item in batches])[:count])

    def statistics(self) -> Sequence[Tensor]:
        """What statistics and gains at rest come from, each (B, 3, H, W); the same in every process."""
        return self.calibration(STATISTICS_PICTURES).split(STATISTICS_BATCH)

    def held_out(self) -> Iterator[Tensor]:
        """The held-out pictures in their order, normalised, batch by batch."""
        for batch in held_out_batches(self.val, size=self.recipe.image_size):
            yield self.normalised(batch.pictures)
