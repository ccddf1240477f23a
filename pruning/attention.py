"""Multi-head attention whose heads can go.

``nn.MultiheadAttention`` derives the width of its heads from that of the embedding, so it cannot have fewer heads.
:class:`HeadwiseAttention` computes the same from the same parameters, with the number of heads and their width kept
apart. Networks are traced and observed in this form; a pruned network keeps it where heads were removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadwiseAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with ``num_heads`` heads of ``head_dim``, whatever ``embed_dim`` is.

    Make one with :func:`make_headwise` from a module that has been built.
    """

    # read by nn.TransformerEncoderLayer: its fused kernel takes heads of embed_dim / num_heads for granted
    _qkv_same_embed_dim = property(lambda self: False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of ``nn.MultiheadAttention``."""
        self_attention = query is key and key is value
        batched = query.ndim == 3
        if not batched:
            query, key, value = (part.unsqueeze(0) for part in (query, key, value))
        elif not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = (self._heads(part) for part in self._projected(query, key, value, self_attention))
        mask = self._mask(attn_mask, key_padding_mask, q, batched)
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = F.dropout(weights, self.dropout, self.training) @ v
        else:
            dropout = self.dropout if self.training else 0.0
            causal = is_causal and mask is None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, self_attention: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values ``(B, N, heads * head_dim)``."""
        if self.in_proj_weight is not None and self_attention:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is None
            else self.in_proj_weight.chunk(3)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(*one) for one in zip(inputs, weights, biases, strict=True))

    def _heads(self, part: Tensor) -> Tensor:
        """``(B, N, heads * head_dim)`` as ``(B, heads, N, head_dim)``."""
        heads: Tensor = part.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, batched: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the scores ``(B, heads, N, S)``."""
        mask = None if attn_mask is None else _additive(attn_mask, q)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (q.shape[0], -1))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask if batched else key_padding_mask.unsqueeze(0), q)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    additive: Tensor = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return additive


def make_headwise(module: nn.Module) -> None:
    """Turn an ``nn.MultiheadAttention`` into its headwise form, in place. Parameters stay the same objects."""
    module.__class__ = HeadwiseAttention


def can_be_headwise(module: nn.Module) -> bool:
    """Whether the headwise form computes what this module computes."""
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
    )


def lost_channels(module: nn.Module) -> bool:
    """Whether an ``nn.MultiheadAttention`` has smaller tensors than its ``embed_dim`` says."""
    assert isinstance(module, nn.MultiheadAttention)
    return module.out_proj.weight.shape != (module.embed_dim, module.embed_dim)


@contextmanager
def headwise(model: nn.Module) -> Iterator[None]:
    """Every multi-head attention of a network in its headwise form, for the duration."""
    changed = [module for module in model.modules() if can_be_headwise(module)]
    for module in changed:
        make_headwise(module)
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.MultiheadAttention
