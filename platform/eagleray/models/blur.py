"""Anti-aliased down-sampling for ResNets: a blur before the resolution falls (Zhang 2019, arXiv:1904.11486)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

MIN_CHANNELS = 16
"""The first convolution, on the picture itself, is left alone, as in FFCV's ResNet recipe."""


class _Blur(nn.Module):
    """Binomial 3×3 filter of each channel by itself: float [N, C, H, W] → [N, C, ⌈H / stride⌉, ⌈W / stride⌉]."""

    kernel: torch.Tensor

    def __init__(self, stride: int | tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        return functional.conv2d(x, self.kernel.to(x.dtype).expand(channels, 1, 3, 3), stride=self.stride, padding=1, groups=channels)


class _BlurConv2d(nn.Conv2d):
    """A convolution of the blurred input; its parameters are those of the plain one, by name too."""

    def __init__(self, conv: nn.Conv2d) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        super().__init__(*shape, bias=conv.bias is not None, device="meta")  # type: ignore[arg-type]
        self.weight, self.bias = conv.weight, conv.bias
        self.blur = _Blur(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.blur(x))


def add_blur(model: nn.Module) -> nn.Module:
    """Blur the input of every strided convolution, and max-pool without a stride before a blur with it, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= MIN_CHANNELS:
                setattr(module, name, _BlurConv2d(child))
            elif isinstance(child, nn.MaxPool2d):
                pool = nn.MaxPool2d(child.kernel_size, stride=1, padding=child.padding)
                setattr(module, name, nn.Sequential(pool, _Blur(child.stride)))
    return model
