"""What a mixture of experts keeps for backward, by count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moescale.comm.placement import Placement
from moescale.moe.experts import Experts
from moescale.moe.routing import sort_by_expert

TOKENS, EXPERTS, TOP_K, D_MODEL, D_FF = 96, 8, 3, 32, 48


def kept_by(experts: Experts) -> dict[int, int]:
    """Run the experts forward. -> numbers kept for backward, of each storage that is not x, a weight or small"""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, D_MODEL, requires_grad=True)
    expert = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K]
    weight = torch.rand(TOKENS, TOP_K, requires_grad=True)
    routing = sort_by_expert(expert, weight, torch.ones_like(expert, dtype=torch.bool), EXPERTS)
    others, kept = {x.data_ptr(), *(w.data_ptr() for w in experts.parameters())}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() > TOKENS * TOP_K and tensor.data_ptr() not in others:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = experts(x, routing)
    y.sum().backward()
    return kept


@pytest.mark.parametrize("extent", ["none", "selective"])
def test_the_copies_of_tokens_are_not_kept_when_they_are_made_again(extent: str) -> None:
    experts = Experts(EXPERTS, D_MODEL, D_FF, "swiglu")
    for weight in experts.parameters():
        nn.init.normal_(weight)
    experts.attach(Placement(recompute=extent))
    kept = sum(kept_by(experts).values())
    rows = TOKENS * TOP_K
    assert kept <= (0 if extent == "selective" else rows * 2 * D_FF)
