import pytest
import torch
from transformers import LlamaForCausalLM

from tests.tiny import tiny_llama


@pytest.fixture(scope="package")
def llama() -> LlamaForCausalLM:
    """A random Llama whose next tokens are not all alike."""
    torch.manual_seed(3)
    config = tiny_llama(
        50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()
