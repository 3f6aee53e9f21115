"""The engine on Megatron-Core: its layers, pipeline schedules and distributed optimizer, under our seam.

Losses are sums over the global batch divided by its counts, so that gradients are to be added up. Megatron takes their
mean over micro-batches and data ranks, and so each loss is multiplied by the number of both before. Its routers attach
their own losses, as means over the tokens of a micro-batch: all have as many, since training knows no padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from moescale.config import Config, ConfigError, TrainingError
from moescale.data.batches import Batch
from moescale.engine.accounting import StepAccount, begin_statistics, mean_cross_entropy, mixtures
from moescale.engine.base import Choices, Features, StepLosses
from moescale.engine.megatron_routers import WatchedRouter
from moescale.engine.megatron_settings import layout_of, model_settings, transformer_settings
from moescale.engine.megatron_weights import NativeWeights
from moescale.engine.own_layers import Standing
from moescale.engine.recording import Shown
from moescale.model.build import build_model as build_own_model
from moescale.model.initialize import initialize_each
from moescale.model.language_model import LossSums
from moescale.optim.optimizer import count_from
from moescale.optim.schedule import Peak
from moescale.parallel.lost_ranks import where_in
from moescale.parallel.mesh import Mesh
from moescale.spec.model import describe

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, whatever package has it


class MegatronEngine(Standing):
    """Runs steps on this rank; see `engine.base.Engine`. config: settled by `Config.for_world`."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        parallel, stage = config.parallel, mesh.stages[0]
        start_groups(config)
        self.model = build_model(config, first=stage == 0, last=stage == parallel.pp - 1,
                                 finalize_model_grads_func=finalize_model_grads).to(mesh.device)
        self.weights = NativeWeights(
            config, layout_of(config), (mesh.rank % parallel.tp, stage, mesh.rank % parallel.ep),
            tp=None if mesh.dense is None else mesh.dense["tp"], ep=None if mesh.sparse is None else mesh.sparse["ep"])
        theirs = {layer.layer_number - 1: layer.mlp.router for layer in self.model.decoder.layers
                  if hasattr(layer.mlp, "router")}
        ours = mixtures(build_own_model(config))  # without values: what their routers do is counted there
        super().__init__(config, mesh, {index: ours[index] for index in theirs})
        self.ddp = DistributedDataParallel(
            self.model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            Float16Module(self.model.config, self.model) if self.model.config.bf16 else self.model)
        for router in theirs.values():
            router._maintain_float32_expert_bias()  # which was rounded with the weights
        decaying = {id(parameter) for name, parameter in self.model.named_parameters() if name in self.weights.decaying}
        apart = ParamKey(predicate=ParamPredicate("no decay", lambda parameter: id(parameter) not in decaying))
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(**optimizer_settings(config)), [self.ddp], {apart: {"wd_mult": 0.0}},
            use_gloo_process_groups=False)
        self.routers = [WatchedRouter(index, router, ours[index], mesh.device) for index, router in theirs.items()]
        self.shards = Shards(self.model, self.optimizer)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = config.optim.weight_decay * group["wd_mult"]
        first = {name: nn.Parameter(tensor) for name, tensor in self.weights.show(self.shards.whole("param"))}
        initialize_each(first.items(), describe(config), config.run.seed)
        self._put({name: tensor.data for name, tensor in first.items()}, "param")
        self.account: StepAccount | None = None
        self.num_means = 1  # micro-batches and data ranks, of whose losses Megatron takes the mean
        self.accumulated = False

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Bring every weight of this stage together, with its gradient where there is one; all ranks must call."""
        grads = dict(self.weights.show(self.shards.whole("grad"))) if self.accumulated else {}
        return {name: Shown.make(tensor, grads.get(name))
                for name, tensor in self.weights.show(self.shards.whole("param"))}

    @contextmanager
    def record(
        self, *, training: bool, choices: Callable[[Choices], None] | None = None,
        features: Callable[[Features], None] | None = None,
        gradients: Callable[[Features], None] | None = None,
    ) -> Iterator[None]:
        """Show what routers choose. Raises ConfigError where features of the layers are asked for."""
        if features is not None or gradients is not None:
            raise ConfigError("run.engine=megatron does not show the features of its layers: write run.engine=native "
                              "where they are compared")
        with ExitStack() as shown:
            if choices is not None:
                for router in self.routers:
                    shown.enter_context(router.shown(training, choices))
            yield

    def where(self, error: BaseException) -> str:
        return where_in(error, self.model)

    def forward_backward(self, batches: Sequence[Batch], *, watch: bool = True) -> StepLosses:
        """Add up the gradients of this rank's micro-batches; each rank has its share of the sums of all of them.

        Raises TrainingError for padding, which Megatron's routers count as tokens.
        """
        if any(bool((batch.token_id < 0).any()) for batch in batches):
            raise TrainingError("run.engine=megatron trains on whole sequences: it counts padding as tokens")
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        begin_statistics(self.mixtures, watch=watch)
        self.account = StepAccount(batches, self.config, self.mesh)
        for router in self.routers:
            router.begin(self.account.sums[2:])
        self._run(batches, forward_only=False)
        self.accumulated = True
        return self.account.means()

    def clear_gradients(self) -> None:
        self.ddp.zero_grad_buffer()
        self.accumulated = False

    def spoilt(self) -> list[str]:
        """Name none: Megatron's gradients lie in flat buffers."""
        return []

    def step(self, guard: Tensor | None = None) -> Tensor:
        """Clip, update every weight, clear the gradients; return the gradient norm before clipping.

        Biases of routers have moved before, by the loads of all ranks, when the gradients were added up.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        _, norm, _ = self.optimizer.step()
        self.clear_gradients()
        self.step_count += 1
        return torch.as_tensor(norm, dtype=torch.float64, device=self.mesh.device)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Return the cross entropy in nats per target, over all ranks' batches."""
        self.ddp.eval()
        self.account = None
        sums = self._run(batches, forward_only=True)
        total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return mean_cross_entropy(total, batches, self.mesh)

    def _run(self, batches: Sequence[Batch], *, forward_only: bool) -> list[Tensor]:
        """Let Megatron's schedule run the passes. Returns the cross entropy of each, where the last stage is."""
        self.num_means = len(batches) * self.mesh.batch_size
        return get_forward_backward_func()(
            forward_step_func=self._forward_step, data_iterator=iter(batches), model=[self.ddp],
            num_microbatches=len(batches), seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0], forward_only=forward_only)

    def _forward_step(self, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        for router in self.routers:
            router.take(batch.token_id)
        hidden = hidden_keys(batch.positions, self.config.attention.window)
        output = model(batch.tokens, batch.positions, hidden, labels=batch.targets.clamp(min=0))
        return output, partial(self._loss, batch)

    def _loss(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Make of the losses of all positions, [batch, seq], what Megatron takes the mean of, and their sum."""
        cross_entropy = (losses * (batch.targets != -100)).double().sum()
        if self.account is None:
            return cross_entropy, cross_entropy.clone()  # the first is divided in place
        none = torch.zeros_like(cross_entropy)
        loss = self.account.loss(LossSums(cross_entropy, none, none, none))
        return loss * self.num_means, cross_entropy.detach()

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for begin, what in {"model.": "param", **{f"optim.{word}.": word for word in MOMENTS}}.items():
            self._put({name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)},
                      what)

    def _stand_at(self, step: int, peak: Peak | None) -> None:
        super()._stand_at(step, peak)
        self.shards.stand_at(step)

    def _tensors(self) -> dict[str, Tensor]:
        """Make everything that a checkpoint holds, by name, in copies."""
        biases = self.weights.show(self._biases())
        tensors = {f"model.{name}": tensor for name, tensor in biases}
        tensors |= {f"model.{name}": tensor for name, tensor in self.weights.show(self.shards.whole("param"))}
        for word in MOMENTS:
            tensors |= {f"optim.{word}.{name}": tensor for name, tensor in self.weights.show(self.shards.whole(word))}
        return tensors

    def _biases(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.model.named_buffers() if name in self.weights.shapes}

    def _put(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Set weights, or moments of them. tensors: this rank's parts of ours, by name"""
        wholes, biases = self.shards.empty(), self._biases()
        for name, tensor in tensors.items():
            self.weights.put(name, tensor, wholes | biases)
        self.shards.put(wholes, what)


class Shards:
    """What the distributed optimizer keeps of each parameter: a range of it on each data rank, in float32."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.parameters = dict(model.named_parameters())
        self.optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
        for each in self.optimizers:
            for group in each.param_groups:
                for main in group["params"]:
                    moments = {word: torch.zeros_like(main, dtype=torch.float32) for word in MOMENTS}
                    each.optimizer.state[main] = {**moments, "step": torch.zeros((), device=main.device)}

    def empty(self) -> dict[str, Tensor]:
        """Make a float32 tensor like each parameter."""
        return {name: torch.zeros(parameter.shape, device=parameter.device)
                for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def whole(self, what: str) -> dict[str, Tensor]:
        """Bring the ranges of all data ranks together. what: `param`, `grad`, or a moment's word"""
        wholes = self.empty()
        for name, parameter in self.parameters.items():
            flat = wholes[name].view(-1)
            for part, held in self._held(parameter, what):
                flat[part] = held
            dist.all_reduce(flat, group=_data_group(parameter))
        return wholes

    @torch.no_grad()
    def put(self, wholes: Mapping[str, Tensor], what: str) -> None:
        """Set what is kept of each parameter here, and the parameter with it."""
        for name, parameter in self.parameters.items():
            for part, held in self._held(parameter, what):
                held.copy_(wholes[name].view(-1)[part])
            if what == "param":
                parameter.copy_(wholes[name])

    def stand_at(self, step: int) -> None:
        """Let the next update be the one after so many steps, in the counts of torch and of fused kernels."""
        for each in self.optimizers:
            count_from(each.optimizer, step)
            for group in each.optimizer.param_groups:
                group["step"] = step

    def _held(self, parameter: nn.Parameter, what: str) -> Iterator[tuple[slice, Tensor]]:
        """Find the range of a parameter that lies here, if one does, and what is kept of it."""
        for each in self.optimizers:
            if parameter in each.model_param_gbuf_map:
                found = each._get_model_param_range_map(parameter)["param"]
                part = slice(found.start, found.end)
                group, place = each.model_param_group_index_map[parameter]
                main = each.optimizer.param_groups[group]["params"][place]
                if what == "grad":
                    yield part, vars(parameter)["main_grad"].view(-1)[part]
                else:
                    yield part, main.data if what == "param" else each.optimizer.state[main][what]


def _data_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    """Find the ranks that share out what is kept of a parameter; Megatron marks those of experts."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def start_groups(config: Config) -> None:
    """Lay out Megatron's groups of ranks, which are numbered as ours: tp innermost, then data ranks, then stages."""
    if not dist.is_initialized():  # one process, which has no need of a group elsewhere
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        parallel.tp, parallel.pp, expert_model_parallel_size=parallel.ep, expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed, force_reset_rng=True)


def build_model(config: Config, *, first: bool = True, last: bool = True, **settings: Any) -> GPTModel:
    """Build this rank's part of the model from Megatron's own layers, its values not set, within its groups of ranks.

    config: settled. first, last: whether the part has the embedding, and the head. settings: of TransformerConfig,
    beside those of the run.
    """
    theirs = TransformerConfig(**transformer_settings(config) | settings)
    spec = get_gpt_decoder_block_spec(theirs, use_transformer_engine=False, normalization=theirs.normalization)
    return GPTModel(theirs, spec, pre_process=first, post_process=last, **model_settings(config))


def optimizer_settings(config: Config) -> dict[str, Any]:
    """Make the arguments of Megatron's OptimizerConfig. No clipping is a norm that is never reached, which it tells."""
    optim, half = config.optim, config.precision.compute == "bfloat16"
    return {
        "optimizer": "adam", "lr": optim.lr, "min_lr": 0.0, "weight_decay": optim.weight_decay,
        "adam_beta1": optim.betas[0], "adam_beta2": optim.betas[1], "adam_eps": optim.eps,
        "clip_grad": optim.clip_norm or math.inf, "use_distributed_optimizer": True, "bf16": half,
        "params_dtype": torch.bfloat16 if half else torch.float32,
    }


def hidden_keys(positions: Tensor, window: int | None) -> Tensor:
    """Say which keys a query does not see: later ones, those of other documents, and those beyond its window.

    positions: [batch, seq] int64, restart at 0 with a document. Returns [batch, 1, queries, keys] bool.
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    age = index[:, None] - index
    seen = (age >= 0) & (age <= positions[..., None])
    if window is not None:
        seen &= age < window
    return ~seen.unsqueeze(1)
