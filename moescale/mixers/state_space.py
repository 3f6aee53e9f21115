"""S4, S4D and LSSL: each channel passes through a linear system of its own, then channels are mixed."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.comm.collectives import local_tensor, sum_over
from moescale.comm.placement import Placement, Share, call
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.exact import Exact
from moescale.layers.linear import Linear
from moescale.mixers.base import Mixer
from moescale.mixers.recurrent_state import RecurrentState
from moescale.ops.convolution import causal_convolution
from moescale.ops.discretize import discretize
from moescale.ops.hippo import hippo
from moescale.ops.s4 import discretize_diagonal, discretize_dplr, dplr_kernel, dplr_step
from moescale.ops.state_space import (
    Powers,
    free_response,
    krylov_kernel,
    last_state,
    linear_system,
    stepped_kernel,
)


class Systems(Exact):
    """Linear systems of the channels of this rank, in at least float32; weights are of all channels.

    log_step: [channels]. d: [channels] or [channels, outputs], of the inputs that outputs see as they are.
    """

    state_dtype = torch.float32
    log_step: nn.Parameter
    d: nn.Parameter

    def __init__(self, d_state: int) -> None:
        super().__init__()
        self.d_state = d_state
        self.share, self.sequence = Share(), SequenceShards()

    def attach(self, placement: Placement) -> None:
        self.share, self.sequence = placement.tp, placement.sequence

    @abstractmethod
    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute discrete A, B and C of this rank's channels, as `ops.linear_system` takes them."""

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """Compute the impulse response of each output's states. Returns [channels, outputs, length]."""
        return krylov_kernel(*self.system(), length, dtype)

    def prepare(self) -> tuple[Tensor, ...]:
        """Compute what steps need, which is the same in all of them."""
        return self.system()

    def step(
        self, u: Tensor, restarts: Tensor, state: Tensor, prepared: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Go on by one position. Arguments and result are those of `ops.linear_system`."""
        a, b, c = prepared
        out, last = linear_system(u, restarts, a, b, c, state)
        assert last is not None
        return out, last

    def forward(
        self, u: Tensor, positions: Tensor, state: Tensor | None, prepared: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Run each piece that is here through its systems.

        u: [rows, length, channels], at least float32. positions: [batch, seq], whole. state: [batch, channels, states]
        before the sequence; None = zeros, and the last ones are not wanted. prepared: see `prepare`, for a sequence of
        one position. Returns [rows, length, channels, outputs] and the last states.
        """
        restarts = self.sequence.apart(self.sequence.part(positions)) == 0
        length = u.shape[1]
        d = self.here(self.d).view(u.shape[2], -1)
        if state is not None and length == 1:
            out, state = self.step(u, restarts, state, prepared or self.prepare())
            return out + d * u.unsqueeze(3), state
        kernel = self.kernel(length, u.dtype)
        kernel = torch.cat((kernel[..., :1] + d.unsqueeze(2), kernel[..., 1:]), -1)
        out = causal_convolution(u, kernel, restarts)
        if state is None and not self.sequence.hands_on:
            return out, None
        a, b, c = self.system()
        powers = Powers.of(a)
        last = last_state(u, restarts, powers, b, self.zeros(u) if state is None else state)
        first = state if state is not None else self.sequence.first_states(
            last, lambda before, at: powers.advance(before, at.shape[1]), positions)
        return out + free_response(u, restarts, powers, c, first), last

    def here(self, weight: Tensor) -> Tensor:
        """Take the channels of this rank."""
        return self.share.part(local_tensor(weight))

    def zeros(self, like: Tensor) -> Tensor:
        """Make states that have seen nothing for inputs [batch, length, channels]."""
        shape = len(like), like.shape[2], self.d_state
        return torch.zeros(shape, dtype=torch.promote_types(like.dtype, self.state_dtype), device=like.device)


class DplrSystems(Systems):
    """S4's systems, diagonal plus low rank (Gu, Goel and Re, 2022). Complex weights have two parts in their last dim.

    log_decay, frequency: [channels, d_state / 2], eigenvalues are -exp(log_decay) + i frequency.
    p, b, c: [channels, d_state / 2, 2].
    """

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__(d_state)
        self.log_decay, self.frequency = (nn.Parameter(torch.empty(channels, d_state // 2)) for _ in range(2))
        self.p, self.b, self.c = (nn.Parameter(torch.empty(channels, d_state // 2, 2)) for _ in range(3))
        self.d, self.log_step = (nn.Parameter(torch.empty(channels)) for _ in range(2))

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return eigenvalues, P, B, C and steps, as `ops.s4` takes them."""
        eigenvalues = torch.complex(-self.here(self.log_decay).exp(), self.here(self.frequency))
        p, b, c = (torch.view_as_complex(self.here(x).contiguous()) for x in (self.p, self.b, self.c))
        return eigenvalues, p, b, c.unsqueeze(1), self.here(self.log_step).exp()

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        return discretize_dplr(*self.continuous())

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        return dplr_kernel(*self.continuous(), length, self.system()[0]).to(dtype)

    def prepare(self) -> tuple[Tensor, ...]:
        return self.continuous()

    def step(
        self, u: Tensor, restarts: Tensor, state: Tensor, prepared: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        state = state.masked_fill(restarts.unsqueeze(2), 0)
        eigenvalues, p, b, c, step = prepared
        out, state = dplr_step(u.squeeze(1), eigenvalues, p, b, c, step, state)
        return out.unsqueeze(1), state


class DiagonalSystems(Systems):
    """S4D's systems (Gu et al., 2022); weights as those of `DplrSystems` without P."""

    state_dtype = torch.complex64

    def __init__(self, channels: int, d_state: int, method: Literal["bilinear", "zero_order_hold"]) -> None:
        super().__init__(d_state // 2)
        self.method = method
        self.log_decay, self.frequency = (nn.Parameter(torch.empty(channels, d_state // 2)) for _ in range(2))
        self.b, self.c = (nn.Parameter(torch.empty(channels, d_state // 2, 2)) for _ in range(2))
        self.d, self.log_step = (nn.Parameter(torch.empty(channels)) for _ in range(2))

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        eigenvalues = torch.complex(-self.here(self.log_decay).exp(), self.here(self.frequency))
        b, c = (torch.view_as_complex(self.here(x).contiguous()) for x in (self.b, self.c))
        return *discretize_diagonal(eigenvalues, b, self.here(self.log_step).exp(), self.method), c.unsqueeze(1)


class LsslSystems(Systems):
    """LSSL's systems: HiPPO-LegS, whose A and B stay, read by some outputs (Gu et al., 2021). c: [channels, outputs,
    d_state]. alpha: of the generalised bilinear transform."""

    def __init__(self, channels: int, outputs: int, d_state: int, alpha: float) -> None:
        super().__init__(d_state)
        self.alpha = alpha
        self.c = nn.Parameter(torch.empty(channels, outputs, d_state))
        self.d, self.log_step = nn.Parameter(torch.empty(channels, outputs)), nn.Parameter(torch.empty(channels))

    def steps(self) -> Tensor:
        """Return the step of each channel in float64, in which A and B are made."""
        return self.here(self.log_step).double().exp()

    def discrete(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B of some steps."""
        with torch.device("cpu"):
            a, b = hippo("legs", self.d_state)
        return discretize(a.to(steps.device), b.to(steps.device), steps, self.alpha)

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        return *self.discrete(self.steps()), self.here(self.c)

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        return stepped_kernel(self.discrete, self.steps(), self.here(self.c), length, dtype)


class SystemState(RecurrentState):
    """The states of the systems, and what their steps need, which comes from weights alone and is no row's own."""

    def __init__(self, states: Tensor, prepared: tuple[Tensor, ...]) -> None:
        super().__init__(states=states)
        self.prepared = prepared


class StateSpace(Mixer[SystemState]):
    """Let each feature pass through a linear system along its document, then mix the outputs: a mixer.

    The activation is GELU. gated: the projection has twice as many features, of which one half gates the other.
    """

    def __init__(self, d_model: int, outputs: int, systems: Systems, *, gated: bool) -> None:
        super().__init__()
        self.d_model, self.gated = d_model, gated
        self.sequence, self.share = SequenceShards(), Share()
        self.call = call
        self.systems = systems
        self.out = Linear(d_model * outputs, 2 * d_model if gated else d_model)

    def attach(self, placement: Placement) -> None:
        self.sequence, self.share, self.call = placement.sequence, placement.tp, placement.call_eagerly

    def forward(self, x: Tensor, positions: Tensor, state: SystemState | None = None) -> Tensor:
        channels = self.d_model // self.share.size
        u = self.sequence.apart(x[..., self.share.rank * channels :][..., :channels])
        u = u.to(torch.promote_types(x.dtype, torch.float32))
        if state is None:
            y, _ = self.call(self.systems, u, positions, None)
        else:
            y, last = self.systems(u, positions, state["states"], state.prepared)
            state.update(states=last)
        mixed = self.out(F.gelu(self.sequence.together(y).flatten(2)).to(x.dtype))
        if not self.gated:
            return mixed
        # The gate needs the sum over all channels, which every rank then has: each gives its part of the result.
        upcast = torch.promote_types(x.dtype, torch.float32)
        value, gate = self.call(sum_over, mixed.to(upcast), self.share.group).chunk(2, -1)
        return (value * gate.sigmoid() / self.share.size).to(x.dtype)

    def new_state(self, batch: int, length: int) -> SystemState:
        weight = self.out.weight
        like = weight.new_empty(batch, 0, self.d_model, dtype=torch.promote_types(weight.dtype, torch.float32))
        with torch.no_grad():
            return SystemState(self.systems.zeros(like), self.systems.prepare())
