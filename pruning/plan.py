"""Pruning plans: for each channel group, the channels it keeps; and the residual blocks that are left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import replacing
from prunegym.pruning.graph import ChannelGraph

FORMAT = 1


@dataclass(frozen=True)
class PruningPlan:
    """Kept channel indices of every prunable group of one network.

    Indices are positions within the group, ``0 <= i < size``, sorted and unique. Plans compare and hash by
    content.
    """

    kept: tuple[tuple[str, tuple[int, ...]], ...]
    """``(group name, kept indices)`` for every prunable group, in graph order."""
    removed: tuple[str, ...] = ()
    """Paths of residual blocks that are left out; groups inside them do not matter."""

    def without(self, blocks: Iterable[str]) -> PruningPlan:
        """The same plan with these residual blocks left out too."""
        return PruningPlan(self.kept, tuple(sorted({*self.removed, *blocks})))

    @classmethod
    def from_mask(cls, graph: ChannelGraph, mask: NDArray[np.bool_]) -> PruningPlan:
        """The plan that keeps the units where ``mask (units,)`` is true."""
        return cls(tuple((group.name, tuple(np.flatnonzero(mask[group.units]).tolist())) for group in graph.groups))

    @classmethod
    def unpruned(cls, graph: ChannelGraph) -> PruningPlan:
        """The plan that keeps everything."""
        return cls.from_mask(graph, np.ones(graph.units, dtype=np.bool_))

    @classmethod
    def from_counts(cls, graph: ChannelGraph, counts: NDArray[np.int64]) -> PruningPlan:
        """Keep the first channels of each group ``(groups,)``: for what depends on their number only."""
        return cls.from_scores(graph, counts, np.zeros(graph.units))

    @classmethod
    def from_scores(cls, graph: ChannelGraph, counts: NDArray[np.int64], scores: NDArray[np.float64]) -> PruningPlan:
        """Keep the best-scored channels of each group.

        Args:
            graph: the network's channel graph.
            counts: channels to keep in each group ``(groups,)``.
            scores: a score per unit ``(units,)``, higher = keep. Ties keep the lower index.
        """
        mask = np.zeros(graph.units, dtype=np.bool_)
        for group, count in zip(graph.groups, counts.tolist(), strict=True):
            order = np.argsort(-scores[group.units], kind="stable")[:count]
            mask[group.start + order] = True
        return cls.from_mask(graph, mask)

    def mask(self, graph: ChannelGraph) -> NDArray[np.bool_]:
        """Which units stay ``(units,)``.

        Raises:
            PruningError: the plan was made for another network.
        """
        kept = dict(self.kept)
        expected = {group.name for group in graph.groups}
        if kept.keys() != expected:
            odd = sorted(kept.keys() ^ expected)
            raise PruningError(
                f"`plan` should name exactly the network's {len(expected)} prunable groups. "
                f"Differing: {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}. "
                "Make the plan on this network."
            )
        mask = np.zeros(graph.units, dtype=np.bool_)
        for group in graph.groups:
            indices = np.asarray(kept[group.name], dtype=np.int64)
            if len(indices) == 0 or indices.min() < 0 or indices.max() >= group.size:
                raise PruningError(
                    f"`plan` should keep between 1 and {group.size} channels of group {group.name}, with "
                    f"indices below {group.size}. Received {len(indices)} indices. "
                    "Make the plan on this network."
                )
            mask[group.start + indices] = True
        return mask

    def counts(self) -> dict[str, int]:
        """Channels kept, by group."""
        return {name: len(indices) for name, indices in self.kept}

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; :meth:`from_json` reverses it."""
        content: dict[str, Any] = {"format": FORMAT, "kept": {name: list(indices) for name, indices in self.kept}}
        return {**content, "removed": list(self.removed)} if self.removed else content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PruningPlan:
        """Read :meth:`to_json`'s mapping.

        Raises:
            PruningError: not a plan, or of another format version.
        """
        if content.get("format") != FORMAT or not isinstance(content.get("kept"), Mapping):
            raise PruningError(
                f"`plan` should be a plan of format {FORMAT}. Received format {content.get('format')!r}. Give the "
                "plan.json of `prunegym prune`, of this version; that of a training holds several plans, its policy "
                "makes one (`prunegym prune --policy`)."
            )
        for name, indices in content["kept"].items():
            if not isinstance(indices, list) or not all(type(index) is int for index in indices):
                raise PruningError(
                    f"`plan` should list the kept channel numbers of group {name}. Received {str(indices)[:60]}. "
                    "Write it with this version of prunegym."
                )
        kept: Mapping[str, list[int]] = content["kept"]
        removed = content.get("removed", [])
        if not isinstance(removed, list) or not all(isinstance(path, str) for path in removed):
            raise PruningError(
                f"`plan` should list the paths of the blocks left out. Received {str(removed)[:60]}. "
                "Write it with this version of prunegym."
            )
        return cls(
            tuple((name, tuple(sorted(set(indices)))) for name, indices in kept.items()), tuple(sorted(set(removed)))
        )

    def save(self, path: Path) -> None:
        """Write the plan as JSON.

        Raises:
            PruningError: the file cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        """Read a plan file.

        Raises:
            PruningError: missing, not JSON, or not a plan.
        """
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as fault:
            raise PruningError(f"`plan` should be a readable JSON file. Received {path} ({fault}).") from fault
        if not isinstance(content, dict):
            raise PruningError(f"`plan` should be a JSON object. Received a {type(content).__name__} in {path}.")
        return cls.from_json(content)
