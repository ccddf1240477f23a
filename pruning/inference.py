"""The form in which candidate networks run fastest: folded, channels last, bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunegym.pruning.agreement import gap_between
from prunegym.pruning.copies import duplicate
from prunegym.pruning.layout import CHANNELS_LAST, laid_out
from prunegym.pruning.modes import evaluating
from prunegym.pruning.task import Inputs, forward

BFLOAT16_TOLERANCE = 0.05
"""bfloat16 is used if it changes the unpruned network's outputs by no more than this share of their size."""


class InferenceForm:
    """Precision, memory layout and folding of candidate networks.

    Args:
        folds: pairs (convolution, batch normalisation) of module paths that can be folded into one.
        half: convolutions and linear layers in bfloat16; the rest stays as it is.
        layout: of images and kernels, see :func:`.layout_for`.
    """

    def __init__(
        self, folds: Sequence[tuple[str, str]], *, half: bool, layout: torch.memory_format = CHANNELS_LAST
    ) -> None:
        self.folds = tuple(folds)
        self.half = half
        self.layout = layout

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if self.half else tensor

    def prepare_input(self, value: Any) -> Any:
        """An input in the form's precision and layout; anything but floating-point tensors is left alone."""
        if isinstance(value, Tensor) and value.is_floating_point():
            return laid_out(self._rounded(value), self.layout)
        return value

    def prepare_layers(self, model: nn.Module) -> dict[str, Tensor]:
        """Give layers their layout and precision, in place; returns their exact weights by module path."""
        weights = {}
        for name, module in model.named_modules():
            # what is computed from other parameters, such as a normalised weight, cannot be set
            own = {key: one.detach() for key, one in module.named_parameters(recurse=False)}
            if isinstance(module, nn.Linear | nn.Conv2d) and "weight" in own:
                weights[name] = own["weight"]
                self._set_weight(module, own["weight"])
                if "bias" in own:
                    module.bias = nn.Parameter(self._rounded(own["bias"]), requires_grad=False)
        return weights

    def folded(self, model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
        """A copy with batch normalisation folded into the convolution before it, from exact weights.

        Args:
            model: a network whose layers were prepared.
            weights: their exact weights, from :meth:`prepare_layers`.
        """
        # parameters are shared: those of folded layers are replaced, not changed
        model = duplicate(model, {id(one): one for one in [*model.parameters(), *model.buffers()]})
        modules = dict(model.named_modules())
        for conv_name, norm_name in self.folds:
            conv, norm = modules.get(conv_name), modules.get(norm_name)
            # subclasses of batch normalisation may do more than that, such as an activation
            if not isinstance(conv, nn.Conv2d) or conv_name not in weights or type(norm) is not nn.BatchNorm2d:
                continue
            if norm.running_var is None or norm.running_mean is None:
                continue
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight.detach()
            shift = -norm.running_mean * scale
            if norm.bias is not None:
                shift = shift + norm.bias.detach()
            if conv.bias is not None:
                shift = shift + conv.bias.detach().to(scale.dtype) * scale
            self._set_weight(conv, weights[conv_name] * scale.view(-1, 1, 1, 1))
            conv.bias = nn.Parameter(self._rounded(shift), requires_grad=False)
            for parent in modules.values():  # it may be registered in several places
                for leaf in [leaf for leaf, child in parent._modules.items() if child is norm]:
                    setattr(parent, leaf, nn.Identity())
        return model

    def _set_weight(self, module: nn.Linear | nn.Conv2d, weight: Tensor) -> None:
        weight = laid_out(self._rounded(weight), self.layout)
        module.weight = nn.Parameter(weight, requires_grad=False)

    def run(self, model: Callable[..., Any], inputs: Inputs) -> Any:
        """Outputs, in float32, of a network that is trained: its layers are not prepared, autocast rounds them."""
        kind = next((one.device.type for one in tensors_of(inputs)), "cpu")
        with torch.autocast(kind, torch.bfloat16, enabled=self.half):
            outputs = forward(model, laid_out(inputs, self.layout))
        return tree_map(to_float, outputs)

    def agrees(self, model: nn.Module, inputs: Inputs) -> bool:
        """True if the network gives in this form what it gives in its own, within ``BFLOAT16_TOLERANCE``."""
        try:
            with evaluating(model), torch.no_grad():
                exact = tensors_of(forward(model, inputs))
                twin = duplicate(model)
                twin = self.folded(twin, self.prepare_layers(twin))
                rough = tensors_of(forward(twin, tree_map(self.prepare_input, inputs)))
        except Exception:  # a layer without bfloat16 support, or float32 parameters outside layers
            return False
        rounded = [index for index, one in enumerate(exact) if one.is_floating_point()]
        gap = gap_between([exact[index] for index in rounded], [rough[index] for index in rounded])
        return gap.within(BFLOAT16_TOLERANCE)


def to_float(value: Any) -> Any:
    """bfloat16 tensors in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a nest of lists, tuples and dicts."""
    found: list[Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return found


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if the device has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
