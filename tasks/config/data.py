"""The section `data`: which rows are read, and how they are dealt among the phases."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tasks.config.section import Positive, PositiveFloat, Section

SIX_SETS = (
    "Dahoas/rm-static",
    "Dahoas/full-hh-rlhf",
    "Dahoas/synthetic-instruct-gptj-pairwise",
    "yitingxie/rlhf-reward-datasets",
    "openai/webgpt_comparisons",
    "stanfordnlp/SHP",
)

UNSUPERVISED = "unsupervised"
"""What the unsupervised text is called among the sources."""


class SourceConfig(Section):
    """One set: preference pairs, conversations for SFT alone, or ranked answers."""

    kind: Literal["pairs", "sft", "ranked"] | None = None
    """What the rows are: prompt, chosen, rejected; or messages; or prompt, responses, scores. None: one of the six
    sets, or local files whose columns tell. Any other set of the hub needs it."""
    path: str | None = None
    """A local JSON, JSONL, CSV or Parquet file (or a folder with train.* and test.*); None: a set of the hub."""
    revision: str | None = None
    """Commit or branch on the hub; None: the newest."""
    licence: str | None = None
    """Of the rows, for the model's card; None: what is known of one of the six sets."""
    weight: PositiveFloat = 1.0
    """Share of the set's groups that is used (up to 1), or the weight of its pairs in the reward models' loss (above
    1); SFT and PPO take their rows alike."""
    max_rows: Positive | None = None
    """Cap on the train rows that are read."""
    min_score_ratio: float = Field(2.0, ge=1)
    """SHP only: pairs whose scores are closer than this are dropped, as its authors advise."""
    max_pairs_per_prompt: Positive | None = None
    """At most so many rows of one prompt, of SHP of one post, trained on or held out: the first ones of this set. None:
    5 of SHP, as its authors advise, and no limit elsewhere. Pairs of one prompt often share answers, which a reward
    model then learns by heart (Ouyang et al. 2022, section 3.5). Pairs of ranked answers weigh less for that already,
    which stays as it is."""

    @model_validator(mode="after")
    def _has_pairs_to_weigh(self) -> "SourceConfig":
        if self.kind == "sft" and self.weight > 1:
            raise ValueError(
                f"weight {self.weight:g} is of pairs in the reward models' loss, and kind sft has none; leave it at 1"
            )
        return self


class DemoData(Section):
    """Preference data that the project generates: six sets in their native columns, with a known true score."""

    pairs: int = Field(9000, ge=200)
    seed: int = 0


class TextConfig(Section):
    """Unsupervised text: what policies forget shows in their perplexities on held-out text, and PPO learns from the
    rest where `ppo.ptx_coef` is above 0."""

    name: str | None = None
    """A set on the hub, for example Salesforce/wikitext."""
    subset: str | None = None
    """The folder of the set's files, where it has several, for example wikitext-2-raw-v1."""
    path: str | None = None
    """A local .txt (a line a row), JSON, JSONL, CSV or Parquet file, or a folder of them, instead."""
    revision: str | None = None
    """Commit or branch on the hub; None: main."""
    column: str = "text"
    train_split: str = "train"
    eval_split: str | None = None
    """None: `data.eval_fraction` of the documents."""
    document_start: str | None = None
    """A row that matches this regular expression begins a document, for WikiText ` = [^=]+ = $`; None: every row is
    one."""
    chunk_tokens: Positive = 256
    """Tokens in a row that is trained on."""

    @field_validator("document_start")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _one_place(self) -> "TextConfig":
        if (self.name is None) == (self.path is None):
            raise ValueError("needs either a name (of a set on the hub) or a path (of local text)")
        return self


class DataConfig(Section):
    hub: str | None = None
    """Folder in hub layout that is read instead of the Hugging Face hub."""
    demo: DemoData | None = None
    """Generate the six sets instead of reading them."""
    sources: dict[str, SourceConfig] = Field(default_factory=lambda: {name: SourceConfig() for name in SIX_SETS})
    """Hub name of a set (or any label, with `path`) -> how it is read."""
    unsupervised: TextConfig | None = None
    phases: tuple[PositiveFloat, ...] = (2, 4, 3, 1)
    """Shares of SFT : reward model : PPO : judge, a second reward model that PPO never sees; [2, 4, 4]: no judge."""
    eval_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of the groups that is held out, where a set has no test split of its own; a group that an earlier run of
    the workspace has split stays on its side."""
    max_prompt_tokens: Positive = 256
    max_answer_tokens: Positive = 256
    max_chars: Positive = 20_000
    """Rows with more characters are dropped before they are tokenised."""
    cluster: str | None = None
    """Dask scheduler (tcp://host:port) on whose workers the sets are downloaded, cleaned and searched for duplicates;
    they share the workspace folder and reach the Prefect server. null: this machine. The rows are the same."""

    @field_validator("cluster")
    @classmethod
    def _scheduler(cls, cluster: str | None) -> str | None:
        if cluster is not None and not re.fullmatch(r"(tcp|tls)://[^\s:/]+:\d+", cluster):
            raise ValueError(f"{cluster} is no address of a Dask scheduler, such as tcp://10.0.0.5:8786")
        return cluster

    @field_validator("phases")
    @classmethod
    def _three_or_four_phases(cls, phases: tuple[float, ...]) -> tuple[float, ...]:
        if len(phases) not in (3, 4):
            raise ValueError(
                "needs the shares of SFT : reward model : PPO and perhaps the judge, for example [2, 4, 3, 1] or "
                f"[2, 4, 4]; got {len(phases)}"
            )
        return phases

    @field_validator("sources")
    @classmethod
    def _some_source(cls, sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        if not sources:
            raise ValueError("names no source; leave it out for the six sets")
        if UNSUPERVISED in sources:
            raise ValueError(f"{UNSUPERVISED} is no name for a source; text without answers goes to data.unsupervised")
        return sources

    @model_validator(mode="after")
    def _one_origin(self) -> "DataConfig":
        if self.hub is not None and self.demo is not None:
            raise ValueError("hub and demo are both set; remove one of them")
        return self
