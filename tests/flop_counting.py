"""torch's FLOP counter, corrected for grouped convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop


def flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(
    grad_out: list[int],
    x: list[int],
    weight: list[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: list[bool],
    out_shape: Any,
    **_: Any,
) -> int:
    """torch's formula takes the gradient of a grouped weight for that of a full one: `groups` times too many products."""
    common = (grad_out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    of_input, of_weight = (
        int(conv_backward_flop(*common, mask, out_val=out_shape))
        for mask in ([output_mask[0], False, False], [False, output_mask[1], False])
    )
    return of_input + of_weight // groups
