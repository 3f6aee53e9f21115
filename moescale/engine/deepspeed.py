"""The engine on DeepSpeed: ZeRO shares optimizer state, gradients and weights out over ranks; the layers are ours.

Losses are sums over the global batch divided by its counts, so that gradients are to be added up. DeepSpeed takes their
mean over all ranks, those of experts too, and so each loss is multiplied by the number of ranks before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moescale.checkpoint.together import Ranks
from moescale.comm.collectives import local_tensor
from moescale.config import Config, ConfigError
from moescale.data.batches import Batch
from moescale.engine.accounting import (
    StepAccount,
    begin_statistics,
    mean_cross_entropy,
    move_biases,
)
from moescale.engine.base import StepLosses
from moescale.engine.deepspeed_settings import settings
from moescale.engine.own_layers import OwnLayers
from moescale.engine.recording import Shown
from moescale.layers.exact import Exact
from moescale.model.language_model import LossSums
from moescale.optim.base import OPTIMIZERS
from moescale.optim.gradient_norm import clip_gradients
from moescale.optim.optimizer import set_rate
from moescale.parallel.mesh import Mesh
from moescale.parallel.parallelize import build_parallel_model
from moescale.spec.model import describe
from moescale.spec.weights import Weight


class ZeroEngine(OwnLayers):
    """Runs steps on this rank. config: settled by `Config.for_world`."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        made = settings(config)
        self.stage: int = made["zero_optimization"]["stage"]
        if mesh.device.type == "cpu":  # its own collectives there would be compiled at the first start, for a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes the world that there is
        _agree(made)
        super().__init__(config, mesh, build_parallel_model(config, mesh, fsdp=False).whole)
        self.described = {".".join(weight.name): weight for weight in describe(config).weights()}
        self.apart = config.parallel.ep * config.parallel.etp > 1  # whether ranks hold other experts than others do
        if self.apart:
            self._set_experts_apart(config.parallel.ep * config.parallel.etp)
        unrounded: dict[str, Tensor] = {}
        if made["bf16"]["enabled"]:
            unrounded = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
            _cast(self.model, torch.bfloat16)
        self.optimizer = _AdamW(self._groups(), lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps,
                                fused=True)
        self.ds = _Engine(self.model, self.optimizer, made, self.apart and self.stage < 3)
        self.weights = dict(self.model.named_parameters())
        self.optimizer.begin(self._masters())
        if 1 <= self.stage <= 2:
            self.ds.optimizer._lazy_init_hp_params_optimizer_state()
        for name, value in unrounded.items():
            self._set(self.weights[name], value, None)
        self.accumulated = False

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Bring every weight together, with its gradient where there is one; all ranks must call."""
        shown = {}
        for name, parameter in self.weights.items():
            grad = self._of_rank(name, self._gradient(parameter)) if self.accumulated else None
            shown[name] = Shown.make(self._of_rank(name, self._get(parameter, None)), grad)
        return shown

    def forward_backward(self, batches: Sequence[Batch], *, watch: bool = True) -> StepLosses:
        """Add up the gradients of this rank's micro-batches, those of all ranks with the last one."""
        self.ds.train()
        if self.config.moe.balance_over == "global_batch":
            self._balance_over_global_batch(batches)
        begin_statistics(self.mixtures, watch=watch)
        account = StepAccount(batches, self.config, self.mesh)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self.ds.set_gradient_accumulation_boundary(last)
            self.ds.backward(account.loss(self._forward(batch)) * self.mesh.world_size, scale_wrt_gas=False)
            if not last:
                self.ds.step()
        self.accumulated = True
        return account.means()

    def clear_gradients(self) -> None:
        """Refuse to run a step twice: DeepSpeed adds up its gradients out of sight."""
        raise NotImplementedError("DeepSpeed's gradients cannot be cleared without a step")

    def spoilt(self) -> list[str]:
        """Name none: DeepSpeed keeps its gradients to itself."""
        return []

    def step(self, guard: Tensor | None = None) -> Tensor:
        """Clip, update every weight and expert bias, clear the gradients; return the gradient norm before clipping."""
        norm = None
        if self.stage == 0:  # whose own norm is a mean over ranks, and so of experts
            shown = [Shown.make(self._of_rank(name, parameter.data), self._of_rank(name, parameter.grad))
                     for name, parameter in self.weights.items() if parameter.grad is not None]
            norm = clip_gradients(shown, self.config.optim.clip_norm)
        set_rate(self.optimizer, self.learning_rate)
        self.ds.step()
        self.accumulated = False
        if norm is None:
            norm = torch.as_tensor(self.ds.get_global_grad_norm(), dtype=torch.float64, device=self.mesh.device)
            norm = norm.where(norm >= 0, torch.nan)  # what is no finite number is -1 there
        move_biases(self.mixtures, self.config, self.mesh)
        self.step_count += 1
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Return the cross entropy in nats per target, over all ranks' batches."""
        self.ds.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            total += self._forward(batch).cross_entropy
        return mean_cross_entropy(total, batches, self.mesh)

    def _forward(self, batch: Batch) -> LossSums:
        return LossSums(*self.ds(batch.tokens, targets=batch.targets, positions=batch.positions,
                                 token_id=batch.token_id))

    # ---- checkpoints: the native engine's keys, each rank with a share of every tensor

    def _tensors(self) -> dict[str, Tensor]:
        """Make everything that a checkpoint holds, by name, in copies but for buffers."""
        tensors = {f"model.{name}": buffer for name, buffer in self.model.named_buffers() if name in self.described}
        return tensors | {name: self._share(weight, self._get(parameter, moment))
                          for name, weight, parameter, moment in self._places()}

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for name, _, parameter, moment in self._places():
            if name in tensors:
                self._set(parameter, _whole(tensors[name]), moment)

    def _places(self) -> Iterator[tuple[str, Weight, nn.Parameter, str | None]]:
        """Name each weight in a checkpoint, then its moments: with what is said of it, and which moment it is."""
        moments = OPTIMIZERS[self.config.optim.name].moments
        for name, parameter in self.weights.items():
            weight = self.described[name]
            yield f"model.{name}", weight, parameter, None
            for moment in moments(weight, self.config.optim):
                yield "optim." + ".".join(moment.name), weight, parameter, moment.name[0]

    def _share(self, weight: Weight, value: Tensor) -> Tensor:
        """Keep a share of what is whole on this rank, or whole of this rank's experts."""
        dense, sparse = self.mesh.dense, self.mesh.sparse
        assert dense is not None
        assert sparse is not None
        if not (self.apart and weight.view == "sparse"):
            shared = distribute_tensor(value, dense["fsdp"], [Shard(0)], src_data_rank=None)
            return DTensor.from_local(shared.to_local().clone(), shared.device_mesh, shared.placements, run_check=False,
                                      shape=shared.shape, stride=shared.stride())
        cut = weight.cut_dim
        other = next(dim for dim, word in enumerate(weight.dims) if word != "experts" and dim != cut)
        view = sparse["efsdp", "ep", "etp"]
        part = value.chunk(view.size(0), other)[view.get_local_rank("efsdp")].clone()
        return DTensor.from_local(part, view, [Shard(other), Shard(0), Shard(cut)], run_check=False)

    def _of_rank(self, name: str, value: Tensor) -> Tensor:
        """Say of an expert's tensor that it is a part."""
        weight = self.described[name]
        if not (self.apart and weight.view == "sparse"):
            return value
        assert self.mesh.sparse is not None
        return DTensor.from_local(value, self.mesh.sparse["ep", "etp"], [Shard(0), Shard(weight.cut_dim)],
                                  run_check=False)

    # ---- what lies behind ZeRO

    def _get(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """Bring a weight, or a moment of it, together in float32. moment: None is the weight"""
        if self.stage == 0:
            return parameter.data if moment is None else self.optimizer.state[parameter][moment]
        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    @torch.no_grad()
    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Set a weight, both copies of it, or a moment. value: whole"""
        if self.stage == 0:
            self._get(parameter, moment).copy_(value)
        elif self.stage < 3:
            if moment is not None:
                return safe_set_full_optimizer_state(parameter, value, moment)
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
        else:
            group = vars(parameter)["ds_process_group"]
            parts = dist.get_world_size(group)
            padded = nn.functional.pad(value.flatten(), (0, -value.numel() % parts))
            part = padded.view(parts, -1)[dist.get_rank(group)]
            if moment is not None:
                return safe_set_local_optimizer_state(parameter, part, moment)
            safe_set_local_fp32_param(parameter, part)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_full_grad(parameter).float()

    def _masters(self) -> list[Tensor]:
        """List what the optimizer updates: this rank's flat parts in float32, or the weights themselves."""
        zero = self.ds.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(zero, name):
                return list(getattr(zero, name))
        return list(self.weights.values())

    def _groups(self) -> list[dict[str, Any]]:
        """Group parameters by weight decay, by the highest learning rate, by dtype, and by the ranks that hold them."""
        made: dict[tuple[bool, float, bool, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            expert = isinstance(parameter, ExpertParameter)
            weight = self.described[name]
            made[weight.decays, weight.max_rate, expert, parameter.dtype].append(parameter)
        return [
            {"params": parameters, "weight_decay": self.config.optim.weight_decay * decays, "moe": expert,
             "max_rate": max_rate,
             "name": vars(parameters[0])["group_name"] if expert else f"dense {decays} {max_rate} {dtype}"}
            for (decays, max_rate, expert, dtype), parameters in made.items()]

    def _set_experts_apart(self, ranks: int) -> None:
        """Make plain parameters of this rank's part of the experts, marked as DeepSpeed looks for them.

        ranks: among which tokens travel; those in a row, as in our mesh.
        """
        groups._create_expert_and_data_parallel(ranks)
        name = f"ep_size_{ranks}"
        for layer in self.mixtures.values():
            for key, parameter in list(layer.experts.named_parameters()):
                layer.experts.register_parameter(key, ExpertParameter.make(local_tensor(parameter.data), name))


class ExpertParameter(nn.Parameter):
    """This rank's part of a layer's experts, by the marks that DeepSpeed reads.

    Its gradient is added up over the ranks that hold the same experts, its part in the norm over those that do not.
    """

    allreduce = False
    ds_zero_placement_family = "autoep_expert"
    group_name: str
    ds_zero_partition_group_name: str
    ds_zero_partition_process_group: dist.ProcessGroup

    @classmethod
    def make(cls, part: Tensor, group_name: str) -> ExpertParameter:
        parameter = cls(part)
        parameter.group_name = parameter.ds_zero_partition_group_name = group_name
        parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(group_name)
        return parameter


class _Engine(DeepSpeedEngine):
    """DeepSpeed's engine for layers that are not its own."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, made: dict[str, Any], experts: bool) -> None:
        """experts: whether to look for marks of experts in the parameters."""
        self.looks_for_experts = experts
        super().__init__(None, model, optimizer, config=made, config_class=DeepSpeedConfig(made))

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = self.looks_for_experts

    def _cast_module_mixed_precision(self, *arguments: Any, **named: Any) -> None:
        """Leave weights as they are: what is to be rounded has been, and exact ones stay float32."""


class _AdamW(torch.optim.AdamW):
    """AdamW whose moments are there before its first step, so that a checkpoint can be read into them."""

    def begin(self, masters: Sequence[Tensor]) -> None:
        """Make moments of what ZeRO has put into the place of the parameters."""
        for master in masters:
            self.state[master] = {
                "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master),
                "step": torch.zeros((), device=master.device),
            }


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights that matrices multiply with; those of exact modules stay."""
    for module in model.modules():
        if not isinstance(module, Exact):
            module._apply(lambda tensor: tensor.to(dtype) if isinstance(tensor, nn.Parameter) else tensor,
                          recurse=False)


def _whole(tensor: Tensor) -> Tensor:
    """Bring together the shares of a weight, or of this rank's experts."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device_mesh.ndim == 1:
        return tensor.full_tensor()
    return tensor.redistribute(placements=[Replicate(), *tensor.placements[1:]]).to_local()


def _agree(made: dict[str, Any]) -> None:
    """Refuse a file of settings that is another on some rank, which would end in ranks that wait for each other."""
    if any(other != made for other in Ranks(None).gather(made)):
        raise ConfigError("run.deepspeed holds other settings on some rank: give every rank the same file")
