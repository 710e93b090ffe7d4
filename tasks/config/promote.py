"""The section `promote`: what a candidate has to pass, and who decides."""

from typing import Literal

from pydantic import ValidationInfo, field_validator

from tasks import sentences
from tasks.config.section import PositiveFloat, Section


class GatesConfig(Section):
    """What a candidate has to pass to become champion: a sentence per measure (`tasks.sentences`), null for no gate."""

    win_rate_vs_champion: str | None = ">= 0.52 (lower bound >= 0.5)"
    """Share of the held-out prompts won against the present champion; the first model's against its SFT model."""
    win_rate_vs_sft: str | None = None
    """Share of the held-out prompts won against the run's SFT model."""
    length_controlled_win_rate_vs_champion: str | None = None
    """The share that would be won if both answers were as long, by the regression of AlpacaEval 2 (`tasks.paired`)."""
    length_controlled_win_rate_vs_sft: str | None = None
    proxy_win_rate_vs_champion: str | None = None
    """The win rate by the reward model that PPO was trained on, whoever judges the others."""
    api_win_rate_vs_champion: str | None = None
    """The win rate by the judge behind an API."""
    win_rate_gap: str | None = None
    """Win rate against the SFT model by the run's reward model, less that by the gold one: what of it is hacking."""
    reward: str | None = None
    """Mean score of the answers by the run's reward model; the baseline sft is that of the SFT model's answers."""
    reward_accuracy: str | None = None
    """Share of held-out pairs that the reward model orders as people did; the baseline length_baseline is the share
    that preferring the longer answer gets right."""
    gold_reward: str | None = None
    """Mean score of the answers by the gold reward model; the baseline sft is that of the SFT model's answers."""
    gold_accuracy: str | None = None
    """As reward_accuracy, of the gold reward model."""
    kl: str | None = None
    """From the SFT model, nats per answer."""
    tokens: str | None = None
    """Mean length of the answers; the baseline sft is that of the SFT model's."""
    eos_rate: str | None = None
    """Share of the answers that end by themselves; the baseline sft is that of the SFT model's."""
    repetition: str | None = None
    """Mean share of an answer's runs of four words that stood in it before; the baseline sft is the SFT model's."""
    text_loss: str | None = None
    """Loss on the held-out unsupervised text, nats per token (the logarithm of the perplexity); the baseline sft is the
    SFT model's."""

    @field_validator("*")
    @classmethod
    def _readable(cls, sentence: str | None, info: ValidationInfo) -> str | None:
        if sentence is not None:
            assert info.field_name is not None
            sentences.parse(info.field_name, sentence)
        return sentence

    @property
    def sentences(self) -> dict[str, str]:
        """Measure -> sentence of the gates that are set."""
        return {name: sentence for name, sentence in self.model_dump().items() if sentence is not None}


class PromoteConfig(Section):
    judge: Literal["gold", "reward"] = "gold"
    """Whose scores decide the win rates of the gates: the gold reward model's, where the run has one that is surely
    better than chance, or the run's own."""
    gates: GatesConfig = GatesConfig()
    approval: Literal["none", "manual"] = "none"
    """manual: a candidate that passes its gates waits until a person approves it in Prefect. The run of a deployment is
    suspended meanwhile; without a deployment the candidate stays registered, for `rlhf promote`."""
    approval_hours: PositiveFloat = 72.0
    """A candidate that nobody decided on for so long is not promoted. Of a deployment, set when it is made."""
    reminder_hours: PositiveFloat = 24.0
    """After so long the notification blocks are told once more that a candidate waits. Of a deployment as well."""
