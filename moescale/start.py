"""What all ranks do before a run is built: meet, agree, and see that what the configuration asks for is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from moescale.cluster.agreement import Agreement
from moescale.cluster.surroundings import Needs
from moescale.config import Config, ConfigError
from moescale.data.token_file import TokenCorpus, prepare_tokens
from moescale.data.tokenizer import Tokenizer, check_vocabulary, configured_tokenizer
from moescale.engine.base import check_engine
from moescale.optim.base import bytes_of_moments
from moescale.planner.count import count_parameters

MISTAKE_SECONDS = 10.0  # that a rank waits for the others before it says alone what is wrong


def meet(load: Callable[[], Config], ranks: Agreement) -> Config:
    """Settle the configuration for the ranks that were started, and find them. Raises ConfigError."""
    try:
        config = load().for_world(ranks.launch.size, ranks.launch.node_ranks)
    except ConfigError as error:
        problem = error
    else:
        ranks.meet(config.run.timeout_seconds)
        return ranks.together(lambda: config)

    def fail() -> Config:
        raise problem

    try:
        ranks.meet(MISTAKE_SECONDS)
    except ConfigError:
        fail()
    return ranks.together(fail)


def prepare(config: Config) -> tuple[Tokenizer, TokenCorpus]:
    """Read what the run needs of files that may be gone later."""
    tokenizer = configured_tokenizer(config.data)
    check_vocabulary(tokenizer, config.model.vocab_size)
    return tokenizer, prepare_tokens(config.data)


def check_packages(config: Config) -> None:
    """Refuse a run whose engine cannot do it, or that asks for packages that are not there. Raises ConfigError."""
    check_engine(config)
    monitor = config.monitor
    for key, asked, off, package, extra in (("wandb", monitor.wandb != "off", "off", "wandb", "wandb"),
                                            ("trace", monitor.trace is not None, "null", "pyarrow", "trace")):
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(f"monitor.{key} needs the package {package}: pip install -e '.[{extra}]' in "
                              f"MoEScale's folder, or write monitor.{key}={off}")


def needs_of(config: Config, num_ranks: int) -> Needs:
    """Compute what a run takes of memory and disk, at least. config: settled"""
    weights = count_parameters(config).total
    checkpoint = 4 * weights + bytes_of_moments(config)
    state = checkpoint + 4 * weights  # the gradients
    # each copy of the model is cut among its ranks
    kept = config.checkpoint
    return Needs(state * config.parallel.dp_replicate // num_ranks, checkpoint, kept.keep + 1,
                 None if kept.in_memory is None else kept.memory_dir)
