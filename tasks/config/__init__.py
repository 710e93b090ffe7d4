"""RunConfig: everything that a run can be told, typed, frozen, with every default in one place, a file per section.

`load` reads a YAML file, applies `path=value` overrides and returns a validated RunConfig. A mistake is a
ConfigError with one line per fault: where, what was given, what would be right. This package imports neither torch
nor Prefect, so that `rlhf --help`, the forms of a deployment and the tests of a config stay fast.
"""

from tasks.config.data import SIX_SETS, UNSUPERVISED, SourceConfig
from tasks.config.engine import EngineConfig, LoraConfig, OptimizerConfig
from tasks.config.evaluate import ApiJudgeConfig, EvaluateConfig
from tasks.config.models import TinyModel
from tasks.config.ppo import LimitsConfig, PPOConfig
from tasks.config.promote import GatesConfig, PromoteConfig
from tasks.config.reading import load, overlaid, parse
from tasks.config.run import RunConfig
from tasks.config.section import SECRET, ConfigError
from tasks.config.supervised import RewardConfig, SFTConfig, TrainConfig

__all__ = [
    "SECRET",
    "SIX_SETS",
    "UNSUPERVISED",
    "ApiJudgeConfig",
    "ConfigError",
    "EngineConfig",
    "EvaluateConfig",
    "GatesConfig",
    "LimitsConfig",
    "LoraConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PromoteConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "SourceConfig",
    "TinyModel",
    "TrainConfig",
    "load",
    "overlaid",
    "parse",
]
