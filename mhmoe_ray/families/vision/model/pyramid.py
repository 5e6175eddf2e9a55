"""The feature pyramid of a plain vision transformer: maps of several scales from its single map (ViTDet, arXiv
2203.16527)."""

from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor, nn


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of feature maps (N, C, height, width)."""

    def forward(self, map_NCYX: Tensor) -> Tensor:
        return super().forward(map_NCYX.movedim(1, -1)).movedim(-1, 1)


class Pyramid(nn.Module):
    """Feature pyramid: for each scale, 0.5, 1, 2 or 4, it halves or enlarges the map and applies two convolutions."""

    def __init__(self, d_model: int, width: int, scales: Iterable[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_build_level(d_model, width, scale) for scale in scales)

    def forward(self, map_NMYX: Tensor) -> list[Tensor]:
        """Return a feature map of each scale, (N, width, scaled height, scaled width)."""
        return [level(map_NMYX) for level in self.levels]


def _build_level(d_model: int, width: int, scale: float) -> nn.Sequential:
    modules = OrderedDict[str, nn.Module]()
    channels = d_model
    if scale == 0.5:
        modules["halve"] = nn.MaxPool2d(2)
    for number in range(int(scale) // 2):
        # The number of channels is halved with each enlargement, as in ViTDet.
        modules[f"enlarge{number}"] = nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)
        channels //= 2
        if number == 0 and scale == 4:
            modules["enlarge_norm"] = MapNorm(channels)
            modules["function"] = nn.GELU()
    modules["inner"] = nn.Conv2d(channels, width, 1, bias=False)
    modules["inner_norm"] = MapNorm(width)
    modules["outer"] = nn.Conv2d(width, width, 3, padding=1, bias=False)
    modules["outer_norm"] = MapNorm(width)
    return nn.Sequential(modules)
