"""What is checked of a network that was cut by a plan, before it is trained or saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from prunegym.pruning.cost import Cost
from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.errors import PruningError
from prunegym.pruning.modes import differentiating, evaluating, operation_by_operation
from prunegym.pruning.network import CHECK_TOLERANCE, PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.task import Inputs, forward


def check_cost(network: PrunableNetwork, model: nn.Module, expected: Cost) -> None:
    """Count the rebuilt network by other means, and refuse it if it is not as cheap as its plan says.

    Raises:
        PruningError: It is not: an error of this library, which must not go unnoticed.
    """
    parameters = sum(one.numel() for one in model.parameters())
    macs = count_macs(network, model)
    # where the counter does not know an operation of the network, nothing can be compared
    comparable = count_macs(network, network.model) == network.full_cost.macs
    if parameters != expected.parameters or (comparable and macs != expected.macs):
        raise PruningError(
            f"`plan` should cost what it promises, {expected.macs} MACs and {expected.parameters} "
            f"parameters. Received a network of {macs} MACs and {parameters} parameters. "
            "Please report this network; until then keep the layers concerned with --keep."
        )


def check_outputs(network: PrunableNetwork, plan: PruningPlan) -> None:
    """Compare the network that a plan leaves with its masked twin on the example inputs.

    Raises:
        PruningError: They differ: something depends on a number of channels, unseen when the network was traced.
    """
    difference = network.check(plan)
    if not difference <= CHECK_TOLERANCE:
        raise PruningError(
            "`plan` should leave a network that computes what the unpruned one does with the removed channels unread. "
            f"Received one whose outputs differ by {difference:.2g} of their size. Please report this network; until "
            "then keep the layers concerned with --keep."
        )


def count_macs(network: PrunableNetwork, model: nn.Module) -> int:
    """MACs of a model on one example of the network's input, counted by PyTorch while it runs."""
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    return macs_of_run(
        model, tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), with_batch(network.example_inputs, 1))
    )


def macs_of_run(model: nn.Module, inputs: Inputs) -> int:
    """MACs of a model on these inputs, which are on its device, counted by PyTorch while it runs.

    No parameter has a gradient meanwhile. The counter hangs a hook on whatever asks for one and goes into a module, and
    without gradients a view of a parameter, such as expanded queries, asks for one and has no place for the hook.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with evaluating(model), differentiating(model), operation_by_operation(), torch.no_grad(), counter:
        forward(model, inputs)
    return int(counter.get_total_flops()) // 2


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of attention from the shapes of its inputs."""
    return int(sdpa_flop_count(query, key, value))


#: Operations that PyTorch's counter takes for free: it knows attention on graphics cards only.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
