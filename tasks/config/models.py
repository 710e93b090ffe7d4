"""The section `models`: what training starts from."""

from pydantic import Field, model_validator

from tasks.config.section import Positive, Section


class TinyModel(Section):
    """A small Llama-shaped model with random weights and a tokenizer trained on the run's own text."""

    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    vocab_size: int = Field(512, ge=300)
    positions: Positive = 1024

    @model_validator(mode="after")
    def _heads_divide(self) -> "TinyModel":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of 2 x heads ({2 * self.heads})")
        return self


class ModelsConfig(Section):
    policy: str | TinyModel = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """The base of the policy: a Hugging Face folder, a hub name, a registered model such as
    models:/chat-policy@champion, or the shape of a tiny model to start from scratch."""
    policy_revision: str | None = None
    policy_trust_remote_code: bool = False
    """Code that this model brings may run, also where what it becomes is loaded; else the model is refused or, where
    transformers knows its architecture, the code left alone."""
    reward: str | None = None
    """The base of reward model and critic, named likewise; None: the SFT model. Its tokenizer must be the policy's; a
    reward model keeps its head."""
    reward_revision: str | None = None
    reward_trust_remote_code: bool = False
    """The same of `reward`."""
