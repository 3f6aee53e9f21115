"""The run as small frozen models, one per folder of the package.

A run is one YAML file of groups (`run`, `data`, `model`, `moe`, ...), at most one `base:` line that names another
such file, and overrides `group.key=value`. Whatever cannot work is refused here, in one line, before any process
group starts.
"""

from moescale.config.describe import describe, differing_keys, written
from moescale.config.groups import (
    CheckpointConfig,
    DataConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    SpikesConfig,
)
from moescale.config.layout import sequence_pieces
from moescale.config.read import load_config, parse_config, read_overrides
from moescale.config.run import Config
from moescale.errors import (
    ConfigError,
    DamagedError,
    LostRanksError,
    NotFiniteError,
    Silenced,
    Stopped,
    TrainingError,
    any_of,
    check_local,
    is_of_lost_ranks,
    memory_asked,
)
from moescale.spec.model import LayerConfig, ModelConfig
from moescale.spec.moe import MoEConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DamagedError",
    "DataConfig",
    "LayerConfig",
    "LostRanksError",
    "MoEConfig",
    "ModelConfig",
    "MonitorConfig",
    "NotFiniteError",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "Silenced",
    "SpikesConfig",
    "Stopped",
    "TrainingError",
    "any_of",
    "check_local",
    "describe",
    "differing_keys",
    "is_of_lost_ranks",
    "load_config",
    "memory_asked",
    "parse_config",
    "read_overrides",
    "sequence_pieces",
    "written",
]
