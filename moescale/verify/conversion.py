"""`moescale convert --verify`: both models on the same tokens, each as its own format understands it.

Like is compared with like: where the weights are rounded on their way, so are those of the source. A token of which two
experts are as good as each other may get either from rounding alone, and what follows it in its sequence then differs
without fault: the positions before it are compared, and how many these are is said.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from moescale.config import Config, ConfigError
from moescale.convert.fingerprint import digests, fingerprints
from moescale.convert.mapping.mapped import Opened, weights_of
from moescale.model.build import build_model
from moescale.model.language_model import LanguageModel
from moescale.moe.routers.token_choice import MixtralRouter
from moescale.verify import deepspeed, megatron

SEQUENCES, SEQ, BEYOND = 2, 64, 32
MOST_LOGITS = 1 << 28  # of the sequence that is longer than the window
TOLERANCE = 1e-5  # of the largest logit, in float32 and two layers; more layers differ more
CERTAIN = 1e-5  # of a router's probability, between the last expert that is chosen and the first that is not; as above
HALF_DTYPES = (torch.bfloat16, torch.float16)


def compare_models(source: Opened, written: Opened, found: Mapping[str, str], *, same: bool = True) -> str:
    """Read what was written, hold it to its fingerprints, and run both models.

    found: fingerprints of what was meant to be written. same: whether the logits must agree.
    -> a line with the largest difference. Raises ConfigError.
    """
    parts = {name: digests(written.weights[name], values) for name, values in weights_of(written)}
    wrong = [name for name, digest in fingerprints(written.weights, parts).items() if found.get(name) != digest]
    if wrong:
        raise ConfigError(f"--verify: {wrong[-1]} of the {written.format} checkpoint is not what was converted; "
                          "nothing was written")
    tokens, dtype = _tokens(source.config), _rounded_to(written)
    size, difference, compared, positions, furthest = 0.0, 0.0, 0, 0, 0
    seen = zip(tokens, logits(source, tokens, dtype), logits(written, tokens, dtype), strict=True)
    for batch, (before, sure), (after, also_sure) in seen:
        certain = (sure & also_sure).cumprod(1).bool() if same else torch.ones_like(batch, dtype=torch.bool)
        size = max(size, float(before.abs().max()))
        difference = max(difference, float(((before - after).abs().amax(-1) * certain).max()))
        compared, positions = compared + int(certain.sum()), positions + batch.numel()
        furthest = max(furthest, int(certain.sum(1).max()))
    line = f"largest difference of the logits {difference:.3g}, of logits up to {size:.3g}, at {compared} positions"
    if compared < positions:
        line += f" (not at {positions - compared} that follow a token of which two experts are as good)"
    window = source.config.longest_window
    if window is not None and furthest <= window:
        line += f"; the window of {window} is longer than the {furthest} positions of a sequence that were compared"
    tolerance = TOLERANCE * _depth(source)
    if same and not (compared and difference <= tolerance * max(1.0, size)):
        raise ConfigError(f"--verify: {line}, is more than {tolerance:g} of them; nothing was written")
    return line


def _tokens(config: Config) -> list[Tensor]:
    """Draw tokens, the ends of the vocabulary among them: some short sequences, and one longer than the window."""
    vocab, window = config.model.vocab_size, config.longest_window
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(vocab, (SEQUENCES, SEQ), generator=generator)
    short[0, 1], short[1, 1] = 0, vocab - 1
    if window is None or window < SEQ - BEYOND:
        return [short]
    return [short, torch.randint(vocab, (1, min(window + BEYOND, MOST_LOGITS // vocab)), generator=generator)]


def _depth(opened: Opened) -> float:
    return max(1.0, opened.config.model.num_layers / 2)


def _rounded_to(written: Opened) -> torch.dtype | None:
    """Say to what the weights were rounded, if they all were."""
    dtypes = {written.tensors[piece.key].dtype for piece in written.pieces if written.weights[piece.native].learns}
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= set(HALF_DTYPES) else None


def logits(
    opened: Opened, batches: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Run a model in float32, with weights rounded to `dtype` first. batches: tokens, each [batch, seq] int64.

    -> of each: [batch, seq, vocab] float32; [batch, seq] bool, whether a token's experts are certain, where it is known
    """
    if opened.format == "hf" and importlib.util.find_spec("transformers"):
        from moescale.verify.transformers import logits_and_margins

        certain = CERTAIN * _depth(opened)
        return [(scores, margins > certain) for scores, margins in logits_and_margins(opened.path, batches, dtype)]
    if opened.format in ("megatron", "deepspeed"):
        run = megatron.logits if opened.format == "megatron" else deepspeed.logits
        return [(run(opened, tokens, dtype), torch.ones_like(tokens, dtype=torch.bool)) for tokens in batches]
    precision = opened.config.precision.model_copy(update={"compute": "float32"})
    model = build_model(opened.config.model_copy(update={"precision": precision}), "cpu")
    tensors = model.state_dict()  # the model's own, to be filled
    for name, values in weights_of(opened):
        values = values.to(dtype) if dtype is not None and opened.weights[name].learns else values
        tensor = tensors[".".join(name.weight)]
        (tensor if name.expert is None else tensor[name.expert]).copy_(values)
    return [_run(model, tokens, CERTAIN * _depth(opened)) for tokens in batches]


def _run(model: LanguageModel, tokens: Tensor, certain: float) -> tuple[Tensor, Tensor]:
    sure = torch.ones_like(tokens, dtype=torch.bool)
    with ExitStack() as ends:
        for router in [module for module in model.modules() if isinstance(module, MixtralRouter)]:

            def record(probs: Tensor, valid: Tensor, top_k: int = router.top_k) -> None:
                if top_k < probs.shape[-1]:
                    best = probs.topk(top_k + 1, -1).values
                    sure.logical_and_(best[..., -2] - best[..., -1] > certain)

            ends.callback(router.observe(record))
        return model.logits(tokens), sure
