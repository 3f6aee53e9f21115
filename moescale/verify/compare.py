"""A layout's step beside the one process's, figure by figure, and what is wrong in a few words."""

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
from moescale.verify.observation import Trace

TOLERANCES = {"float32": 1e-5, "float64": 1e-9}
PARTS = {".experts.": "expert", ".shared.": "shared expert", ".router.": "router", ".mixer.": "attention",
         "norm": "norm", ".channel_mixer.": "feed-forward", "embedding": "embedding", "head": "head"}


@dataclass(frozen=True)
class Figure:
    """One quantity of one case beside its reference.

    error: relative, or of what is counted the share that differs. scale: the ratio of the two norms, values or counts.
    """

    quantity: str
    of: str  # the parameter or the layer, if any
    error: float
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.quantity} {self.of}".strip()

    def within(self, tolerance: float) -> bool:
        return self.error <= tolerance  # nan is not


def compare(trace: Trace, reference: Trace, group: dist.ProcessGroup | None) -> list[Figure]:
    """Hold a step to the one process's, in the order in which its parts come about: what is wrong first is the cause.

    reference: whole. group: all ranks, which add up what differs. -> the same on every rank
    """
    losses = {name: _figure(name, "", abs(value - reference.losses[name]), abs(value), abs(reference.losses[name]))
              for name, value in trace.losses.items()}
    norm, evaluation = losses.pop("gradient norm"), losses.pop("loss in evaluation")
    return [
        *_compare_parameters("first weights", trace.first, reference.first, group),
        *_compare_forward(trace, reference, group),
        *_compare_counts(trace.counts, reference.counts),
        *losses.values(),
        *_compare_parameters("gradient", trace.gradients, reference.gradients, group),
        norm,
        *_compare_parameters("updated weights", trace.updated, reference.updated, group),
        evaluation,
    ]


def _figure(quantity: str, of: str, difference: float, ours: float, theirs: float) -> Figure:
    if theirs == 0:  # where nothing should be, nothing may be
        return Figure(quantity, of, 0.0 if difference == 0 else math.inf, 1.0 if ours == 0 else math.inf)
    return Figure(quantity, of, difference / theirs, ours / theirs)


def _compare_parameters(
    quantity: str, ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None],
    group: dist.ProcessGroup | None,
) -> list[Figure]:
    """Compare each rank's part with the same part of the whole; what several ranks hold counts on each."""
    assert ours.keys() <= theirs.keys(), "a parameter has a name that one process does not know"
    squares = torch.zeros(len(theirs), 3, dtype=torch.float64)
    for index, (name, whole) in enumerate(theirs.items()):
        own = ours.get(name)
        if name in ours and whole is not None:
            squares[index] = _squares(own, whole)
    difference, own_norm, norm = all_reduce_sum(squares, group).sqrt().T.tolist()
    figures = []
    for index, (name, whole) in enumerate(theirs.items()):
        if norm[index] == 0 and whole is not None and whole.any():
            figures.append(Figure(quantity, name, math.inf, 0.0))  # no rank holds it
        else:
            figures.append(_figure(quantity, name, difference[index], own_norm[index], norm[index]))
    return figures


def _squares(own: Tensor | None, whole: Tensor) -> Tensor:
    """-> [3] float64: squared norms of the difference, of the own part, and of what it should be"""
    if isinstance(own, DTensor):
        whole = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None).to_local()
        own = own.to_local()
    if own is None:
        own = torch.zeros_like(whole)
    own, whole = own.double(), whole.double()
    return torch.stack([each.square().sum() for each in (own - whole, own, whole)])


