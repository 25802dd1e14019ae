"""Samplers whose order depends on (seed, epoch, index) alone, and loaders that follow them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.warnings import PossibleUserWarning
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from .dataset import ImageDataset
from .drawing import Key, stream_seed

SHUFFLED, POISSON = "shuffled", "poisson"
SAMPLINGS = (SHUFFLED, POISSON)
_WORKER_ADVICE = r"The '\w+_dataloader' does not have many workers"


class EpochSampler(DistributedSampler):
    """Yields this rank's keys (epoch, index) of an epoch in an order that depends on (seed, epoch) alone.

    It is a ``DistributedSampler``, so Lightning calls ``set_epoch`` and leaves it in place, with or without
    ``use_distributed_sampler``. Across ranks the epoch is dealt out like cards. Where the ranks do not come out even,
    ``drop_last`` leaves out the remainder; otherwise the first images of the order are dealt a second time.

    Attributes:
        start: How many of this rank's keys the next iteration leaves out, having been consumed before a restart.
    """

    def __init__(self, dataset: Dataset, *, seed: int, drop_last: bool, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=drop_last)
        self.start = 0

    def order(self) -> list[int]:
        """Return this rank's indices of the epoch."""
        length = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", self.epoch))
        order = torch.randperm(length, generator=generator).tolist()
        while len(order) < self.total_size:
            order += order[: self.total_size - len(order)]
        return order[self.rank : self.total_size : self.num_replicas]

    def __iter__(self) -> Iterator[Key]:
        return iter([(self.epoch, index) for index in self.order()[self.start :]])


class PoissonSampler(EpochSampler):
    """Yields batches of keys, each image in each batch with the same probability, as DP-SGD draws.

    A batch has ``batch_size`` images on average, now and then none. It depends on (seed, epoch, batch) alone.

    Attributes:
        rate: The probability.
        salt: What is drawn hangs on it as well; nobody who knows the seed alone can repeat it.
        start: How many batches the next iteration leaves out.
    """

    def __init__(self, dataset: Dataset, *, seed: int, batch_size: int, drop_last: bool) -> None:
        super().__init__(dataset, seed=seed, drop_last=drop_last)
        length = len(dataset)  # type: ignore[arg-type]
        if not 1 <= batch_size <= length:
            raise ValueError(
                f"sampling=poisson draws batch_size={batch_size} of {length} training images on average; use a "
                f"batch_size of at most {length}"
            )
        self.rate = batch_size / length
        self.batches = length // batch_size if drop_last else -(-length // batch_size)
        self.salt = ""

    def batch(self, number: int) -> list[int]:
        """Return the indices of a batch of the epoch."""
        place = stream_seed(self.seed, f"poisson{self.salt}", self.epoch, number)
        drawn = torch.rand(len(self.dataset), generator=torch.Generator().manual_seed(place), dtype=torch.float64)  # type: ignore[arg-type]
        return torch.nonzero(drawn < self.rate).flatten().tolist()

    def __iter__(self) -> Iterator[list[Key]]:  # type: ignore[override]
        for number in range(self.start, self.batches):
            yield [(self.epoch, index) for index in self.batch(number)]

    def __len__(self) -> int:
        return self.batches


