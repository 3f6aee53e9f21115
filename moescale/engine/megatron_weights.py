"""Our weights in Megatron's parameters: which part of which of them is ours, by the names that conversions use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moescale.checkpoint.strided_view import Region
from moescale.comm.collectives import local_tensor
from moescale.config import Config
from moescale.convert.formats.megatron.files import pieces_of_rank
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.mapping.table import Piece
from moescale.spec.model import describe
from moescale.spec.weights import Weight


class NativeWeights:
    """Shows the tensors of one rank of Megatron's as parts of ours, and takes ours back.

    described: our weights that have a part here, by name. shapes: of the tensors that Megatron's model has, by name.
    decaying: those of them at which weight decay pulls, as it does at all of ours that lie there.
    """

    def __init__(
        self, config: Config, layout: FileLayout, ranks: tuple[int, int, int], *, tp: DeviceMesh | None = None,
        ep: DeviceMesh | None = None,
    ) -> None:
        """ranks: this one's in tp, pp and ep. tp, ep: the ranks that share a weight, and experts; None = one process"""
        found: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces_of_rank(config, layout, *ranks):
            found[".".join(piece.native.weight)].append(piece)
        self.pieces = {name: sorted(pieces, key=lambda piece: piece.native.expert or 0)
                       for name, pieces in found.items()}
        self.shapes = {piece.key: piece.shape for pieces in self.pieces.values() for piece in pieces}
        weights = {".".join(weight.name): weight for weight in describe(config).weights()}
        self.described: dict[str, Weight] = {name: weights[name] for name in self.pieces}
        self.decaying = {piece.key for name, pieces in self.pieces.items() for piece in pieces
                         if self.described[name].decays}
        self.tp, self.ep = tp, ep

    def keys(self, name: str) -> set[str]:
        """Name the tensors of Megatron's in which one of our weights lies."""
        return {piece.key for piece in self.pieces[name]}

    def show(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Make our weights of Megatron's tensors, in copies: DTensors where ranks share them.

        tensors: by name, or what has their shapes, such as moments; a weight is left out where one of its own is.
        """
        for name, pieces in self.pieces.items():
            if not self.keys(name) <= tensors.keys():
                continue
            parts = [_view(tensors[piece.key], piece.region).reshape(piece.part.shape) for piece in pieces]
            expert = self.described[name].view == "sparse"
            yield name, self._of_rank(self.described[name], torch.stack(parts) if expert else parts[0].clone())

    @torch.no_grad()
    def put(self, name: str, value: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Write this rank's part of one of our weights, or of what has its shape, where Megatron keeps it."""
        local = local_tensor(value)
        parts = local if self.described[name].view == "sparse" else [local]
        for piece, part in zip(self.pieces[name], parts, strict=True):
            view = _view(tensors[piece.key], piece.region)
            view.copy_(part.reshape(view.shape))

    def _of_rank(self, weight: Weight, value: Tensor) -> Tensor:
        """Say of a tensor that it is a part."""
        if weight.view == "sparse":
            mesh, dim = self.ep, 0
        elif weight.cut is not None:
            mesh, dim = self.tp, weight.cut_dim
        else:
            return value
        return value if mesh is None or mesh.size() == 1 else DTensor.from_local(value, mesh, [Shard(dim)],
                                                                                 run_check=False)


def _view(tensor: Tensor, region: Region) -> Tensor:
    """View a part of a tensor that lies in order, perhaps within a larger one."""
    return tensor.as_strided(region.shape, region.stride, tensor.storage_offset() + region.offset)
