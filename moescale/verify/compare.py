"""Compares a layout's step to that of one process, figure by figure, and says in a few words what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from moescale.comm.collectives import all_reduce_sum
from moescale.record.figures import parse
from moescale.verify.observation import Observation

TOLERANCES = {"float32": 1e-5, "float64": 1e-9}
PARTS = {  # of a parameter's name, the first that is in it: what users call it
    "experts": "expert", "shared": "shared expert", "router": "router", "mixer": "mixer", "mixer_norm": "norm",
    "channel_norm": "norm", "norm": "norm", "residual": "residual", "channel_mixer": "feed-forward",
    "embedding": "embedding", "head": "head",
}


@dataclass(frozen=True)
class Deviation:
    """One quantity of one case compared to its reference.

    error: relative; of counts, the share that differs. scale: the ratio of the two norms, values or counts.
    """

    quantity: str
    of: str  # the parameter or the layer, if any
    error: float
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.quantity} {self.of}".strip()

    def within(self, tolerance: float) -> bool:
        return self.error <= tolerance  # nan is not


def compare(step: Observation, reference: Observation, group: dist.ProcessGroup | None) -> list[Deviation]:
    """Compare a step to that of one process, in the order of computation: what is wrong first is the cause.

    reference: whole. group: all ranks, which add up what differs. -> the same on every rank
    """
    losses = {name: _figure(name, "", abs(value - reference.losses[name]), abs(value), abs(reference.losses[name]))
              for name, value in step.losses.items()}
    norm, evaluation = losses.pop("gradient norm"), losses.pop("loss in evaluation")
    return [
        *_compare_parameters("first weights", step.first, reference.first, group),
        *_compare_forward(step, reference, group),
        *_compare_counts(step.counts, reference.counts),
        *losses.values(),
        *_compare_parameters("gradient", step.gradients, reference.gradients, group),
        norm,
        *_compare_parameters("updated weights", step.updated, reference.updated, group),
        evaluation,
    ]


def _figure(quantity: str, of: str, difference: float, ours: float, theirs: float) -> Deviation:
    if theirs == 0:  # where nothing should be, nothing may be
        return Deviation(quantity, of, 0.0 if difference == 0 else math.inf, 1.0 if ours == 0 else math.inf)
    return Deviation(quantity, of, difference / theirs, ours / theirs)


def _compare_parameters(
    quantity: str, ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None],
    group: dist.ProcessGroup | None,
) -> list[Deviation]:
    """Compare each rank's part with the same part of the whole; what several ranks hold counts on each."""
    assert ours.keys() <= theirs.keys(), "a parameter has a name that one process does not know"
    squares = torch.zeros(len(theirs), 3, dtype=torch.float64)
    for index, (name, whole) in enumerate(theirs.items()):
        if name in ours and whole is not None:
            squares[index] = _squares(ours.get(name), whole)
    difference, local_norm, norm = all_reduce_sum(squares, group).sqrt().T.tolist()
    figures = []
    for index, (name, whole) in enumerate(theirs.items()):
        if norm[index] == 0 and whole is not None and whole.any():
            figures.append(Deviation(quantity, name, math.inf, 0.0))  # no rank holds it
        else:
            figures.append(_figure(quantity, name, difference[index], local_norm[index], norm[index]))
    return figures


def _squares(local: Tensor | None, whole: Tensor) -> Tensor:
    """Compute the squared norms of the difference, of this rank's part, and of what it should be. -> [3] float64"""
    if isinstance(local, DTensor):
        whole = distribute_tensor(whole, local.device_mesh, local.placements, src_data_rank=None).to_local()
        local = local.to_local()
    if local is None:
        local = torch.zeros_like(whole)
    local, whole = local.double(), whole.double()
    return torch.stack([each.square().sum() for each in (local - whole, local, whole)])


