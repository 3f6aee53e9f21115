"""One hop of a token on its way to its experts: from the ranks of a group to each other, and back.

A token travels to a rank once, however many of its experts are there; that rank weighs and adds up their outputs, and
sends one row back. Each token's assignments travel along: which of the rank's experts take it, with what weight.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moescale.comm.collectives import Group
from moescale.comm.exchange import (
    AllGather,
    AllToAll,
    AsyncExchange,
    CommunicationError,
    Exchange,
    Pausing,
    exchange_numbers,
)
from moescale.moe.routing import Routing, starts
from moescale.ops.permute import permute, reorder, unpermute


@dataclass(frozen=True)
class HopHandle(ABC):
    """How tokens were sent over one hop, which is what bringing outputs back needs.

    starts: for each rank of the group, the index of its first token among those received here.
    """

    exchange: Exchange
    starts: list[int]

    @abstractmethod
    def rows_sent(self) -> dict[int, int]:
        """Count the rows that leave this rank, by rank of the world."""

    @abstractmethod
    def pack(self, x: Tensor) -> Tensor:
        """Make the rows to send. x: [tokens, d_model]. -> [sent, d_model]"""

    @abstractmethod
    def unpack(self, rows: Tensor) -> Tensor:
        """Sum each token's outputs, the reverse of `pack`. rows: [sent, d_model]. -> [tokens, d_model]"""


@dataclass(frozen=True)
class AllToAllHandle(HopHandle):
    """Each token goes where it has experts. token: [sent] int64. row: [tokens, destinations] int64, its inverse."""

    exchange: AllToAll
    token: Tensor
    row: Tensor

    def rows_sent(self) -> dict[int, int]:
        return dict(zip(dist.get_process_group_ranks(self.exchange.group), self.exchange.send, strict=True))

    def pack(self, x: Tensor) -> Tensor:
        return permute(x, self.token, self.row)

    def unpack(self, rows: Tensor) -> Tensor:
        return unpermute(rows, None, self.token, self.row)


@dataclass(frozen=True)
class AllGatherHandle(HopHandle):
    """All tokens go to all ranks, padded to `rows` rows, as many as the rank with the most tokens has."""

    tokens: int
    rows: int

    def rows_sent(self) -> dict[int, int]:
        return dict.fromkeys(dist.get_process_group_ranks(self.exchange.group), self.rows)

    def pack(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, self.rows - self.tokens))

    def unpack(self, rows: Tensor) -> Tensor:
        return rows[: self.tokens]


class _Sizes(NamedTuple):
    """What one rank sends to another, on the host: the message by which ranks agree on sizes.

    label, features, element_bytes: the place in the model and the kind of rows, equal on both sides or an error.
    tokens: how many. slots: the most assignments of one token. assignments: by expert of the receiver.
    """

    label: int
    features: int
    element_bytes: int
    tokens: int
    slots: int
    assignments: list[int]

    @staticmethod
    def read(message: list[int]) -> _Sizes:
        label, features, element_bytes, tokens, slots, *assignments = message
        return _Sizes(label, features, element_bytes, tokens, slots, assignments)

    def fits(self, other: _Sizes) -> bool:
        return self[:3] == other[:3]


