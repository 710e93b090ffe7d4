"""PPO's loop on plain torch: gradients against sums over single sequences, PTX, EMA, pools, controllers, limits."""

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tasks.config import LimitsConfig, PPOConfig
from tasks.training import checkpoint, ppo
from tasks.training.advantages import Moments
from tasks.training.batches import left_padded, right_padded
from tasks.training.ema import Ema
from tasks.training.experience import (
    Networks,
    answers_start,
    distinct_2,
    experience_of,
    experience_rows,
    pooled,
    score,
)
from tasks.training.job import Job
from tasks.training.kl import adapted_kl_coef
from tasks.training.models import Policy, ScalarModel
from tasks.training.rollout import generate
from tasks.training.types import Experience, StepReport
from tests.tiny import tiny_llama

EOS, PAD, CPU = 1, 0, torch.device("cpu")
PROMPTS = [[5, 9, 14], [7], [20, 21, 22, 23, 24, 25], [30, 31]]
SMALL = {"rollout_batch_size": 4, "batch_size": 4, "micro_batch_size": 3, "kl_coef": 0.1}


class PlainEngine:
    """The Engine protocol on plain torch, in one process; keeps the gradients of its last step."""

    def __init__(self, module: torch.nn.Module, learning_rate: float = 0.0) -> None:
        self.module, self.device = module, CPU
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.0)
        self.gradients: dict[str, torch.Tensor] = {}
        self.steps = 0

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def optimizer_step(self, micro_batches, loss_of, denominator):
        self.optimizer.zero_grad()
        for batch in micro_batches:
            (loss_of(batch) / denominator).backward()
        self.gradients = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.steps += 1
        return StepReport(0.0, 0.0)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.module.state_dict(), folder / "weights.pt")

    def load(self, folder: Path) -> None:
        self.module.load_state_dict(torch.load(folder / "weights.pt"))


def networks(learning_rate: float = 0.0) -> Networks:
    torch.manual_seed(0)
    config = tiny_llama(50, initializer_range=0.3, pad_token_id=PAD, eos_token_id=EOS, num_labels=1)
    config.rlhf_score_mean = 0.25
    policy = Policy(LlamaForCausalLM(config))
    reward = ScalarModel(LlamaForSequenceClassification(config))
    return Networks(
        policy=PlainEngine(policy, learning_rate),
        critic=PlainEngine(copy.deepcopy(reward), learning_rate),
        reference=copy.deepcopy(policy).eval(),
        reward_model=reward.eval(),
        eos=EOS,
        pad=PAD,
    )


def rollout(nets: Networks, prompts=PROMPTS, seed: int = 3, tokens: int = 6):
    generator = torch.Generator().manual_seed(seed)
    return generate(nets.policy.module.model, left_padded(prompts, PAD, CPU), tokens, EOS, PAD, 1.0, generator)


def experience(nets: Networks, config: PPOConfig, **options) -> tuple[Experience, dict[str, float]]:
    return experience_of(config, score(config, nets, rollout(nets, **options)), config.kl_coef, None)


def job(tmp_path: Path) -> Job:
    config = {"seed": 1, "max_answer_tokens": 6}
    return Job("ppo", tmp_path, config, {}, CPU, lambda *_: None, lambda *_: None, lambda: False)


def single(whole: Experience, row: int) -> tuple[list[int], int, int]:
    """A sequence without padding, where its answer begins, and its length."""
    mask = whole.sequences.attention_mask[row]
    ids = whole.sequences.input_ids[row][mask].tolist()
    return ids, len(ids) - int(whole.answer_mask[row].sum()), len(ids)


