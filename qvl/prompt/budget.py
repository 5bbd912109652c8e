"""How many visual tokens a picture may cost, and the size that follows from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qvl.prompt.visual import FACTOR

PIXELS_PER_TOKEN = FACTOR * FACTOR
MOST_RATIO = 200


@dataclass(frozen=True, kw_only=True)
class ImageBudget:
    """The one name for image size: tokens of the prompt. Pixels follow. A fraction is allowed so that any area of a
    preprocessor_config.json can be stated exactly."""

    min_tokens: float = 64
    max_tokens: float = 16384

    def __post_init__(self) -> None:
        if not 0 < self.min_tokens <= self.max_tokens < math.inf:
            raise ValueError(
                f"the image budget is {self.min_tokens} to {self.max_tokens} tokens; expected 0 < min_tokens <= max_tokens."
            )

    @property
    def min_pixels(self) -> int:
        return int(self.min_tokens * PIXELS_PER_TOKEN)

    @property
    def max_pixels(self) -> int:
        return int(self.max_tokens * PIXELS_PER_TOKEN)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a preprocessor_config.json, whose `size` holds areas in pixels under the names of edges."""
        low, high = read_areas(config)
        return cls(min_tokens=low / PIXELS_PER_TOKEN, max_tokens=high / PIXELS_PER_TOKEN)


def read_areas(config: Mapping[str, Any]) -> tuple[int, int]:
    """The smallest and largest area in pixels; the older names win when present, as in transformers."""
    size = config.get("size") or {}
    low = config.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    high = config.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    if not low or not high:
        raise ValueError(
            f"the processor config has size {size!r}; expected shortest_edge and longest_edge, as areas in pixels."
        )
    return low, high


def smart_resize(height: int, width: int, budget: ImageBudget, factor: int = FACTOR) -> tuple[int, int]:
    """The size to resize to: multiples of `factor`, an area within the budget, the shape kept as well as that allows.

    Equal to transformers' image smart_resize, including Python's rounding of halves to even. A thin image whose short side rounds to
    nothing counts as too small and is enlarged.
    """
    check_ratio(height, width)
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > budget.max_pixels:
        shrink = math.sqrt(height * width / budget.max_pixels)
        tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif tall * wide < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / (height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    if tall * wide == 0:  # only a budget below one token reaches this
        raise ValueError(
            f"the image is {width}x{height} and a budget of {budget.min_tokens} tokens leaves nothing of it; allow one token."
        )
    return tall, wide


def check_ratio(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"the image is {width}x{height}; it needs at least one pixel.")
    if max(height, width) > MOST_RATIO * min(height, width):
        raise ValueError(
            f"the image is {width}x{height}; the longer side may be at most {MOST_RATIO} times the shorter. Crop or split it."
        )
