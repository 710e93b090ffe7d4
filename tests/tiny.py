"""The smallest Llama that answers something: a config that several tests make their models from."""

from typing import Any

from transformers import LlamaConfig


def tiny_llama(vocab_size: int, **changes: Any) -> LlamaConfig:
    """A config of one layer and 16 channels; `changes` are fields of LlamaConfig."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(**{"vocab_size": vocab_size, **shape, **changes})


def tiny_llama_for(tokenizer: Any, **changes: Any) -> LlamaConfig:
    """The same with the vocabulary, pad and EOS tokens of a tokenizer."""
    own = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return tiny_llama(len(tokenizer), **{**own, **changes})
