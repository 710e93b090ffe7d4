"""The whole tree."""

import re
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tasks import sentences
from tasks.config.data import DataConfig
from tasks.config.evaluate import EvaluateConfig
from tasks.config.models import ModelsConfig, TinyModel
from tasks.config.ppo import PPOConfig
from tasks.config.promote import PromoteConfig
from tasks.config.section import Section
from tasks.config.supervised import RewardConfig, SFTConfig


class RunConfig(Section):
    """One run: data in, a registered model out."""

    name: str = "chat"
    """Models are registered as NAME-policy and NAME-reward."""
    workspace: str = "workspace"
    """Folder of the stage directories and of the default MLflow store."""
    remote: str | None = None
    """Address of fsspec, such as s3://bucket/runs, that finished stages are copied to, and come from where this machine
    lacks them; null: none. Logins come from the environment."""
    seed: int = Field(0, ge=0)
    infrastructure: str = "local-cpu"
    """GpuInfrastructure block that training and evaluation run on."""
    data: DataConfig = DataConfig()
    models: ModelsConfig = ModelsConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    gold: RewardConfig = RewardConfig()
    """The gold reward model, trained on the judge's share of `data.phases`: PPO never sees it, evaluation does. What is
    not set here is as in `reward`."""
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
            raise ValueError("use lower case letters, digits, - and _ (at most 63, no leading - or _)")
        return name

    @field_validator("workspace")
    @classmethod
    def _a_folder(cls, workspace: str) -> str:
        if "://" in workspace:
            raise ValueError(
                f"{workspace} is an address; name a folder, since stages need the locks of a filesystem, and the "
                "address as remote: finished stages are copied there"
            )
        return workspace

    @field_validator("remote")
    @classmethod
    def _an_address(cls, remote: str | None) -> str | None:
        if remote is not None and "://" not in remote:
            raise ValueError("name an address, such as s3://bucket/runs or file:///mnt/runs")
        if remote is not None and "@" in urlsplit(remote).netloc:
            raise ValueError("the address holds a login; give that by the environment, as the store's package reads it")
        return remote

    @model_validator(mode="before")
    @classmethod
    def _gold_is_trained_as_the_reward_model(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("gold", {}), dict):
            return tree
        reward = tree.get("reward", {})
        reward = reward.model_dump() if isinstance(reward, RewardConfig) else reward
        return {**tree, "gold": _laid_over(reward, tree.get("gold", {}))}

    @property
    def has_gold(self) -> bool:
        """Whether a gold reward model is trained: there are pairs for it."""
        return len(self.data.phases) == 4

    @model_validator(mode="after")
    def _gates_measure_what_there_is(self) -> "RunConfig":
        missing = {
            "gold": None if self.has_gold else "a gold reward model; give data.phases a fourth share, for the judge",
            "api": None if self.evaluate.api_judge is not None else "evaluate.api_judge, a judge behind an API; set it",
            "text": None if self.data.unsupervised is not None else "unsupervised text; name some as data.unsupervised",
        }
        for name in self.promote.gates.sentences:
            if (need := sentences.MEASURES[name].needs) and missing[need]:
                raise ValueError(f"promote.gates.{name} needs {missing[need]}, or remove the gate")
        return self

    @model_validator(mode="after")
    def _positions_hold_the_text(self) -> "RunConfig":
        longest = self.data.max_prompt_tokens + self.data.max_answer_tokens
        if isinstance(self.models.policy, TinyModel) and self.models.policy.positions < longest:
            raise ValueError(
                f"models.policy.positions is {self.models.policy.positions}, but data.max_prompt_tokens + "
                f"data.max_answer_tokens is {longest}; raise the one or lower the others"
            )
        text = self.data.unsupervised
        if isinstance(self.models.policy, TinyModel) and text and self.models.policy.positions < text.chunk_tokens:
            raise ValueError(
                f"models.policy.positions is {self.models.policy.positions}, but data.unsupervised.chunk_tokens is "
                f"{text.chunk_tokens}; raise the one or lower the other"
            )
        return self


def _laid_over(below: Any, above: Any) -> Any:
    """A tree of values with those of another in their places."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _laid_over(below.get(key), value) for key, value in above.items()}
