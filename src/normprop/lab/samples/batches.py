"""The mini-batches of an epoch, whose order and augmentation depend on (seed, epoch) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from normprop.lab.samples.seeds import derived


class Batches:
    """An epoch over images `(n, channels, height, width)` or vectors `(n, features)`, without an incomplete last batch.

    All random numbers of the epoch are drawn at once, so that a batch doesn't depend on those before it: a run continues
    where it stopped, and processes share a batch without communication.

    Args:
        x: Samples.
        y: Their classes.
        batch_size: Samples per batch, at most as many as there are.
        seed: The run's seed.
        epoch: The epoch, from 0.
        flips: Mirror each image with probability ½.
        crops: Shift each image by up to this many pixels, zeros moving in.

    Example:
        >>> x, y = torch.arange(10)[:, None], torch.arange(10)
        >>> epoch = Batches(x, y, batch_size=4, seed=0, epoch=3)
        >>> len(epoch), epoch.batch(1)[0].shape
        (2, torch.Size([4, 1]))
    """

    def __init__(
        self, x: Tensor, y: Tensor, *, batch_size: int, seed: int, epoch: int, flips: bool = False, crops: int = 0
    ) -> None:
        self.x, self.y, self.batch_size, self.flips, self.crops = x, y, batch_size, flips, crops
        g = torch.Generator().manual_seed(derived(seed, epoch))
        self._order = torch.randperm(len(x), generator=g)
        self._mirror = torch.rand(len(x), generator=g) < 0.5
        self._shift = torch.randint(0, 2 * crops + 1, (len(x), 2), generator=g)

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Samples and classes of one batch, or of every `world`-th sample of it from `rank` on."""
        places = slice(step * self.batch_size + rank, (step + 1) * self.batch_size, world)
        chosen = self._order[places]
        x = self.x[chosen]
        if self.flips or self.crops:
            x = self._augmented(x, places)
        return x, self.y[chosen]

    def _augmented(self, x: Tensor, places: slice) -> Tensor:
        """The images mirrored and shifted by the random numbers for these places in the epoch."""
        # Not v2.RandomCrop and RandomHorizontalFlip: they draw from the global generator, once for a whole batch, and image
        # by image they take six times as long.
        from torchvision.transforms.v2 import functional as F  # slow to import, and needed here only

        if self.flips:
            x = torch.where(self._mirror[places, None, None, None], F.horizontal_flip(x), x)
        if self.crops:
            size, corners = list(x.shape[-2:]), self._shift[places].tolist()
            padded = F.pad(x, [self.crops])
            x = torch.stack([F.crop(image, *corner, *size) for image, corner in zip(padded, corners, strict=True)])
        return x
