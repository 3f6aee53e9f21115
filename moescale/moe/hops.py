"""One leg of a token's way to its experts: among the ranks of a group, and back.

A token travels to a rank once, however many of its experts are there; that rank weighs and adds up their answers, and
one row comes back. With each token go its assignments: which of the rank's experts, with what weight.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moescale.comm.collectives import Group
from moescale.comm.exchange import AllGather, AllToAll, CommunicationError, Exchange, Journey, Walk, exchange_numbers
from moescale.moe.routing import Routing
from moescale.ops.permute import permute, reorder, unpermute


@dataclass(frozen=True)
class Way(ABC):
    """How tokens come to other ranks and answers come back. starts: where each rank's begin among those received."""

    exchange: Exchange
    starts: list[int]

    @abstractmethod
    def sent(self) -> dict[int, int]:
        """Rows that go out from here, by rank of the world."""

    @abstractmethod
    def pack(self, x: Tensor) -> Tensor:
        """[tokens, d_model] -> the rows to send"""

    @abstractmethod
    def unpack(self, rows: Tensor) -> Tensor:
        """Add up each token's answers: the reverse of `pack`, as its gradient is."""


@dataclass(frozen=True)
class ToSome(Way):
    """Each token goes where it has experts. token: [sent] int64. index: [tokens, copies] int64, the inverse."""

    exchange: AllToAll
    token: Tensor
    index: Tensor

    def sent(self) -> dict[int, int]:
        return dict(zip(dist.get_process_group_ranks(self.exchange.group), self.exchange.send, strict=True))

    def pack(self, x: Tensor) -> Tensor:
        return permute(x, self.token, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        return unpermute(rows, None, self.token, self.index)


@dataclass(frozen=True)
class ToAll(Way):
    """All tokens go to all ranks, as many rows from each as the one with most has."""

    tokens: int
    rows: int

    def sent(self) -> dict[int, int]:
        return dict.fromkeys(dist.get_process_group_ranks(self.exchange.group), self.rows)

    def pack(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, self.rows - self.tokens))

    def unpack(self, rows: Tensor) -> Tensor:
        return rows[: self.tokens]


class _Sizes(NamedTuple):
    """What one rank sends to another, on the host. tag: the place and the kind of rows, which must agree."""

    assignments: list[int]  # by expert of the receiver
    tokens: int
    slots: int
    tag: list[int]