def _compare_forward(step: Observation, reference: Observation, group: dist.ProcessGroup | None) -> list[Deviation]:
    """Compare the features of each token between the sublayers, and each assignment, layer by layer."""
    met = step.seen.unsqueeze(-1).double()
    pairs = (step.stream - reference.stream * met, step.stream, reference.stream * met)
    squares = torch.stack([each.square().sum((2, 3)) for each in pairs])  # [3, layers, 2]
    difference, local_norm, norm = all_reduce_sum(squares, group).sqrt().tolist()
    seen, kept = all_reduce_sum(step.seen.clone(), group), all_reduce_sum(step.kept.clone(), group)
    figures = []
    for layer in range(len(seen)):
        for index, sublayer in enumerate(("the mixer", "the channel mixer")):
            if index == 1:
                figures.append(_count("assignments", f"of layer {layer}", kept[layer], reference.kept[layer]))
            if not reference.seen[layer, index].any():
                continue  # a mixer that runs in parallel with the channel mixer has no features after it
            name = f"after {sublayer} of layer {layer}"
            figures.append(_count("tokens", name, seen[layer, index], reference.seen[layer, index]))
            figures.append(_figure("features", name, difference[layer][index], local_norm[layer][index],
                                   norm[layer][index]))
    return figures


def _compare_counts(
    ours: Mapping[str, list[int] | int], theirs: Mapping[str, list[int] | int]
) -> list[Deviation]:
    assert ours.keys() == theirs.keys(), "mixtures of experts are in other layers"
    figures = []
    for name in theirs:
        quantity, layer = parse(name)
        figures.append(_count(quantity.replace("_", " "), f"of layer {layer}",
                              torch.tensor(ours[name]), torch.tensor(theirs[name])))
    return figures


def _count(quantity: str, of: str, ours: Tensor, theirs: Tensor) -> Deviation:
    return _figure(quantity, of, float((ours - theirs).abs().sum()), float(ours.sum()), float(theirs.sum()))


def worst(figures: Sequence[Deviation], tolerance: float) -> Deviation:
    """The figure furthest off."""
    return max(figures, key=lambda figure: math.inf if math.isnan(figure.error) else figure.error / tolerance)


def worst_scale(figures: Sequence[Deviation]) -> Deviation:
    """Find the gradient whose norm is furthest from what it should be."""
    gradients = [figure for figure in figures if figure.quantity == "gradient"]
    return max(gradients, key=lambda figure: abs(figure.scale - 1) if math.isfinite(figure.scale) else math.inf)


def diagnose(figures: Sequence[Deviation], tolerance: float) -> str:
    """Name what is wrong first, in the order of `compare`, and what else is. -> "" when nothing is"""
    wrong = [figure for figure in figures if not figure.within(tolerance)]
    if not wrong:
        return ""
    quantity = wrong[0].quantity
    group = [figure for figure in wrong if figure.quantity == quantity]
    text = _parameters(group) if "." in wrong[0].of else _describe(wrong[0])
    others = list(dict.fromkeys(figure.quantity for figure in wrong if figure.quantity != quantity))
    return text + (f"; then {', '.join(others)}" if others else "")


def _describe(figure: Deviation) -> str:
    if figure.quantity in ("assignments", "tokens", "tokens per expert", "dropped"):
        return f"{figure}: {figure.error:.1%} differ, {figure.scale:.3f} times as many"
    return f"{figure} {_times(figure.scale)}, error {figure.error:.1e}"


def _parameters(wrong: Sequence[Deviation]) -> str:
    """Say which kinds of parameters, by what factor if it is one, and which one is worst."""
    kinds = list(dict.fromkeys(_kind(figure.of) for figure in wrong))
    name = wrong[0].quantity if wrong[0].quantity != "gradient" else "gradients"
    scales = [figure.scale for figure in wrong]
    top = worst(wrong, 1.0)
    factor = _times(scales[0]) if max(scales) - min(scales) < 1e-3 else "wrong"
    whose = " and ".join(kinds) if len(kinds) < 4 else f"{len(kinds)} kinds of"
    return f"{whose} {name} {factor}, most {top.of} (scale {top.scale:.3f}, error {top.error:.1e})"


def _kind(parameter: str) -> str:
    parts = parameter.split(".")
    return next(kind for part, kind in PARTS.items() if part in parts)


def _times(scale: float) -> str:
    if abs(scale - 1) < 5e-4:
        return "wrong"
    return f"{scale:.3f} times too large" if scale > 1 else f"only {scale:.3f} times as large"
