"""The samples of a training as datasets, and their collation into batches.

Every item carries its row number in the shards, so that a failure can name the samples of its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minicpmv_finetune.data.samples import Split
from minicpmv_finetune.minicpmv.batch import collate, collate_packed
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.shards.format import Manifest, ShardReader
from minicpmv_finetune.shards.sharing import row_lengths

from .feature_store import FeatureStore, PatchFeatures, feature_arguments


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        number: Number of its row in the shards.
        row: Tokens, labels and, if no features are stored, images.
        features: Stored outputs of the vision tower, if there are any.
        shared: Number of first tokens, with all images, that it shares with the sample before it in its row.
    """

    number: int
    row: ModelInput
    features: PatchFeatures | None
    shared: int = 0


class ExampleDataset(Dataset[Example]):
    """The samples of one split; a loader's workers open the files again."""

    def __init__(self, shards: Path, split: Split, features: Path | None) -> None:
        """Open the files.

        Args:
            shards: Folder of the shards.
            split: Which of the splits.
            features: Folder of the split's feature store; without it the images are read.
        """
        self.features = FeatureStore(features) if features else None
        self.reader = ShardReader(shards, split, images=self.features is None)
        self.shards = shards

    @cached_property
    def texts(self) -> ShardReader:
        """The same samples without their images, which only samples that share images need."""
        return ShardReader(self.shards, self.reader.split, images=False) if self.features is None else self.reader

    @property
    def lengths(self) -> Sequence[int]:
        """Number of tokens of each sample."""
        return self.reader.manifest.lengths[self.reader.split]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> Example:
        return Example(position, self.reader[position], self.features[position] if self.features else None)

    def without_images(self, position: int, shared: int) -> Example:
        """A sample that shares its images, and so many of its first tokens, with the sample before it in its row."""
        return Example(position, self.texts[position], None, shared)


@dataclass(frozen=True)
class PackDataset(Dataset[list[Example]]):
    """Packs of samples, each of which becomes one row of a batch.

    The packs are computed once for the whole training and then shuffled as samples are; so a training that resumes
    from a checkpoint finds its position among them by counting.

    Attributes:
        examples: The samples.
        packs: The packs, each as the positions of its samples.
        shared: Number of first tokens that each sample shares with the one before it in its pack, by its position.
    """

    examples: ExampleDataset
    packs: Sequence[Sequence[int]]
    shared: Sequence[int]

    @property
    def lengths(self) -> Sequence[int]:
        """Number of tokens of each pack."""
        lengths = self.examples.lengths
        return row_lengths(self.packs, lengths, self.shared)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[Example]:
        return [
            self.examples.without_images(position, self.shared[position])
            if self.shared[position]
            else self.examples[position]
            for position in self.packs[number]
        ]


@dataclass(frozen=True)
class Collator:
    """Makes the model's arguments from samples or packs, and adds the samples' row numbers as `rows`.

    A batch of packs also has `shared_tokens`, the number of tokens that it does not have again.

    Attributes:
        manifest: Manifest of the shards.
    """

    manifest: Manifest

    def __call__(self, items: Sequence[Example | list[Example]]) -> dict[str, Any]:
        """Collate the items of a dataset."""
        examples = [example for item in items for example in (item if isinstance(item, list) else [item])]
        rows = [example.row for example in examples]
        patch_size, resampler = self.manifest.patch_size, self.manifest.slicing["resampler"]
        if isinstance(items[0], list):
            shared = [example.shared for example in examples]
            batch = collate_packed(rows, patch_size, resampler, normalized=False, shared=shared)
            batch["shared_tokens"] = sum(shared)
        else:
            batch = collate(rows, self.manifest.pad_token_id, patch_size, "right", resampler, normalized=False)
        features = [example.features for example in examples if example.features is not None]
        return {
            **batch,
            **(feature_arguments(features) if features else {}),
            "rows": [example.number for example in examples],
        }
