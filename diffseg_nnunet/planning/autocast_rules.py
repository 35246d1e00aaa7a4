"""CUDA's autocast on any device, fake tensors included, so that a step can be counted where there is no GPU.

torch.autocast("cuda") does nothing without a GPU, and the CPU's autocast has other rules: it keeps pooling in float32
and softmax in half precision. Here the rules of CUDA's operators that these networks and losses use are applied to the
calls themselves (https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float16).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

LOWER_PRECISION = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(functional.conv1d, functional.conv2d, functional.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
        *(functional.linear, torch.matmul, torch.bmm, torch.mm, torch.addmm, Tensor.matmul, Tensor.__matmul__),
        *(torch.einsum, functional.scaled_dot_product_attention),
    }
)
FLOAT32 = frozenset(
    {
        *(torch.softmax, torch.log_softmax, functional.softmax, functional.log_softmax, Tensor.softmax),
        *(functional.cross_entropy, functional.nll_loss, functional.binary_cross_entropy_with_logits),
        *(functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss),
        *(torch.exp, torch.log, torch.pow, Tensor.pow, Tensor.exp, Tensor.log, torch.norm, Tensor.norm),
    }
)


class CudaAutocast(TorchFunctionMode):
    """Within it, calls get their arguments in the precision CUDA's autocast would give them.

    Islands of float32 within (``torch.autocast(..., enabled=False)``) are not seen: what is cast to float32 there stays
    so, but a convolution there would be counted in `dtype`.

    Args:
        dtype: torch.float16 or torch.bfloat16.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}  # autocast keeps its copies of weights until it is left

    def __exit__(self, *error: Any) -> None:
        self._weights.clear()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOWER_PRECISION:
            args, kwargs = tree_map_only(Tensor, self._lowered, (args, kwargs))
        elif func in FLOAT32:
            args, kwargs = tree_map_only(Tensor, _raised, (args, kwargs))
        return func(*args, **kwargs)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to(self.dtype)
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = tensor, tensor.to(self.dtype)
        return self._weights[id(tensor)][1]


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
