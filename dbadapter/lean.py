"""Frozen layers that keep no more for the backward pass than it needs; what is computed stays the same.

torch keeps the input of every convolution, though only a trained weight's gradient needs it, and every input
of a chain of cheap functions. Here a frozen convolution keeps nothing but its weight; group norm with SiLU,
GEGLU with the projection before it, and CLIP's quick GELU keep their input alone and compute the rest again
(as Chen et al. 2016, arXiv 1604.06174, section 4.3, for whole layers).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

__all__ = ["keep_less", "pays"]

# Bytes of a UNet's weights: keeping less saves nothing in toybox's, 35 MB, and takes 7 % of its step.
LARGE_ENOUGH = 2**28


def pays(unet: nn.Module) -> bool:
    """Tell whether a model is large enough for `keep_less`."""
    return sum(weight.nbytes for weight in unet.parameters()) > LARGE_ENOUGH


def keep_less(model: Any) -> None:
    """Let frozen layers of a UNet or CLIP text encoder keep less, in place; call it after adapters came in.

    Names and modules stay as they are, only the `forward` of single layers changes. Layers that are trained
    (an adapter's own, all of a model in full fine-tuning) are passed over.
    """
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D
    from transformers.activations import QuickGELUActivation

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_plain(module):
            module.forward = functools.partial(_convolved, module)  # type: ignore[method-assign]
        elif isinstance(module, GEGLU):
            module.forward = functools.partial(_gated, module)
        elif isinstance(module, QuickGELUActivation):
            module.forward = _QuickGelu.apply
        elif isinstance(module, ResnetBlock2D) and _is_usual(module):
            for norm in (module.norm1, module.norm2):
                norm.forward = functools.partial(_normed, norm)
            # The block applies its activation to the norms, done there now, and to the time embedding.
            module.nonlinearity = nn.Identity()
            projection = module.time_emb_proj
            if projection is not None:
                projection.forward = functools.partial(_activated, projection.forward)


def _is_plain(layer: nn.Conv2d) -> bool:
    frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    return (
        frozen and layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def _is_usual(block: Any) -> bool:
    norms = all(
        isinstance(norm, nn.GroupNorm) and norm.affine and not norm.weight.requires_grad
        for norm in (block.norm1, block.norm2)
    )
    # Only where nothing comes between norm and activation, as scale and shift of the time embedding may.
    plain = block.time_embedding_norm == "default" and not getattr(block, "skip_time_act", False)
    return norms and plain and isinstance(block.nonlinearity, nn.SiLU)


def _convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        plain: Tensor = layer._conv_forward(x, layer.weight, layer.bias)
        return plain
    result: Tensor = _FrozenConv2d.apply(  # type: ignore[no-untyped-call]
        x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation
    )
    return result


def _gated(layer: Any, x: Tensor) -> Tensor:
    # An adapter there would have to be computed again too.
    if type(layer.proj) is nn.Linear and not layer.proj.weight.requires_grad:
        result: Tensor = _ProjectedGeglu.apply(x, layer.proj.weight, layer.proj.bias)  # type: ignore[no-untyped-call]
    else:
        result = _Geglu.apply(layer.proj(x))  # type: ignore[no-untyped-call]
    return result


def _normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    result: Tensor = _NormSilu.apply(  # type: ignore[no-untyped-call]
        x, norm.num_groups, norm.weight, norm.bias, norm.eps
    )
    return result


def _activated(project: Any, x: Tensor) -> Tensor:
    projected: Tensor = project(F.silu(x))
    return projected


class _FrozenConv2d(torch.autograd.Function):
    """A convolution whose weight and bias get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
    ) -> Tensor:
        out = F.conv2d(x, weight, bias, stride, padding, dilation)
        ctx.save_for_backward(weight.to(out.dtype))
        ctx.geometry = (x.shape, x.dtype, stride, padding, dilation)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (shape, dtype, stride, padding, dilation) = ctx.saved_tensors, ctx.geometry
        grad = conv2d_input(shape, weight, grads[0], stride, padding, dilation)
        return (grad.to(dtype), None, None, None, None, None)


class _Again(torch.autograd.Function):
    """A function of x and frozen tensors that keeps nothing else: `of` is computed again for the gradient."""

    @staticmethod
    def of(x: Tensor, *frozen: Any) -> Tensor:
        """Return the function's value; every subclass says which."""
        raise NotImplementedError

    @classmethod
    def forward(cls, ctx: Any, x: Tensor, *frozen: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.frozen = frozen
        device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return cls.of(x, *frozen)

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
            again = x.detach().requires_grad_()
            out = cls.of(again, *ctx.frozen)
        (grad,) = torch.autograd.grad(out, again, grads[0])
        return (grad, *[None] * len(ctx.frozen))


class _NormSilu(_Again):
    """SiLU(GroupNorm(x))."""

    @staticmethod
    def of(x: Tensor, *frozen: Any) -> Tensor:
        groups, weight, bias, eps = frozen
        return F.silu(F.group_norm(x, groups, weight, bias, eps))


class _Geglu(_Again):
    """x * GELU(gate) of the halves of the last dimension (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def of(x: Tensor, *frozen: Any) -> Tensor:
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class _ProjectedGeglu(_Again):
    """GEGLU of a frozen projection: eight times as wide as x."""

    @staticmethod
    def of(x: Tensor, *frozen: Any) -> Tensor:
        return _Geglu.of(F.linear(x, *frozen))


class _QuickGelu(_Again):
    """x * sigmoid(1.702 x), as CLIP has it."""

    @staticmethod
    def of(x: Tensor, *frozen: Any) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