class Hop:
    """A leg among the ranks of a group, which hold its experts in order.

    With `copies` above one, as many ranks in a row share each expert's hidden features: what goes to one of them goes
    to all, and their answers are added up. With `to_all`, every rank sees every token, and picks its own.
    """

    def __init__(self, group: Group, *, copies: int = 1, to_all: bool = False, label: str = "experts") -> None:
        self.group, self.copies, self.to_all, self.label = group, copies, to_all, label

    def out(self, x: Tensor, routing: Routing) -> Generator[None, None, tuple[Tensor, Routing, Way]]:
        """x: [tokens, d_model]. -> [received, d_model]; their Routing among this rank's experts; the way back"""
        plan = _make_plan(routing, dist.get_world_size(self.group) // self.copies, self.to_all)
        sent, received = self._exchange_sizes(x, routing, plan)
        way = self._find_way(plan, sent, received)
        tokens = Journey(way.pack(x), way.exchange)
        send, receive = ([sum(sizes.assignments) for sizes in side] for side in (sent, received))
        exchange = AllToAll(send, receive, self.group, self.label)
        copy, inverse = _copy_blocks(send, self.copies, plan.place)
        place = Journey(plan.place[copy], exchange)
        weight = Journey(permute(routing.weight.unsqueeze(1), copy, inverse), exchange)
        token_id = None if routing.token_id is None else Journey(way.pack(routing.token_id.unsqueeze(1)), way.exchange)
        yield
        x = tokens.arrive()
        arrived = _arrived(place.arrive(), weight.arrive(), received, way.starts, len(x))
        return x, arrived if token_id is None else replace(arrived, token_id=token_id.arrive().squeeze(1)), way

    def back(self, y: Tensor, way: Way) -> Walk:
        """Bring answers to where their tokens came from, and add up each one's. y: [received, d_model]. -> like x"""
        journey = Journey(y, way.exchange.reverse())
        yield
        return way.unpack(journey.arrive())

    def _exchange_sizes(self, x: Tensor, routing: Routing, plan: _Plan) -> tuple[list[_Sizes], list[_Sizes]]:
        """Tell every rank what comes, and hear it. -> sent to each, received from each"""
        owners = plan.tokens.unsqueeze(1)  # [owners, 1]
        tag = owners.new_tensor([zlib.crc32(self.label.encode()), x.shape[1], x.element_size()]).expand(len(owners), 3)
        assignments = routing.tokens_per_expert.view(len(owners), -1)
        message = torch.cat((assignments, owners, plan.slots.expand_as(owners), tag), 1)
        message = message.repeat_interleave(self.copies, 0)
        received = exchange_numbers(message, self.group, self.label)
        sides = torch.stack((message, received)).tolist()  # the one time that the host waits for the device
        sent, came = ([_Sizes(row[:-5], row[-5], row[-4], row[-3:]) for row in side] for side in sides)
        for rank, sizes in enumerate(came):
            if sizes.tag != sent[0].tag:
                raise CommunicationError(
                    f"rank {dist.get_rank()}, {self.label}: rank {rank} of the group sends rows of {sizes.tag[1]} "
                    f"features of {sizes.tag[2]} bytes from elsewhere in the model, {x.shape[1]} of {x.element_size()} "
                    "are due here: all ranks must run the same layers in the same order")
        return sent, came

    def _find_way(self, plan: _Plan, sent: list[_Sizes], received: list[_Sizes]) -> Way:
        if self.to_all:
            rows = max(sizes.tokens for sizes in received)
            starts = [source * rows for source in range(len(received))]
            return ToAll(AllGather(self.group, self.label), starts, len(plan.position), rows)
        send, receive = ([sizes.tokens for sizes in side] for side in (sent, received))
        position = plan.position.repeat_interleave(self.copies, 1)  # [tokens, ranks]
        first = position.new_tensor([0, *accumulate(send)][:-1])
        index = torch.where(position < 0, -1, position + first)
        tokens, total = torch.arange(len(index), device=index.device), sum(send)
        token = tokens.new_empty(total + 1)  # the last one takes what is not sent
        token.scatter_(0, torch.where(index < 0, total, index).flatten(), tokens.repeat_interleave(index.shape[1]))
        if plan.copies * self.copies < index.shape[1]:
            index = index.topk(plan.copies * self.copies, 1).values
        exchange = AllToAll(send, receive, self.group, self.label)
        return ToSome(exchange, [0, *accumulate(receive)][:-1], token[:total], index)


class _Plan(NamedTuple):
    """Who goes where. Owners are the ranks of a group, or sets of ranks that share experts.

    position: [tokens, owners] int64, the token's place among those sent there, -1 = not sent. tokens: [owners] int64.
    slots: scalar int64, how many assignments a token has at an owner at most. copies: owners a token goes to at most.
    place: [assignments] int32, `position x local_experts + slot`, slot being the assignment's number among those of the
    same token and owner.
    """

    position: Tensor
    tokens: Tensor
    slots: Tensor
    copies: int
    place: Tensor


def _make_plan(routing: Routing, owners: int, to_all: bool) -> _Plan:
    tokens, choices = routing.row.shape
    local_experts = len(routing.tokens_per_expert) // owners
    owner = routing.expert // local_experts  # [assignments]
    none = owner.new_full((1,), owners)
    owner_of_choice = torch.cat((owner, none))[routing.row]  # [tokens, choices]; row -1 takes the last
    count = owner.new_zeros(tokens, owners + 1)
    slots = []
    for column in owner_of_choice.split(1, 1):
        slots.append(count.gather(1, column))
        count.scatter_add_(1, column, torch.ones_like(column))
    count = count[:, :owners]
    if to_all:
        position = torch.arange(tokens, device=owner.device).unsqueeze(1).expand(tokens, owners)
        sent = owner.new_full((owners,), tokens)
    else:
        member = count > 0
        position = torch.where(member, member.cumsum(0) - 1, -1)
        sent = member.sum(0)
    spot = position.gather(1, owner_of_choice.clamp(max=owners - 1)) * local_experts + torch.cat(slots, 1)
    place = owner.new_empty(len(owner) + 1, dtype=torch.int32)  # the last one takes choices that have no row
    place.scatter_(0, torch.where(routing.row < 0, len(owner), routing.row).flatten(), spot.flatten().int())
    most = count.max() if count.numel() else count.new_zeros(())
    return _Plan(position, sent, most, min(choices, owners), place[:-1])


def _copy_blocks(rows: list[int], copies: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Take each owner's block of assignments once for every rank that shares its experts.

    rows: by rank. -> [sent] int64, the assignment of each copy; [assignments, copies] int64, its inverse
    """
    blocks = torch.arange(sum(rows[::copies]), device=like.device).split(rows[::copies])
    copy = torch.cat([block for block in blocks for _ in range(copies)])
    return copy, copy.argsort(stable=True).view(-1, copies)


def _arrived(place: Tensor, weight: Tensor, received: list[_Sizes], starts: list[int], tokens: int) -> Routing:
    """Make the Routing of what came, in the order of the ranks that sent it, among this rank's experts.

    place: [received] int32. weight: [received, 1]. tokens: received ones.
    """
    counts = torch.tensor([sizes.assignments for sizes in received], device=place.device)  # [ranks, local_experts]
    size, (ranks, local_experts) = len(place), counts.shape
    by_source, by_expert = counts.flatten(), counts.T.flatten()
    start_by_expert = (by_expert.cumsum(0) - by_expert).view(local_experts, ranks).T.flatten()
    shift = start_by_expert - (by_source.cumsum(0) - by_source)  # how far each block moves when sorted by expert
    arrival = torch.arange(size, device=place.device)
    row = arrival + shift.repeat_interleave(by_source, output_size=size)  # [received], the sorted place of each
    order = torch.empty_like(row).scatter_(0, row, arrival)
    start = counts.new_tensor(starts).repeat_interleave(counts.sum(1), output_size=size)
    place = place.long()
    token, slot = start + place // local_experts, place % local_experts
    slots = max(1, *(sizes.slots for sizes in received))
    rows = row.new_full((tokens, slots), -1)
    rows.view(-1)[token * slots + slot] = row
    weight = reorder(weight, order, row).squeeze(1)
    return Routing(token[order], weight, counts.sum(0), rows)
