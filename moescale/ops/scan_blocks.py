"""The selective scan on a processor, and wherever there is no kernel: some positions at a time, in the cache.

Decays and inputs of a block of positions are made at once; then each position takes one operation, over all rows,
states and channels. Of the states only one per block is kept, that before it; backward computes the others again. So
memory grows with seq x channels, and not with d_state as well.

Tensors of a block are [positions, batch, d_state, channels]: sums over states then run along channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS = 2**18  # of a block's tensor, so that a few of them stay in the cache
FEWEST, MOST = 16, 256  # positions of a block


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, restarts: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan as `ops.scan.selective_scan` does."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    if first is None:
        first = torch.zeros(len(u), *a.shape, dtype=dtype, device=u.device)
    y, last = _Scan.apply(*(x.to(dtype) for x in (u, delta, a, b, c, d)), restarts, first.to(dtype))
    return y.to(u.dtype), last


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, restarts: Tensor | None,
        first: Tensor,
    ) -> tuple[Tensor, Tensor]:
        block = _Block(u, delta, a, b, restarts)
        y, h = torch.empty_like(u), first.mT  # [batch, d_state, channels]
        before = first.new_empty(len(block.starts), *h.shape)  # of each block
        for number, start in enumerate(block.starts):
            before[number] = h
            states, _ = block.run(start, before[number])
            at = slice(start, start + len(states) - 1)
            y[:, at] = (c[:, at].transpose(0, 1).unsqueeze(-2) @ states[1:]).squeeze(-2).transpose(0, 1)
            h = states[-1]
        ctx.save_for_backward(u, delta, a, b, c, d, restarts, before)
        return y.addcmul_(u, d), h.mT.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c, d, restarts, before = ctx.saved_tensors
        block = _Block(u, delta, a, b, restarts)
        grad_u, grad_delta, grad_b, grad_c = grad * d, *(torch.empty_like(x) for x in (delta, b, c))
        grad_a, grad_states = torch.zeros_like(block.a), torch.empty_like(block.decays)
        grad_by_position = grad_states.unbind()
        carry = grad_last.mT  # the gradient of the state behind the block, times its decay
        for number in reversed(range(len(block.starts))):
            start = block.starts[number]
            states, decays = block.run(start, before[number])
            at, size = slice(start, start + len(decays)), len(decays)
            grad_y, delta_at, u_at = (x[:, at].transpose(0, 1) for x in (grad, delta, u))
            grads = grad_states[:size]
            grad_c[:, at] = torch.mul(states[1:], grad_y.unsqueeze(-2), out=grads).sum(-1).transpose(0, 1)
            # grad_h_t = c_t grad_t + decay_(t+1) grad_h_(t+1), from the end
            torch.mul(c[:, at].transpose(0, 1).unsqueeze(-1), grad_y.unsqueeze(-2), out=grads)
            grads[-1] += carry
            for t in range(size - 2, -1, -1):
                grad_by_position[t].addcmul_(block.decay_by_position[t + 1], grad_by_position[t + 1])
            carry = decays[0] * grads[0]
            # From the states to what each position takes in.
            grad_input = (b[:, at].transpose(0, 1).unsqueeze(-2) @ grads).squeeze(-2)  # the gradient of delta u
            # And to the decays, exp(delta a); the buffers of decays and states are used up on the way.
            grad_exponents, scratch = decays.mul_(grads).mul_(states[:-1]), states[1:]  # the gradient of delta a
            grad_b[:, at] = torch.mul(grads, (delta_at * u_at).unsqueeze(-2), out=scratch).sum(-1).transpose(0, 1)
            grad_a += torch.mul(grad_exponents, delta_at.unsqueeze(-2), out=scratch).sum((0, 1))
            grad_of_delta = torch.mul(grad_exponents, block.a, out=scratch).sum(-2)
            grad_delta[:, at] = grad_of_delta.addcmul_(grad_input, u_at).transpose(0, 1)
            grad_u[:, at] += (grad_input * delta_at).transpose(0, 1)
        return grad_u, grad_delta, grad_a.mT, grad_b, grad_c, (grad * u).sum((0, 1)), None, carry.mT


class _Block:
    """The buffers of a block of positions, used for one after another."""

    def __init__(self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, restarts: Tensor | None) -> None:
        self.u, self.delta, self.a, self.b = u, delta, a.mT.contiguous(), b
        (batch, seq, channels), d_state = u.shape, a.shape[1]
        size = min(MOST, max(FEWEST, d_state, ELEMENTS // max(1, batch * channels * d_state)))
        self.starts = range(0, seq, size)
        self.log_2 = self.a * math.log2(math.e)  # of decays over steps; exp2 takes less than half the time of exp
        self.decays = u.new_empty(min(size, seq), batch, d_state, channels)
        self.states = u.new_empty(min(size, seq) + 1, batch, d_state, channels)
        self.decay_by_position, self.state_by_position = self.decays.unbind(), self.states.unbind()
        self.restarts = None if restarts is None else restarts.T.nonzero()  # [any, 2]: position, row

    def run(self, start: int, before: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the states of the block that begins at `start`, that before it first, and the decays that lead there.

        before: [batch, d_state, channels]. Returns [positions + 1, ...] and [positions, ...], valid until the next run.
        """
        delta, u, b = (x[:, start : start + len(self.decays)].transpose(0, 1) for x in (self.delta, self.u, self.b))
        size = len(delta)
        decays, states = self.decays[:size], self.states[: size + 1]
        torch.mul(delta.unsqueeze(-2), self.log_2, out=decays).exp2_()
        if self.restarts is not None:
            position, row = self.restarts[(self.restarts[:, 0] >= start) & (self.restarts[:, 0] < start + size)].T
            decays[position - start, row] = 0
        states[0] = before
        torch.mul((delta * u).unsqueeze(-2), b.unsqueeze(-1), out=states[1:])
        state = self.state_by_position
        for t, decay in enumerate(self.decay_by_position[:size]):
            state[t + 1].addcmul_(decay, state[t])
        return states, decays