class ShardSampler(DistributedSampler):
    """Yields this rank's share of the indices in order, none twice: shares may differ by one image.

    A ``DistributedSampler`` would repeat images to even the ranks out, which skews the metrics.
    """

    def __init__(self, dataset: Dataset, *, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def even_batch_size(length: int, ranks: int, batch_size: int) -> int:
    """Return the least batch size from ``batch_size`` on that cuts all ranks' shares into equally many batches.

    Ranks that ran different numbers of batches would wait for each other for ever.
    """
    shortest, uneven = divmod(length, ranks)
    while uneven and shortest and shortest % batch_size == 0:
        batch_size += 1
    return batch_size


class EpochLoader(DataLoader):
    """A loader over an :class:`EpochSampler` that continues a restarted epoch where training had stopped.

    Lightning's trainer calls :meth:`load_state_dict` on a restart. The position itself is Lightning's own count of the
    batches that training consumed, read through ``progress`` when the first batch is asked for: only then are its
    counters restored and put right for where the checkpoint was saved. What workers had prefetched was never counted.

    Args:
        progress: Returns the epoch that training is in and how many of its batches it has consumed.
        **options: Arguments of ``DataLoader``; ``sampler`` must be an :class:`EpochSampler`.
    """

    def __init__(self, *args: Any, progress: Callable[[], tuple[int, int]], **options: Any) -> None:
        super().__init__(*args, **options)
        self.progress = progress
        self._saved: dict[str, Any] | None = None
        self._restored = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is prefetched before Lightning has set the epoch.
        sampler = self.sampler
        assert isinstance(sampler, EpochSampler)
        batches = 0
        if self._restored:
            # Restarted by `max_steps` from an epoch's end, Lightning 2.6 calls `set_epoch` with one epoch too many.
            epoch, consumed = self.progress()
            sampler.set_epoch(epoch)
            if self._saved is not None:
                batches = consumed
                self._check_order(batches)
        sampler.start = batches * (self.batch_size or 1)  # a sampler of whole batches counts these
        yield from super().__iter__()

    def _check_order(self, batches: int) -> None:
        saved, self._saved = self._saved, None
        if batches and saved != self.state_dict():
            raise ValueError(
                "a run can only resume inside an epoch with the data order it was saved with: the checkpoint has "
                f"{saved}, this run has {self.state_dict()}; restore those settings or start from a checkpoint saved "
                "at an epoch's end"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what fixes the order and the batches of an epoch; the position is in the trainer's own state."""
        sampler = self.sampler
        assert isinstance(sampler, EpochSampler)
        return {
            "images": len(sampler.dataset),  # type: ignore[arg-type]
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "seed": sampler.seed,
            "ranks": sampler.num_replicas,
        } | ({"rate": sampler.rate} if isinstance(sampler, PoissonSampler) else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue the epoch that ``state`` was saved in."""
        self._saved = dict(state)
        self._restored = True


@dataclasses.dataclass(frozen=True)
class Loaders:
    """A data module's loaders, as they are under its trainer.

    Args:
        num_workers: Worker processes of each loader.
        pin_memory: Page-lock batches for the copy to a GPU; without a GPU it has no effect.
        seed: Seed of the order of training images.
        trainer: The trainer, which knows the ranks and the place in the run; ``None`` is one device at the start.
    """

    num_workers: int
    pin_memory: bool
    seed: int
    trainer: pl.Trainer | None

    def training(self, dataset: ImageDataset, batch_size: int, drop_last: bool, poisson: bool = False) -> DataLoader:
        """Return the loader of this rank's training batches.

        Args:
            dataset: The images.
            batch_size: Images in a batch; on average where batches are drawn at random.
            drop_last: Whether a last, smaller batch is left out.
            poisson: Whether batches are drawn by a :class:`PoissonSampler`.

        Raises:
            ValueError: ``drop_last`` leaves no batch, or batches are to be drawn on several devices.
        """
        if self._overfits:
            # Lightning's switch for debugging replaces any sampler but this one: the same images in every epoch.
            return self.batches(dataset, SequentialSampler(dataset), batch_size, persistent=True)
        ranks, rank = self._ranks
        if poisson:
            if ranks > 1:
                raise ValueError(f"sampling=poisson draws batches on one device, this run has {ranks}; set devices=1")
            drawn = PoissonSampler(dataset, seed=self.seed, batch_size=batch_size, drop_last=drop_last)
            return self.batches(dataset, drawn, None, persistent=True, kind=EpochLoader, progress=self._progress)
        sampler = EpochSampler(dataset, seed=self.seed, drop_last=drop_last, num_replicas=ranks, rank=rank)
        if drop_last and len(sampler) < batch_size:
            raise ValueError(
                f"batch_size={batch_size} on {ranks} device(s) leaves no whole batch of {len(dataset)} training "
                f"images; use a batch_size of at most {len(sampler)} or drop_last=False"
            )
        options = {"drop_last": drop_last, "progress": self._progress}
        return self.batches(dataset, sampler, batch_size, persistent=True, kind=EpochLoader, **options)

    def evaluation(self, dataset: ImageDataset, batch_size: int, persistent: bool = False) -> DataLoader:
        """Return a loader of this rank's share of a whole split in order.

        Args:
            dataset: The split.
            batch_size: Images in a batch; a few more where the ranks would not have equally many batches.
            persistent: Keep the workers between epochs.
        """
        ranks, rank = self._ranks
        if ranks == 1 or self._overfits:
            return self.batches(dataset, SequentialSampler(dataset), batch_size, persistent=persistent)
        sampler = ShardSampler(dataset, num_replicas=ranks, rank=rank)
        return self.batches(dataset, sampler, even_batch_size(len(dataset), ranks, batch_size), persistent=persistent)

    def batches(
        self,
        dataset: ImageDataset,
        sampler: Iterable[Any],
        batch_size: int | None,
        *,
        persistent: bool = False,
        kind: type[DataLoader] = DataLoader,
        **options: Any,
    ) -> DataLoader:
        """Return a loader of the batches of a sampler's keys.

        Args:
            dataset: The images.
            sampler: Their keys, an index or (epoch, index) each.
            batch_size: Images in a batch; ``None`` where the sampler yields the keys of whole batches.
            persistent: Keep the workers between epochs.
            kind: Class of the loader.
            **options: Further arguments of that class.
        """
        if dataset.cache is not None:
            # Lightning's advice is right where pictures are decoded on the way; from memory, workers only cost.
            warnings.filterwarnings("ignore", _WORKER_ADVICE, PossibleUserWarning)
        return kind(
            dataset,
            sampler=sampler,
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=as_is,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=persistent and self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else each iterator draws from the global generator
            **options,
        )

    @property
    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    @property
    def _overfits(self) -> bool:
        return self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]

    def _progress(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready


def as_is(batch: Any) -> Any:
    """Collate nothing: the dataset returns whole batches."""
    return batch