class Hop:
    """One hop among the ranks of a group, which hold its experts in order.

    etp: consecutive ranks that share each expert's hidden features. What goes to one of them goes to all, and their
    outputs are added up. to_all: every rank receives every token, and picks those of its own experts.
    """

    def __init__(self, group: Group, *, etp: int = 1, to_all: bool = False, label: str = "experts") -> None:
        self.group, self.etp, self.to_all, self.label = group, etp, to_all, label

    def dispatch(self, x: Tensor, routing: Routing) -> Generator[None, None, tuple[Tensor, Routing, HopHandle]]:
        """Send tokens to the ranks of their experts; pauses while they are under way.

        x: [tokens, d_model]. -> [received, d_model]; their Routing among this rank's experts; what `combine` needs
        """
        # Who goes where, and how much comes from where: the sizes of everything that follows.
        plan = _make_plan(routing, dist.get_world_size(self.group) // self.etp, self.to_all)
        sent, received = self._exchange_sizes(x, routing, plan)
        handle = self._make_handle(plan, sent, received)
        # The tokens set out, then their assignments.
        tokens = AsyncExchange.start(handle.pack(x), handle.exchange)
        send, receive = ([sum(sizes.assignments) for sizes in side] for side in (sent, received))
        exchange = AllToAll(send, receive, self.group, self.label)
        assignment, inverse = _repeat_blocks(send, self.etp, plan.address.device)
        address = AsyncExchange.start(plan.address[assignment], exchange)
        weight = AsyncExchange.start(permute(routing.weight.unsqueeze(1), assignment, inverse), exchange)
        token_id = None
        if routing.token_id is not None:
            token_id = AsyncExchange.start(handle.pack(routing.token_id.unsqueeze(1)), handle.exchange)
        yield
        # All has come: the routing of the tokens that are here now.
        x = tokens.finish()
        arrived = _make_routing(address.finish(), weight.finish(), received, handle.starts, len(x))
        if token_id is not None:
            arrived = replace(arrived, token_id=token_id.finish().squeeze(1))
        return x, arrived, handle

    def combine(self, y: Tensor, handle: HopHandle) -> Pausing:
        """Bring outputs back to where their tokens came from, and sum each token's.

        y: [received, d_model]. -> [tokens, d_model]
        """
        outputs = AsyncExchange.start(y, handle.exchange.reverse())
        yield
        return handle.unpack(outputs.finish())

    def _exchange_sizes(self, x: Tensor, routing: Routing, plan: _Plan) -> tuple[list[_Sizes], list[_Sizes]]:
        """Tell every rank what comes. -> what goes to each rank, what comes from each"""
        tokens = plan.tokens_sent.unsqueeze(1)  # [owners, 1]
        kind = [zlib.crc32(self.label.encode()), x.shape[1], x.element_size()]
        header = tokens.new_tensor(kind).expand(len(tokens), -1)
        assignments = routing.tokens_per_expert.view(len(tokens), -1)
        message = torch.cat((header, tokens, plan.max_slots.expand_as(tokens), assignments), 1)
        message = message.repeat_interleave(self.etp, 0)
        received = exchange_numbers(message, self.group, self.label)
        sides = torch.stack((message, received)).tolist()  # the one time that the host waits for the device
        sent, came = ([_Sizes.read(row) for row in side] for side in sides)
        for rank, sizes in enumerate(came):
            if not sizes.fits(sent[0]):
                raise CommunicationError(
                    f"rank {dist.get_rank()}, {self.label}: rank {rank} of the group sends rows of {sizes.features} "
                    f"features of {sizes.element_bytes} bytes from elsewhere in the model, {x.shape[1]} of "
                    f"{x.element_size()} are due here: all ranks must run the same layers in the same order")
        return sent, came

    def _make_handle(self, plan: _Plan, sent: list[_Sizes], received: list[_Sizes]) -> HopHandle:
        if self.to_all:
            rows = max(sizes.tokens for sizes in received)
            padded_starts = [source * rows for source in range(len(received))]
            return AllGatherHandle(AllGather(self.group, self.label), padded_starts, len(plan.position), rows)
        send, receive = ([sizes.tokens for sizes in side] for side in (sent, received))
        # The row of each token among all that are sent, rank by rank; -1 = not sent there.
        position = plan.position.repeat_interleave(self.etp, 1)  # [tokens, ranks]
        first = position.new_tensor(starts(send))
        row = torch.where(position < 0, -1, position + first)
        # Its inverse, the token of each row. What is not sent is written to one row more, which is cut off.
        tokens, num_rows = torch.arange(len(row), device=row.device), sum(send)
        token = tokens.new_empty(num_rows + 1)
        token.scatter_(0, torch.where(row < 0, num_rows, row).flatten(), tokens.repeat_interleave(row.shape[1]))
        # Of the ranks only as many columns as a token can have destinations.
        destinations = plan.max_owners * self.etp
        if destinations < row.shape[1]:
            row = row.topk(destinations, 1).values
        exchange = AllToAll(send, receive, self.group, self.label)
        return AllToAllHandle(exchange, starts(receive), token[:num_rows], row)


class _Plan(NamedTuple):
    """Who goes where. Owners are the ranks of a group, or the sets of `etp` ranks that share experts.

    position: [tokens, owners] int64, the token's index among those sent there, -1 = not sent.
    tokens_sent: [owners] int64. max_slots: scalar int64, the most assignments that a token has at one owner.
    max_owners: the most owners that a token goes to.
    address: [assignments] int32, `position x local_experts + slot`; the slot numbers the assignments of one token at
    one owner.
    """

    position: Tensor
    tokens_sent: Tensor
    max_slots: Tensor
    max_owners: int
    address: Tensor


def _make_plan(routing: Routing, owners: int, to_all: bool) -> _Plan:
    tokens, choices = routing.row.shape
    local_experts = len(routing.tokens_per_expert) // owners
    owner = routing.expert // local_experts  # [assignments]
    # The owner of each choice; choices without a row (-1, so the last element) belong to nobody, a column of its own.
    nobody = owner.new_full((1,), owners)
    owner_of_choice = torch.cat((owner, nobody))[routing.row]  # [tokens, choices]
    # Count, choice by choice, how many assignments the token already has at that owner: this one's slot.
    count = owner.new_zeros(tokens, owners + 1)
    slots = []
    for column in owner_of_choice.split(1, 1):
        slots.append(count.gather(1, column))
        count.scatter_add_(1, column, torch.ones_like(column))
    count = count[:, :owners]
    # The position of each token among those that go to an owner.
    if to_all:
        position = torch.arange(tokens, device=owner.device).unsqueeze(1).expand(tokens, owners)
        tokens_sent = owner.new_full((owners,), tokens)
    else:
        goes = count > 0
        position = torch.where(goes, goes.cumsum(0) - 1, -1)
        tokens_sent = goes.sum(0)
    # From choices to rows. Choices without a row are written to one element more, which is cut off.
    address_of_choice = position.gather(1, owner_of_choice.clamp(max=owners - 1)) * local_experts + torch.cat(slots, 1)
    address = owner.new_empty(len(owner) + 1, dtype=torch.int32)
    row = torch.where(routing.row < 0, len(owner), routing.row)
    address.scatter_(0, row.flatten(), address_of_choice.flatten().int())
    max_slots = count.max() if count.numel() else count.new_zeros(())
    return _Plan(position, tokens_sent, max_slots, min(choices, owners), address[:-1])


def _repeat_blocks(rows: list[int], etp: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Take each owner's block of assignments once for every rank that shares its experts.

    rows: by rank. -> [sent] int64, the assignment of each row; [assignments, etp] int64, its inverse
    """
    blocks = torch.arange(sum(rows[::etp]), device=device).split(rows[::etp])
    repeated: list[Tensor] = []
    for block in blocks:
        repeated += [block] * etp
    assignment = torch.cat(repeated)
    return assignment, assignment.argsort(stable=True).view(-1, etp)


def _make_routing(address: Tensor, weight: Tensor, received: list[_Sizes], starts: list[int], tokens: int) -> Routing:
    """Make the Routing of what came, among this rank's experts; tokens are in the order of the ranks that sent them.

    address: [received] int32. weight: [received, 1] float32. tokens: how many came.
    """
    counts = torch.tensor([sizes.assignments for sizes in received], device=address.device)  # [ranks, local_experts]
    size, (ranks, local_experts) = len(address), counts.shape
    # Assignments came by rank, then by expert. They are sorted by expert, then by rank: each block moves by `shift`.
    by_source, by_expert = counts.flatten(), counts.T.flatten()
    start_by_expert = (by_expert.cumsum(0) - by_expert).view(local_experts, ranks).T.flatten()
    shift = start_by_expert - (by_source.cumsum(0) - by_source)
    arrival = torch.arange(size, device=address.device)
    row = arrival + shift.repeat_interleave(by_source, output_size=size)  # [received], the sorted row of each
    order = torch.empty_like(row).scatter_(0, row, arrival)
    # The address says the token, counted among those of its rank, and which of its choices this is.
    start = counts.new_tensor(starts).repeat_interleave(counts.sum(1), output_size=size)
    address = address.long()
    token, slot = start + address // local_experts, address % local_experts
    slots = max(1, *(sizes.slots for sizes in received))
    rows = row.new_full((tokens, slots), -1)
    rows.view(-1)[token * slots + slot] = row
    weight = reorder(weight, order, row).squeeze(1)
    return Routing(token[order], weight, counts.sum(0), rows)
