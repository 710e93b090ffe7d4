"""Log-probabilities, KL, advantages and losses against vectors worked by hand and float64 loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from tasks.training.advantages import explained_variance, gae, token_rewards, whiten
from tasks.training.kl import kl_estimate
from tasks.training.logprobs import token_entropy, token_logprobs
from tasks.training.losses import language_loss, pairwise_loss, policy_loss, value_loss

NAN = float("nan")
REWARDS = torch.tensor([[-0.01, 0.02, -0.03, 0.5, NAN], [0.0, -0.02, 1.2, NAN, NAN]])
VALUES = torch.tensor([[0.1, 0.2, 0.3, 0.4, 9.0], [0.5, 0.4, 0.3, 9.0, NAN]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
ADVANTAGES = torch.tensor([[0.352912, 0.27675, 0.165, 0.1, 0], [0.59825, 0.735, 0.9, 0, 0]])
WHITENED = torch.tensor([[-0.310587, -0.562418, -0.931919, -1.146842, 0], [0.500622, 0.952786, 1.498358, 0, 0]])


def test_gae_equals_the_float64_vector_and_ignores_masked_slots():
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, ADVANTAGES, atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, torch.where(MASK, ADVANTAGES + VALUES, 0.0), atol=1e-6, rtol=0)
    garbage = torch.where(MASK, VALUES, torch.randn_like(VALUES) * 1e6)
    assert torch.equal(gae(REWARDS, garbage, MASK, 1.0, 0.95)[0], advantages)


def test_gae_with_lambda_zero_is_the_one_step_error():
    rewards, values = torch.tensor([[0.0, 0, 1, 0]]), torch.tensor([[0.0, 1, 2, 3]])
    advantages, _ = gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), gamma=0.5, lam=0.0)
    assert advantages.tolist() == [[0.5, 0.0, 0.5, -3.0]]
    everything = torch.ones(1, 3, dtype=torch.bool)
    terminal = gae(torch.tensor([[0.0, 0, 5]]), torch.tensor([[1.0, 2, 3]]), everything, 1.0, 0.0)
    assert terminal[0].tolist() == [[1.0, 1.0, 2.0]]


def test_gae_equals_the_double_sum_of_its_definition():
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 7).double(), torch.randn(3, 7).double()
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    got, _ = gae(rewards, values, mask, 0.9, 0.8)
    for row in range(3):
        n = int(mask[row].sum())
        following = torch.cat([values[row, 1:n], torch.zeros(1).double()])
        delta = rewards[row, :n] + 0.9 * following - values[row, :n]
        for t in range(n):
            assert got[row, t].item() == pytest.approx(sum((0.72**k) * delta[t + k].item() for k in range(n - t)))


def test_whitening_is_unbiased_masked_and_over_all_ranks():
    torch.testing.assert_close(whiten(ADVANTAGES, MASK), WHITENED, atol=2e-5, rtol=0)
    with_nan = torch.where(MASK, ADVANTAGES, NAN)
    torch.testing.assert_close(whiten(with_nan, MASK), WHITENED, atol=2e-5, rtol=0)
    # Two ranks that hold a row each: the reduction adds what the other rank would send.
    sent: list[torch.Tensor] = []
    for row in range(2):
        kept = ADVANTAGES[row][MASK[row]].double()
        sent.append(torch.stack([torch.tensor(float(len(kept))).double(), kept.sum()]))
    mean = (sent[0] + sent[1])[1] / 7
    spread = [(ADVANTAGES[r][MASK[r]].double() - mean).square().sum() for r in range(2)]
    replies = iter([sent[0] + sent[1], spread[0] + spread[1]])
    first = whiten(ADVANTAGES[:1], MASK[:1], all_sum=lambda _: next(replies))
    torch.testing.assert_close(first, WHITENED[:1], atol=2e-5, rtol=0)


def test_kl_estimators_equal_their_definitions():
    logprobs, reference = torch.full((3,), -1.0), torch.tensor([0.0, -15.0, -30.0])
    assert kl_estimate(logprobs, reference, "k1").tolist() == [-1, 14, 29]
    assert kl_estimate(logprobs, reference, "k2").tolist() == [0.5, 98, 420.5]
    torch.testing.assert_close(
        kl_estimate(logprobs, reference, "k3"), torch.tensor([0.718282, 13.0, 28.0]), atol=1e-5, rtol=0
    )
    assert kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), "k3").isfinite().all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_kl_estimators_average_to_the_exact_divergence(estimator):
    torch.manual_seed(1)
    p, q = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * kl_estimate(p, q, estimator)).sum().item() == pytest.approx(exact.item(), abs=1e-6)


def test_score_stands_on_the_last_token_of_each_answer():
    kl = torch.full((2, 4), 0.5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    rewards = token_rewards(torch.tensor([3.0, -1.0]), kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.05, 2.95, 0], [-1.05, 0, 0, 0]]))


def test_logprobs_and_entropy_follow_the_temperature():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    expected = 3 / 0.7 - math.log(sum(math.exp(x / 0.7) for x in (1, 2, 3)))
    assert token_logprobs(logits, torch.tensor([2]), 0.7).item() == pytest.approx(expected, abs=1e-6)
    p = [math.exp(x / 0.7) / sum(math.exp(y / 0.7) for y in (1, 2, 3)) for x in (1, 2, 3)]
    assert token_entropy(logits, 0.7).item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-6)


def test_logprobs_of_bf16_logits_are_taken_in_fp32():
    torch.manual_seed(2)
    logits = (torch.randn(4, 50_000) * 5).bfloat16()
    tokens = torch.randint(50_000, (4,))
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(token_logprobs(logits, tokens).double(), exact, atol=2e-5, rtol=0)


def test_language_loss_is_the_cross_entropy_of_the_answer():
    torch.manual_seed(3)
    logits, tokens = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    expected = F.cross_entropy(logits[mask], tokens[mask], reduction="sum")
    torch.testing.assert_close(language_loss(token_logprobs(logits, tokens), mask), expected)


def test_pairwise_loss_is_log_two_for_equal_scores_and_weighted():
    same = pairwise_loss(torch.zeros(3), torch.zeros(3), torch.ones(3))
    assert same.item() == pytest.approx(3 * math.log(2))
    loss = pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) + 0.5 * math.log(1 + math.e))


def test_pairwise_loss_with_centering_adds_the_squared_sum_of_the_two_scores():
    scores = torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5])
    plain, centred = pairwise_loss(*scores), pairwise_loss(*scores, centering_coef=0.1)
    assert (centred - plain).item() == pytest.approx(0.1 * (2.0**2 + 0.5 * 1.5**2))


def test_policy_loss_clips_on_the_side_that_would_gain():
    old = torch.zeros(1, 5)
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 7.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, NAN]])
    mask = torch.tensor([[1, 1, 1, 1, 0]], dtype=torch.bool)
    loss, stats = policy_loss(ratios.log(), old, advantages, mask, 0.2)
    # min(r A, clip(r) A): 1.2 and 0.5 for A = 1; -1.5 and -0.8 for A = -1
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8))
    assert stats.clipped.item() == 4
    assert stats.ratio.item() == pytest.approx(4.0)


def test_policy_loss_of_the_sampling_policy_has_ratio_one_and_the_policy_gradient():
    torch.manual_seed(4)
    logprobs = torch.randn(2, 3, requires_grad=True)
    advantages, mask = torch.randn(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    loss, stats = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    loss.backward()
    assert stats.ratio.item() == mask.sum().item()
    assert stats.approx_kl.item() == 0
    assert stats.clipped.item() == 0
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages, 0.0))


def test_masked_garbage_gives_no_gradient():
    logprobs = torch.tensor([[-1.0, 400.0]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0, -400.0]]), torch.tensor([[1.0, NAN]])
    loss, _ = policy_loss(logprobs, old, advantages, torch.tensor([[True, False]]), 0.2)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_value_loss_takes_the_worse_of_plain_and_clipped():
    values, old = torch.tensor([[1.0, 1.0, 5.0]]), torch.tensor([[0.0, 0.9, 0.0]])
    returns, mask = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[True, True, False]])
    loss, clipped = value_loss(values, old, returns, mask, 0.2)
    # first: clipped value 0.2, error 0.64 against 0; second: within the range, error 1
    assert loss.item() == pytest.approx((0.64 + 1.0) / 2)
    assert clipped.item() == 1


def test_token_mean_over_the_batch_is_not_the_mean_of_micro_batch_means():
    logprobs = torch.zeros(2, 3)
    advantages = torch.tensor([[1.0, 0, 0], [-1.0, -1, -1]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    rows = [slice(0, 1), slice(1, 2)]
    sums = [policy_loss(logprobs[row], logprobs[row], advantages[row], mask[row], 0.2)[0] for row in rows]
    assert (sum(sums) / mask.sum()).item() == pytest.approx(0.5)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[1, 1, 1, 0]], dtype=torch.bool)
    same = lambda tensor: tensor  # noqa: E731
    assert explained_variance(returns, returns, mask, same) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 4), returns, mask, same) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(1, 4), mask, same) == 0.0
