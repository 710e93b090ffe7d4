"""Code that a model folder brings, and that leaves a trace where it runs."""

import json
from pathlib import Path

CODE = """
from pathlib import Path
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, LlamaPreTrainedModel
from transformers import PreTrainedTokenizerFast
Path({marker!r}).open("a").write("ran")
class MineConfig(LlamaConfig):
    model_type = {kind!r}
class MineForCausalLM(LlamaForCausalLM):
    config_class = {config}
class MineForSequenceClassification(LlamaForSequenceClassification):
    config_class = {config}
    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # Llama's own would ask transformers for a model of this config
        self.num_labels, self.model = config.num_labels, LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAP = {
    "AutoModelForCausalLM": "mine.MineForCausalLM",
    "AutoModelForSequenceClassification": "mine.MineForSequenceClassification",
}


def bring_code(folder: Path, kind: str, marker: Path, tokenizer_too: bool = False) -> Path:
    """Have a Llama's folder bring classes of its own, as model type `kind`; returns the file that they write to."""
    known = kind == "llama"
    config = "LlamaConfig" if known else "MineConfig"
    (folder / "mine.py").write_text(CODE.format(marker=str(marker), kind=kind, config=config))
    own = {} if known else {"AutoConfig": "mine.MineConfig"}
    changes = {"config.json": {"model_type": kind, "auto_map": MAP | own}}
    if tokenizer_too:
        tokenizer = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}}
        changes["tokenizer_config.json"] = tokenizer
    for name, change in changes.items():
        settings = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps(settings))
    return marker
