"""The section `evaluate`: whose answers are drawn and who judges them."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tasks.config.ppo import SamplingConfig
from tasks.config.section import Positive, PositiveFloat, Section

VARIABLE = "^[A-Z_][A-Z0-9_]*$"
ADDRESS = "^[^?#]*$"


class ApiJudgeConfig(Section):
    """A judge behind an OpenAI-compatible API, asked for each pair of answers twice (`tasks.api_judge`)."""

    # The patterns are for Prefect's form, so that it keeps no key that is pasted there.
    base_url: str = Field("https://api.openai.com/v1", json_schema_extra={"pattern": ADDRESS})
    model: str
    key_variable: str | None = Field("OPENAI_API_KEY", json_schema_extra={"pattern": VARIABLE})
    """The environment variable that holds the key, which is kept nowhere else; null: the server wants none."""
    prompts: Positive = 100
    """At most so many prompts of a comparison are judged, by two calls each."""
    ema: bool = False
    """Ask about the moving average of the weights against PPO's last ones as well, with caps of its own."""
    max_calls: Positive = 500
    """A comparison is judged by at most so many requests, retries included."""
    max_cost: PositiveFloat | None = None
    """A comparison's judging ends when it has cost so much, in the unit of `prices`; null: only calls count."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Of a million tokens that the judge reads, and of a million that it writes."""
    calls_per_minute: PositiveFloat = 60
    retries: int = Field(5, ge=0)
    """After an error of the server or of the connection, and where it asks to wait; each waits longer."""
    timeout_seconds: PositiveFloat = 60
    max_reply_tokens: Positive = 512

    @field_validator("key_variable", mode="before")
    @classmethod
    def _names_a_variable(cls, name: Any) -> Any:
        if name is not None and not (isinstance(name, str) and re.fullmatch(VARIABLE, name)):
            raise ValueError("name the environment variable that holds the key, in capitals; not the key itself")
        return name

    @field_validator("base_url")
    @classmethod
    def _holds_no_key(cls, url: str) -> str:
        if re.search(r"//[^/]*@", url):
            raise ValueError("leave out the password; give it by the environment variable that key_variable names")
        if not re.fullmatch(ADDRESS, url):
            raise ValueError("leave out what follows ? or #; a key is given by the variable that key_variable names")
        return url

    @model_validator(mode="after")
    def _costs_are_known(self) -> "ApiJudgeConfig":
        if self.max_cost is not None and not any(self.prices):
            raise ValueError("max_cost needs prices, of a million tokens read and written; set them as well")
        return self


class EvaluateConfig(Section):
    prompts: Positive = 200
    """Held-out prompts that SFT and PPO answer."""
    batch_size: Positive = 32
    sampling: SamplingConfig = SamplingConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    text_chunks: Positive = 64
    """At most so many chunks of held-out unsupervised text, where the run has some, are read for perplexities."""
    api_judge: ApiJudgeConfig | None = None
    """Ask a judge behind an API as well; null: none."""
    samples: Positive = 8
    """Answers shown side by side in the report."""
