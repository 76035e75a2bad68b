"""Where a network looked: a heat map of what spoke for a class, for all networks of the zoo and most users' own.

*Networks whose last layers have places* (convolutions, Swin, MaxViT): Grad-CAM (Selvaraju et al. 2017,
arXiv:1610.02391) without its mean of the gradients over all places (HiResCAM, Draelos & Carin 2020, arXiv:2011.08891).
A place's share of the class's logit is the sum over channels of gradient × activation. Both are the same for networks
that end in an average and one linear layer; where the head tells places apart (VGG, AlexNet) the mean would lose what
the network used.

*Transformers with global attention* (ViT): attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928) with each
attention weighted by its gradient, so that it is of a class (Chefer et al. 2021, arXiv:2103.15679, equations 5 and 6).

Libraries leave it to the caller to name the layer and the layout of its output, which is most of what this module does
beyond one gradient; so none is used.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eagleray.data.decode import resize
from eagleray.data.transforms import Preprocessing
from eagleray.errors import ServingError
from eagleray.models.layers import iterate_layers

LEAST_SIDE = 4
"""A map of fewer places says little; where the last layer has fewer (small pictures), an earlier one is shown."""

MAX_OVERLAY_SIDE = 1024
"""Larger pictures are drawn smaller, which bounds the time that it takes; in pixels."""

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_STRENGTH = 0.75
"""How much of the picture the hottest colour hides."""
_UNSEEN = 0.45
"""Brightness of what was cropped away before the network saw the picture."""


def heat_map(model: nn.Module, image: torch.Tensor, class_index: int) -> NDArray[np.float32]:
    """Return what each place of the picture did for a class, as a share of the place that did most.

    Costs one forward and at most one backward pass.

    Args:
        model: in evaluation mode; its layers' outputs are [1, C, h, w] or [1, h, w, C] with h = w, or its attentions
            are `nn.MultiheadAttention` over [class token, places].
        image: float [1, 3, S, S], normalised.

    Returns:
        float32 [h, w] in 0..1; all 0 where nothing spoke for the class.

    Raises:
        ServingError: a network with neither.
    """
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    with torch.enable_grad():
        # A gradient for the picture makes one for each layer, whether or not the weights still ask for theirs.
        image = image.detach().requires_grad_()
        heat = _attended(model, attentions, image, class_index) if attentions else _contributed(model, image, class_index)
    heat = heat.detach().float().relu()
    scaled: NDArray[np.float32] = (heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)).cpu().numpy()
    return scaled


def _contributed(model: nn.Module, image: torch.Tensor, class_index: int) -> torch.Tensor:
    outputs: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for layer in iterate_layers(model):
            if not isinstance(layer, _POOLS):
                hooks.enter_context(layer.register_forward_hook(lambda _, __, output: outputs.append(output)))
        logit = model(image)[0, class_index]
    with_places = [output for output in outputs if isinstance(output, torch.Tensor) and _side(output) > 1]
    if not with_places:
        raise ServingError(
            "no layer of this network has places, so there is no heat map of it; there are for convolutional networks, Swin, "
            "and transformers of nn.MultiheadAttention"
        )
    last = max(reversed(with_places), key=lambda output: min(_side(output), LEAST_SIDE))
    contributions = last * torch.autograd.grad(logit, last)[0]
    return contributions[0].sum(0 if _is_channels_first(last) else -1)


def _side(output: torch.Tensor) -> int:
    """Return h = w of a layer's output, 0 where it has no places."""
    if output.ndim != 4 or (output.shape[1] != output.shape[2] and output.shape[2] != output.shape[3]):
        return 0
    return output.shape[2]


def _is_channels_first(output: torch.Tensor) -> bool:
    return output.shape[2] == output.shape[3]


def _attended(model: nn.Module, attentions: list[nn.MultiheadAttention], image: torch.Tensor, class_index: int) -> torch.Tensor:
    weights: list[torch.Tensor] = []  # of each attention, [heads, T, T]
    with ExitStack() as hooks:
        for attention in attentions:
            hooks.enter_context(attention.register_forward_pre_hook(_ask_for_weights, with_kwargs=True))
            # What is returned is a view; it is its base that the values are multiplied with, and that has a gradient.
            hooks.enter_context(attention.register_forward_hook(lambda _, __, output: weights.append(output[1]._base)))
        logit = model(image)[0, class_index]
    tokens = weights[0].shape[-1]
    reached = torch.eye(tokens, device=image.device)  # row: what has come to this token from each
    for weight, gradient in zip(weights, torch.autograd.grad(logit, weights), strict=True):
        reached = reached + (weight * gradient).relu().mean(0) @ reached
    side = math.isqrt(tokens)
    read = reached[0] if tokens > side * side else reached.mean(0)  # the class token, or all of them
    return read[-side * side :].reshape(side, side)


def _ask_for_weights(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return arguments, options | {"need_weights": True, "average_attn_weights": False}


def spread(
    heat: NDArray[np.float32], height: int, width: int, preprocessing: Preprocessing
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Lay a heat map over the picture that it was made for.

    Args:
        heat: float32 [h, w] of `heat_map`.
        height: of the picture, in pixels.

    Returns:
        float32 [height, width], 0 where the network saw nothing; and where it saw something, bool [height, width].
    """
    left, top, side = seen_square(height, width, preprocessing)
    rows, columns = (np.arange(n, dtype=np.float32) + 0.5 for n in (height, width))
    # Centres of pixels in units of the map's places; beyond the outermost centres their values go on.
    y, x = ((rows - top) / side * heat.shape[0] - 0.5), ((columns - left) / side * heat.shape[1] - 0.5)
    across, down = (np.ascontiguousarray(axis, np.float32) for axis in np.broadcast_arrays(x[None, :], y[:, None]))
    smooth = cv2.remap(heat, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    is_seen = ((rows > top) & (rows < top + side))[:, None] & ((columns > left) & (columns < left + side))[None, :]
    return np.where(is_seen, smooth, 0).astype(np.float32), is_seen


def seen_square(height: int, width: int, preprocessing: Preprocessing) -> tuple[float, float, float]:
    """Return (left, top, side) in pixels of the square that `eval_image` cuts out of a picture."""
    side = min(1.0, preprocessing.image_size / preprocessing.eval_resize) * min(height, width)
    return (width - side) / 2, (height - side) / 2, side


def overlay(rgb: NDArray[np.uint8], heat: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Draw a heat map over its picture: in colour what spoke for the class, dark what the network did not see.

    Args:
        rgb: uint8 [H, W, 3], the whole picture.
        heat: float32 [h, w] of `heat_map`.

    Returns:
        uint8 [H', W', 3]: the picture's size, or a smaller one with `MAX_OVERLAY_SIDE` as its longer side.
    """
    scale = min(1.0, MAX_OVERLAY_SIDE / max(rgb.shape[:2]))
    height, width = (max(1, round(n * scale)) for n in rgb.shape[:2])
    picture = resize(rgb, width, height).astype(np.float32)
    values, is_seen = spread(heat, height, width, preprocessing)
    colours = cv2.applyColorMap((255 * values).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    share = _STRENGTH * values[..., None] ** 1.5
    drawn = (picture * (1 - share) + colours * share) * np.where(is_seen, 1.0, _UNSEEN)[..., None]
    return drawn.round().astype(np.uint8)