def _compare_forward(trace: Trace, reference: Trace, group: dist.ProcessGroup | None) -> list[Figure]:
    """Compare the features of each token between the sublayers, and each assignment, layer by layer."""
    met = trace.seen.unsqueeze(-1).double()
    pairs = (trace.stream - reference.stream * met, trace.stream, reference.stream * met)
    squares = torch.stack([each.square().sum((2, 3)) for each in pairs])  # [3, layers, 2]
    difference, own, norm = all_reduce_sum(squares, group).sqrt().tolist()
    seen, kept = all_reduce_sum(trace.seen.clone(), group), all_reduce_sum(trace.kept.clone(), group)
    figures = []
    for layer in range(len(seen)):
        for place, sublayer in enumerate(("the mixer", "the channel mixer")):
            if place == 1:
                figures.append(_count("assignments", f"of layer {layer}", kept[layer], reference.kept[layer]))
            if not reference.seen[layer, place].any():
                continue  # side by side with the channel mixer, a mixer has no features of its own
            name = f"after {sublayer} of layer {layer}"
            figures.append(_count("tokens", name, seen[layer, place], reference.seen[layer, place]))
            figures.append(_figure("features", name, difference[layer][place], own[layer][place], norm[layer][place]))
    return figures


def _compare_counts(
    ours: Mapping[str, list[int] | int], theirs: Mapping[str, list[int] | int]
) -> list[Figure]:
    assert ours.keys() == theirs.keys(), "mixtures of experts are in other layers"
    figures = []
    for name in theirs:
        quantity, layer = parse(name)
        figures.append(_count(quantity.replace("_", " "), f"of layer {layer}",
                              torch.tensor(ours[name]), torch.tensor(theirs[name])))
    return figures


def _count(quantity: str, of: str, ours: Tensor, theirs: Tensor) -> Figure:
    return _figure(quantity, of, float((ours - theirs).abs().sum()), float(ours.sum()), float(theirs.sum()))


def worst(figures: Sequence[Figure], tolerance: float) -> Figure:
    """The figure furthest off."""
    return max(figures, key=lambda figure: math.inf if math.isnan(figure.error) else figure.error / tolerance)


def worst_scale(figures: Sequence[Figure]) -> Figure:
    """The gradient whose norm is furthest from what it should be."""
    gradients = [figure for figure in figures if figure.quantity == "gradient"]
    return max(gradients, key=lambda figure: abs(figure.scale - 1) if math.isfinite(figure.scale) else math.inf)


def diagnose(figures: Sequence[Figure], tolerance: float) -> str:
    """Name what falls short first, in the order of `compare`, and what follows from it. -> "" when nothing does"""
    wrong = [figure for figure in figures if not figure.within(tolerance)]
    if not wrong:
        return ""
    quantity = wrong[0].quantity
    group = [figure for figure in wrong if figure.quantity == quantity]
    text = _parameters(group) if "." in wrong[0].of else _describe(wrong[0])
    others = list(dict.fromkeys(figure.quantity for figure in wrong if figure.quantity != quantity))
    return text + (f"; then {', '.join(others)}" if others else "")


def _describe(figure: Figure) -> str:
    if figure.quantity in ("assignments", "tokens", "tokens per expert", "dropped"):
        return f"{figure}: {figure.error:.1%} differ, {figure.scale:.3f} times as many"
    return f"{figure} {_times(figure.scale)}, error {figure.error:.1e}"


def _parameters(wrong: Sequence[Figure]) -> str:
    """Say which kinds of parameters, by what factor if it is one, and which one is worst."""
    kinds = list(dict.fromkeys(_kind(figure.of) for figure in wrong))
    name = wrong[0].quantity if wrong[0].quantity != "gradient" else "gradients"
    scales = [figure.scale for figure in wrong]
    top = worst(wrong, 1.0)
    factor = _times(scales[0]) if max(scales) - min(scales) < 1e-3 else "wrong"
    whose = " and ".join(kinds) if len(kinds) < 4 else f"{len(kinds)} kinds of"
    return f"{whose} {name} {factor}, most {top.of} (scale {top.scale:.3f}, error {top.error:.1e})"


def _kind(parameter: str) -> str:
    return next(kind for part, kind in PARTS.items() if part in parameter)


def _times(scale: float) -> str:
    if abs(scale - 1) < 5e-4:
        return "wrong"
    return f"{scale:.3f} times too large" if scale > 1 else f"only {scale:.3f} times as large"
