"""What a moment lane computes for one call of one site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from normprop.graph.node import Node

Key = tuple[str, int]


@dataclass(eq=False)
class Entry:
    """What the lane computes for one call of one site.

    Attributes:
        site: path of the site.
        call: which of its calls.
        layer: path of the layer that takes the effective weight; None for an affine in the site's place.
        scale: the lane's node of its `Scale`.
        moments: the lane's node of what the site reads; None for standardised input.
        options: of `site_scales`.
        bare: the layer had no normaliser: nothing calls the site.
        rank: of the tensor that the site gives, in the record.
        channel: dimension of its channels.
        eps: what `moments` holds besides the variance of what the site reads.
        site_names: the path of the site, taken apart.
        layer_names: that of the layer.
        key: what tells it from all others.
    """

    site: str
    call: int
    layer: str | None
    scale: Node
    moments: Node | None
    options: Mapping[str, Any]
    bare: bool = False
    rank: int = 2
    channel: int = 1
    eps: float = 0.0
    site_names: tuple[str, ...] = field(init=False)
    layer_names: tuple[str, ...] = field(init=False)
    key: Key = field(init=False)

    def __post_init__(self) -> None:
        self.site_names, self.layer_names = (
            tuple(filter(None, (path or "").split("."))) for path in (self.site, self.layer)
        )
        self.key = self.site, self.call
