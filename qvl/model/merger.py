"""2x2 neighbouring patches become one token at text width: the merger, and its DeepStack siblings."""

from torch import Tensor, nn

from qvl.model.config import VisionConfig
from qvl.model.layers import Linear


class Merger(nn.Module):
    """The last one norms patches before they are joined; DeepStack's norm the joined four (`is_post_shuffle`). Exact GELU in both."""

    def __init__(self, config: VisionConfig, *, is_post_shuffle: bool) -> None:
        super().__init__()
        self.joined = config.hidden_size * config.merge_area
        self.is_post_shuffle = is_post_shuffle
        self.norm = nn.LayerNorm(self.joined if is_post_shuffle else config.hidden_size, eps=1e-6)
        self.linear_fc1 = Linear(self.joined, self.joined)
        self.act = nn.GELU()
        self.linear_fc2 = Linear(self.joined, config.out_hidden_size)

    def forward(self, x_PC: Tensor) -> Tensor:
        """(P, C) -> (M, D), M = P / 4."""
        if self.is_post_shuffle:
            joined = self.norm(x_PC.view(-1, self.joined))
        else:
            joined = self.norm(x_PC).view(-1, self.joined)
        return self.linear_fc2(self.act(self.linear_fc1(joined)))