@pytest.mark.parametrize("epochs", [1, 2], ids=["one step, one pass of the policy", "old log-probabilities before"])
def test_in_the_first_pass_the_ratio_is_one_and_nothing_is_clipped(tmp_path, epochs):
    config = PPOConfig(**SMALL, epochs=epochs)
    nets = networks()
    made, metrics = experience(nets, config)
    found = ppo.update(job(tmp_path), config, nets, None, ppo.Data([], None), ppo.State(0.1), made, 0)
    assert found["ppo/ratio"] == pytest.approx(1, abs=1e-6)
    assert found["ppo/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert found["ppo/clip_fraction"] == found["ppo/value_clip_fraction"] == found["ppo/exploded"] == 0
    assert metrics["ppo/kl"] == pytest.approx(0, abs=1e-5)
    assert (found if config.one_step else metrics)["rollout/logprob_gap"] < 1e-5
    assert (found if config.one_step else metrics)["ppo/entropy"] > 0


def test_a_critic_begins_by_the_zero_of_its_reward_model():
    """Where all answers are worth the same and the critic knows it, no token has an advantage, the last included."""
    nets = networks()
    for model in (nets.critic.module, nets.reward_model):
        torch.nn.init.zeros_(model.model.score.weight)
    config = PPOConfig(**SMALL | {"kl_coef": 0.0}, gae_lambda=0.95, whiten_advantages=False, missing_eos_penalty=0.0)
    made, metrics = experience(nets, config)
    assert metrics["ppo/reward"] == -0.25
    assert torch.equal(made.values, torch.where(made.answer_mask, -0.25, 0.0))
    torch.testing.assert_close(made.advantages, torch.zeros_like(made.advantages))


def test_gradients_are_those_of_the_sequences_one_by_one():
    """Clipped losses as one token mean over the optimizer batch, whatever the padding and the micro-batches."""
    config = PPOConfig(**SMALL, epochs=2)
    nets = networks()
    made, _ = experience(nets, config)
    made = made._replace(logprobs=made.logprobs + 0.3 * torch.randn(made.logprobs.shape), values=made.values + 0.3)
    policy, critic = copy.deepcopy(nets.policy.module), copy.deepcopy(nets.critic.module)
    tokens, policy_total, value_total = int(made.answer_mask.sum()), 0.0, 0.0
    for row in range(4):
        ids, begin, end = single(made, row)
        count = end - begin
        logits = policy.model(torch.tensor([ids])).logits[0]
        new = torch.log_softmax(logits[begin - 1 : end - 1], -1).gather(1, torch.tensor(ids[begin:])[:, None])[:, 0]
        ratio, advantage = (new - made.logprobs[row, :count]).exp(), made.advantages[row, :count]
        policy_total = policy_total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        hidden = critic.model.model(torch.tensor([ids])).last_hidden_state[0, begin - 1 : end - 1]
        value, old = critic.model.score(hidden)[:, 0] - 0.25, made.values[row, :count]
        errors = (
            (value - made.returns[row, :count]) ** 2,
            (old + (value - old).clamp(-0.2, 0.2) - made.returns[row, :count]) ** 2,
        )
        value_total = value_total + 0.5 * torch.maximum(*errors).sum()
    (policy_total / tokens).backward()
    (value_total / tokens).backward()
    batches = [experience_rows(made, rows) for rows in torch.arange(4).split(3)]
    ppo.optimizer_steps(config, nets, batches, [])
    for engine, reference in ((nets.policy, policy), (nets.critic, critic)):
        for name, parameter in reference.named_parameters():
            assert_close(engine.gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_ptx_adds_the_mean_loss_of_transformers_in_the_same_step():
    config = PPOConfig(**SMALL, ptx_coef=0.7)
    nets = networks()
    made, _ = experience(nets, config)
    made = made._replace(advantages=torch.zeros_like(made.advantages))
    text = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16, 17]]
    reference = copy.deepcopy(nets.policy.module.model)
    loss = reference(torch.tensor(text), labels=torch.tensor(text)).loss
    (0.7 * loss).backward()
    found = ppo.optimizer_steps(
        config, nets, [made], [right_padded(text[:2], PAD, CPU), right_padded(text[2:], PAD, CPU)]
    )
    assert found["ppo/ptx_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert nets.policy.steps == 1
    for name, parameter in reference.named_parameters():
        assert_close(nets.policy.gradients[f"model.{name}"], parameter.grad, atol=1e-5, rtol=1e-4)


def test_the_score_is_lowered_for_a_missing_eos_and_for_each_token():
    config = PPOConfig(**SMALL | {"kl_coef": 0.0}, gae_lambda=1.0, missing_eos_penalty=3.0, length_penalty=0.25)
    nets = networks()
    scored = score(config, nets, rollout(nets, tokens=40))
    made, metrics = experience_of(config, scored, config.kl_coef, None)
    tokens, ended = made.answer_mask.sum(1), scored.rollout.ended
    assert len(set(tokens.tolist())) > 1
    assert ended.tolist().count(False) in range(1, len(ended))
    for row, length in enumerate(tokens.tolist()):
        paid = float(scored.scores[row]) - (0.0 if ended[row] else 3.0) - 0.25 * length
        assert_close(made.returns[row, :length], torch.full((length,), paid), atol=1e-5, rtol=1e-5)
    assert metrics["ppo/reward"] == pytest.approx(float(scored.scores.mean()))  # as the reward model gave it
    assert metrics["ppo/objective"] == pytest.approx(float(made.returns[:, 0].mean()), abs=1e-5)  # what PPO maximises


def test_a_pool_keeps_every_sequence_and_its_rows_are_cut_back():
    config = PPOConfig(**SMALL)
    nets = networks()
    parts = [experience(nets, config, prompts=PROMPTS[2:3], seed=5)[0], experience(nets, config, tokens=4)[0]]
    whole = pooled(parts)
    assert len(whole.answer_mask) == 5
    expected = [single(parts[0], 0), *(single(parts[1], row) for row in range(4))]
    for row, one in enumerate(expected):
        assert single(whole, row) == one
        alone = experience_rows(whole, torch.tensor([row]))
        assert alone.sequences.input_ids[0].tolist() == one[0]
        assert answers_start(alone.answer_mask, alone.sequences) == one[1]
        assert alone.sequences.position_ids[0].tolist() == list(range(one[2]))
    assert_close(experience_rows(whole, torch.tensor([0])).returns[0], parts[0].returns[0])


def test_passes_end_early_when_the_policy_has_moved_too_far(tmp_path):
    config = PPOConfig(**SMALL | {"batch_size": 1, "epochs": 3}, max_approx_kl=1e-4)
    nets = networks(learning_rate=0.05)
    made, _ = experience(nets, config)
    found = ppo.update(job(tmp_path), config, nets, None, ppo.Data([], None), ppo.State(0.1), made, 0)
    assert found["ppo/stopped_early"] == 1
    assert nets.policy.steps == nets.critic.steps < 12


def test_a_micro_batch_whose_ratio_explodes_gives_the_policy_no_gradient():
    config = PPOConfig(**SMALL, epochs=2, max_ratio=5.0)
    nets = networks()
    made, _ = experience(nets, config)
    far = made._replace(logprobs=made.logprobs - 40.0, advantages=-made.advantages.abs() - 1)
    found = ppo.optimizer_steps(config, nets, [far], [])
    assert found["ppo/exploded"] == 1
    assert all((gradient == 0).all() for gradient in nets.policy.gradients.values())
    assert any((gradient != 0).any() for gradient in nets.critic.gradients.values())


def test_the_adaptive_weight_follows_the_kl():
    assert adapted_kl_coef(0.1, 6.0, 6.0, 256, 10_000) == 0.1
    assert adapted_kl_coef(0.1, 60.0, 6.0, 256, 10_000) == pytest.approx(0.1 * (1 + 0.2 * 0.0256))
    assert adapted_kl_coef(0.1, 5.4, 6.0, 256, 10_000) == pytest.approx(0.1 * (1 - 0.1 * 0.0256))
    assert adapted_kl_coef(0.1, -3.0, 6.0, 256, 10_000) == pytest.approx(0.1 * (1 - 0.2 * 0.0256))


def test_running_moments_are_those_of_all_scores():
    scores = torch.randn(90, dtype=torch.float64) * 3 + 7
    moments = Moments()
    assert moments.std == 1
    for part in scores.split((1, 40, 49)):
        moments = moments.with_scores(part)
    assert moments.number == 90
    assert moments.mean == pytest.approx(float(scores.mean()))
    assert moments.std == pytest.approx(float(scores.std()))


def test_the_moving_average_is_the_recursion_and_comes_back_from_a_checkpoint():
    module = torch.nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    expected = module.weight.detach().double().clone()
    for _ in range(5):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        ema.update()
        expected = 0.9 * expected + 0.1 * module.weight.detach().double()
    assert_close(ema.weights()["weight"].double(), expected, atol=1e-6, rtol=0)
    again = Ema(module, 0.9)
    again.load(ema.state())
    assert torch.equal(again.weights()["weight"], ema.weights()["weight"])


def test_distinct_2_counts_repeated_pairs():
    nets = networks()
    made = rollout(nets, tokens=5)
    ids = made.sequences.input_ids.clone()
    ids[0, -5:] = torch.tensor([4, 4, 4, 4, 9])
    mask = made.answer_mask.clone()
    mask[0], mask[1] = True, torch.tensor([True, False, False, False, False])
    changed = made._replace(sequences=made.sequences._replace(input_ids=ids), answer_mask=mask)
    assert distinct_2(changed)[:2].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"kl": 10.0}, "KL 12.0 is above ppo.limits.kl 10"),
        ({"eos_rate": 0.5}, "EOS rate 0.40 is below ppo.limits.eos_rate 0.5"),
        ({"distinct_2": 0.3}, "distinct-2 0.20 is below ppo.limits.distinct_2 0.3"),
        ({"kl": 12.5, "eos_rate": 0.3, "distinct_2": 0.1}, None),
        ({}, None),
    ],
)
def test_limits(limits, sentence):
    history = [{"kl": 0.0, "eos_rate": 1.0, "distinct_2": 1.0}] + [
        {"kl": kl, "eos_rate": 0.4, "distinct_2": 0.2} for kl in (11.0, 13.0)
    ]
    assert ppo.beyond(LimitsConfig(**limits, rollouts=2), history) == sentence
    assert ppo.beyond(LimitsConfig(**limits, rollouts=4), history) is None


