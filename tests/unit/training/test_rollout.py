import torch
from torch.testing import assert_close

from tasks.training.batches import left_padded
from tasks.training.models import Policy
from tasks.training.rollout import generate

EOS, PAD, CPU = 1, 0, torch.device("cpu")
PROMPTS = [[5, 9, 14], [7], [20, 21, 22, 23, 24, 25]]


def rollout(llama, prompts=PROMPTS, seed=None, temperature=1.0, tokens=12):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return generate(llama, left_padded(prompts, PAD, CPU), tokens, EOS, PAD, temperature, generator)


def answers(made):
    ids = made.sequences.input_ids[:, -made.answer_mask.shape[1] :]
    return [row[mask].tolist() for row, mask in zip(ids, made.answer_mask, strict=True)]


def test_greedy_answers_are_those_of_transformers_one_by_one(llama):
    for prompt, answer in zip(PROMPTS, answers(rollout(llama)), strict=True):
        whole = llama.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=PAD)
        assert answer == whole[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_the_training_forward_pass(llama):
    made = rollout(llama, seed=1, temperature=0.7)
    start = made.sequences.input_ids.shape[1] - made.answer_mask.shape[1]
    with torch.no_grad():
        again = Policy(llama)(made.sequences, start, 0.7).logprobs
    assert_close(made.logprobs[made.answer_mask], again[made.answer_mask], atol=1e-5, rtol=1e-5)
    assert (made.logprobs[~made.answer_mask] == 0).all()


def test_first_token_is_sampled_as_often_as_its_probability_says(llama):
    count = 4000
    made = rollout(llama, [PROMPTS[0]] * count, seed=7, temperature=1.5, tokens=1)
    with torch.no_grad():
        expected = torch.softmax(llama(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 1.5, -1)
    found = torch.bincount(made.sequences.input_ids[:, -1], minlength=50) / count
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4.5 * spread + 1e-3).all()


def test_eos_is_kept_as_the_last_token_and_nothing_follows(llama):
    made = rollout(llama, PROMPTS * 20, seed=2, tokens=40)
    assert made.ended.any()
    for answer, ended in zip(answers(made), made.ended.tolist(), strict=True):
        assert (answer[-1] == EOS) == ended
        assert EOS not in answer[:-1]
    ids = made.sequences.input_ids[:, -made.answer_mask.shape[1] :]
    assert (ids[~made.answer_mask] == PAD).all()


def test_the_same_generator_gives_the_same_answers(llama):
    assert answers(rollout(llama, seed=4)) == answers(rollout(llama, seed=4)) != answers(rollout(llama, seed=5))
