"""Answers to many prompts: transformers' own, whichever loop draws them and however they are cut into batches."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.training import sampling
from tasks.training.sampling import Drawing

EOS, PAD, CPU = 1, 0, torch.device("cpu")
PROMPTS = [[5, 9, 14], [7], [20, 21, 22, 23, 24, 25], *([n, n + 1] for n in range(30, 40))]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Its greedy answers have many lengths."""
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, initializer_range=0.3, pad_token_id=PAD)).eval()
    with torch.no_grad():
        made.lm_head.weight[EOS] *= 2
    return made


def drawn(model: LlamaForCausalLM, batch_size: int, **how: object) -> list[list[int]]:
    found: list[list[int]] = []
    given = {"limit": 12, "temperature": 1.0, "eos": EOS, "pad": PAD, "seed": 4, **how}
    for rollout in sampling.answers(model, PROMPTS, Drawing(**given), batch_size, CPU):
        rows = rollout.answers()
        assert max(map(len, rows)) == rollout.answer_mask.shape[1], "no column is padding alone"
        assert rollout.ended.tolist() == [row[-1] == EOS for row in rows]
        found += rows
    return found


@pytest.mark.parametrize("batch_size", [2, 5, 13])
def test_greedy_answers_are_those_of_transformers_one_by_one(model: LlamaForCausalLM, batch_size: int) -> None:
    answers = drawn(model, batch_size, temperature=0.0)
    assert len({len(answer) for answer in answers}) > 2
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
        assert answer == model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("how", [{}, {"top_k": 5}])
def test_an_answer_is_a_function_of_the_seed_and_its_place(model: LlamaForCausalLM, how: dict[str, int]) -> None:
    assert drawn(model, 5, **how) == drawn(model, 5, **how)
    assert drawn(model, 5, **how) != drawn(model, 5, seed=5, **how)


def test_slots_draw_where_prompts_fill_more_than_a_batch(model: LlamaForCausalLM) -> None:
    how = Drawing(12, 1.0, EOS, PAD, 0)
    assert sampling._slots(model, PROMPTS, how, 5, CPU) is not None
    assert sampling._slots(model, PROMPTS, how, 13, CPU) is None
    assert sampling._slots(model, PROMPTS, Drawing(12, 1.0, EOS, PAD, 0, top_k=5), 5, CPU) is None


def test_rows_of_a_rollout_keep_their_numbers(model: LlamaForCausalLM) -> None:
    how = Drawing(12, 1.0, EOS, PAD, 2)
    (whole,) = sampling.answers(model, PROMPTS, how, 13, CPU)
    part = sampling.cut(whole, 1, 2)
    assert part.sequences.input_ids[0, 0] == 7, "the prompt of one token has no padding left"
    length = int(whole.answer_mask[1].sum())
    assert torch.equal(part.logprobs[0], whole.logprobs[1, :length])
    assert part.sequences.position_ids[0].tolist() == list(range(length + 1))