def test_a_collapsed_run_goes_back_to_its_last_checkpoint(tmp_path):
    nets = networks()
    trained = {"policy": nets.policy, "critic": nets.critic}
    ema = Ema(nets.policy.module, 0.5)
    with pytest.raises(ValueError, match="PPO collapsed before its first checkpoint: KL 40"):
        ppo.restore(job(tmp_path), trained, ema, "KL 40")
    healthy = ppo.State(0.1, history=[{"kl": 1.0}])
    before = {name: engine.module.state_dict() for name, engine in copy.deepcopy(trained).items()}
    average = {name: value.clone() for name, value in ema.weights().items()}
    checkpoint.save(tmp_path / "checkpoints", 1, trained, {"state": healthy, "ema": ema.state()})
    for engine in trained.values():
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.add_(1.0)
    ema.update()
    assert ppo.restore(job(tmp_path), trained, ema, "KL 40") == healthy
    for name, engine in trained.items():
        assert all(torch.equal(value, before[name][key]) for key, value in engine.module.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in ema.weights().items())


def test_batches_have_to_divide_the_pool():
    with pytest.raises(ValueError, match="batch_size 24 does not divide rollout_batch_size 64"):
        PPOConfig(batch_size=24)
    assert PPOConfig(batch_size=96, generation_batches=3).pool_size == 192
