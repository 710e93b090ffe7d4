"""Memory and time by arithmetic: against transformers' own counts and against what was measured on an H100."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tasks.config import ConfigError, EngineConfig, LoraConfig, PPOConfig, RewardConfig
from tasks.fit import Load, Setting, cheapest, gpu_of, of_ppo, of_training, seconds, settings, trained
from tasks.shapes import GIB, GPUS, Shape, shape_of
from tasks.training.lora import add_adapters
from tasks.training.models import ScalarModel, freeze_first

SMALL = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPES = {
    "llama": LlamaConfig(intermediate_size=160, num_key_value_heads=2, **SMALL),
    "llama, tied": LlamaConfig(intermediate_size=160, tie_word_embeddings=True, **SMALL),
    "opt": OPTConfig(ffn_dim=256, word_embed_proj_dim=64, **SMALL),
    "opt-350m": OPTConfig(ffn_dim=256, word_embed_proj_dim=32, do_layer_norm_before=False, **SMALL),
    "gpt-neox": GPTNeoXConfig(intermediate_size=256, **SMALL),
    "qwen2": Qwen2Config(intermediate_size=160, num_key_value_heads=2, **SMALL),
    "qwen3": Qwen3Config(intermediate_size=160, num_key_value_heads=2, head_dim=32, **SMALL),
}
B17 = Shape("gated", 2048, 8192, 24, 2048, 2048, 49152, tied=True)
FULL = Load(tokens=8 * 2048, total_tokens=8 * 2048, length=2048)
H100 = GPUS["h100"]
BENCH_SHAPES = Path(__file__).parents[2] / "bench" / "shapes"


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_of_transformers(config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict())
    assert shape.parameters == model.num_parameters()
    if shape.projected or shape.family == "gpt_neox":
        return  # OPT-350M has projections and NeoX one product for query, key and value: a little off
    with torch.device("meta"):
        add_adapters(model, LoraConfig(rank=8), "sft.lora")
    assert 8 * shape.adapted == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("compiled", "gib", "step_s"),
    [(False, 53, 0.486), (True, 41, 0.352)],
    ids=["eager", "compiled"],
)
def test_activations_and_time_are_near_those_measured_on_an_h100(compiled: bool, gib: float, step_s: float) -> None:
    # A Llama-shaped 1.7B, 8 x 2,048 tokens, bf16 weights and Adam states, loss in chunks, no checkpointing.
    engine = EngineConfig(compile_layers=compiled)
    memory = trained(B17, engine, None, FULL, gpus=1)
    states = (2 + 4) * B17.parameters
    assert (states + memory.activations + memory.logits) / GIB == pytest.approx(gib, rel=0.15)
    assert seconds(B17, engine, None, FULL, H100) == pytest.approx(step_s, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "load", "gib"),
    [
        ("llama-1.7b", FULL, 61.0),
        ("opt-350m", Load(49_300, 49_300, 512, scores_tokens=False), 35.1),
        ("opt-350m", Load(16_384, 49_300, 512, scores_tokens=False), 15.0),
        ("smollm2-135m", Load(32_768, 51_000, 200), 21.0),
    ],
)
def test_memory_is_near_the_peaks_of_the_train_bench(shape: str, load: Load, gib: float) -> None:
    # One H200, compiled layers, bf16 with fp32 master weights.
    config = yaml.safe_load((BENCH_SHAPES / f"{shape}.yaml").read_text())
    memory = trained(shape_of(config), EngineConfig(compile_layers=True), None, load, gpus=1)
    assert memory.allocated / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "step_s"),
    [({}, 0.664), ({"zero_stage": 3}, 0.738), ({"zero_stage": 2, "offload_optimizer": True}, 1.416)],
)
def test_time_of_recomputed_steps_is_near_deepspeeds(changes: dict, step_s: float) -> None:
    engine = EngineConfig(gradient_checkpointing=True, **changes)
    assert seconds(B17, engine, None, FULL, H100) == pytest.approx(step_s, rel=0.05)


@pytest.mark.parametrize(
    ("frozen_layers", "lora", "passes"),
    # Forward, for inputs' gradients, for weights' gradients, and of what is trained forward once more.
    [(0, None, (3, 4)), (12, None, (2, 2.5)), (0, LoraConfig(), (2, 3)), (12, LoraConfig(), (1.5, 2))],
)
def test_recomputation_takes_one_more_forward_pass_of_what_is_trained(
    frozen_layers: int, lora: LoraConfig | None, passes: tuple[float, float]
) -> None:
    load = Load(16_384, 16_384, 512, scores_tokens=False, frozen_layers=frozen_layers)
    plain = seconds(B17, EngineConfig(), None, Load(16_384, 16_384, 512, scores_tokens=False), H100) / 3
    for engine, count in zip((EngineConfig(), EngineConfig(gradient_checkpointing=True)), passes, strict=True):
        assert seconds(B17, engine, lora, load, H100) == pytest.approx(count * plain)


@pytest.mark.parametrize(("frozen_layers", "gib"), [(0, 24.5), (15, 12.6)])
def test_memory_of_frozen_layers_is_near_the_peaks_of_a_run(frozen_layers: int, gib: float) -> None:
    # The two reward models of docs/results/smollm2-135m.md's fifth try, on one H200, eager.
    config = yaml.safe_load((BENCH_SHAPES / "smollm2-135m.yaml").read_text())
    load = Load(32_768, 98_304, 768, scores_tokens=False, frozen_layers=frozen_layers)
    memory = trained(shape_of(config), EngineConfig(), None, load, gpus=1)
    assert memory.allocated / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "opt", "gpt-neox", "qwen2", "qwen3"])
def test_what_frozen_layers_leave_to_train_is_counted(name: str) -> None:
    config = SHAPES[name]
    with torch.device("meta"):
        model = ScalarModel(AutoModelForSequenceClassification.from_config(config))
    freeze_first(model, 2, "reward.frozen_layers")
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    load = Load(1, 1, 1, scores_tokens=False, frozen_layers=2)
    states = trained(shape_of(config.to_dict()), EngineConfig(zero_stage=1), None, load, gpus=1).optimizer
    assert states / 12 == pytest.approx(counted, rel=0.01)


def test_no_more_layers_are_frozen_than_there_are() -> None:
    config = RewardConfig(frozen_layers=25)
    with pytest.raises(ConfigError, match=r"reward\.frozen_layers is 25, but the model has 24 layers; lower it"):
        of_training(config, B17, False, 512, 1, H100, "reward")


def test_bytes_per_parameter_are_those_of_zero() -> None:
    # Rajbhandari et al. 2020, figure 1: 16 bytes a parameter, 12 of them sharded from stage 1, all from stage 3.
    many = Load(tokens=1, total_tokens=64, length=1)
    n = B17.parameters

    def states(stage: int) -> float:
        memory = trained(B17, EngineConfig(zero_stage=stage), None, many, gpus=64)
        return (memory.weights + memory.gradients + memory.optimizer) / n

    assert states(1) == pytest.approx(4 + 12 / 64)
    assert states(2) == pytest.approx(2 + 14 / 64)
    assert states(3) == pytest.approx(16 / 64)
    assert states(0) == 18  # DeepSpeed's bf16 optimizer sums gradients in fp32
    adapters = trained(B17, EngineConfig(), LoraConfig(), many, gpus=1)
    assert adapters.weights == 2 * n
    assert adapters.optimizer < 0.02 * 12 * n


def test_the_cheapest_is_the_fastest_that_fits() -> None:
    options = settings(B17, EngineConfig(), None, FULL, 1, H100)
    assert options[0].engine == EngineConfig()
    fits_80 = cheapest(options, H100.memory)
    assert fits_80 is not None
    assert fits_80.engine == EngineConfig()
    fits_40 = cheapest(options, 40 * GIB)
    assert fits_40 is not None
    assert fits_40.engine.gradient_checkpointing
    assert not fits_40.engine.offload_optimizer
    fits_16 = cheapest(options, 16 * GIB)
    assert fits_16 is not None
    assert fits_16.engine.offload_optimizer
    assert fits_16.lora is None
    fits_10 = cheapest(options, 9.8 * GIB)
    assert fits_10 is not None
    assert fits_10.lora is not None
    assert cheapest(options, 3 * GIB) is None


def test_adapters_save_ppo_its_reference() -> None:
    policy, critic = B17, Shape("gated", 1024, 4096, 12, 1024, 1024, 49152, tied=True)
    whole = of_ppo(PPOConfig(), policy, critic, 256, 256, 1, H100)
    lora = PPOConfig(policy_lora=LoraConfig(), critic_lora=LoraConfig())
    adapted = of_ppo(lora, policy, critic, 256, 256, 1, H100)
    assert whole[0].memory.weights - adapted[0].memory.weights == pytest.approx(2 * policy.parameters)
    assert adapted[0].memory.allocated < 0.5 * whole[0].memory.allocated


def ppo_of(config: PPOConfig, gpus: int = 1) -> Setting:
    """What the configured setting of PPO takes, policy and critic of 1.7B."""
    own = (config.policy_engine, config.policy_lora)
    return next(s for s in of_ppo(config, B17, B17, 256, 256, gpus, H100) if (s.engine, s.lora) == own)


def test_ppos_critic_is_held_as_it_is_configured() -> None:
    plain = ppo_of(PPOConfig())
    off = ppo_of(PPOConfig(critic_engine=EngineConfig(zero_stage=2, offload_optimizer=True)))
    assert off.memory.optimizer == plain.memory.optimizer / 2 == 12 * B17.parameters
    assert off.seconds > plain.seconds
    lean = ppo_of(PPOConfig(policy_engine=EngineConfig(gradient_checkpointing=True)))
    assert lean.memory.activations == plain.memory.activations  # the critic's, which recomputes nothing
    others = of_ppo(PPOConfig(critic_engine=EngineConfig(gradient_checkpointing=True)), B17, B17, 256, 256, 1, H100)
    alike = [s for s in others if s.engine == EngineConfig(zero_stage=2) and s.lora is None]
    assert alike[0].memory.activations == plain.memory.activations


def test_no_parameters_of_the_critic_are_offloaded_where_they_cannot_be() -> None:
    offloaded = EngineConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    found = of_ppo(PPOConfig(policy_engine=offloaded, critic_engine=offloaded), B17, B17, 256, 256, 1, H100)
    setting = next(s for s in found if s.engine.zero_stage == 2 and s.engine.offload_optimizer and s.lora is None)
    assert setting.memory.weights == 4 * 2 * B17.parameters


def test_the_cache_is_that_of_the_answers_that_are_sampled_at_a_time() -> None:
    def ppo(rows: int = 1024, gpus: int = 1, zero_stage: Any = 0, **changes: Any) -> Setting:
        sizes = {"rollout_batch_size": rows, "batch_size": 64, "micro_batch_size": 1}
        engine = EngineConfig(zero_stage=zero_stage)
        return ppo_of(PPOConfig(**sizes | changes, policy_engine=engine, critic_engine=engine), gpus)

    row = 2 * 2 * 24 * 2048 * 512  # keys and values of all layers, bf16, 512 tokens
    assert ppo(rows=64).memory.cache == 64 * row
    assert ppo().memory.cache == 256 * row
    assert ppo(rollout={"slots": 16}).memory.cache == 16 * row
    assert ppo(rows=128, gpus=2, rollout={"slots": 100}).memory.cache == 64 * row
    # The plain loop holds all rows, and gives them back before the networks train.
    plain = {"rollout": {"engine": "plain", "slots": 16}}
    train = ppo(**plain).memory
    assert train.cache == 1024 * row - train.activations - train.logits - train.step
    assert ppo(**plain) == ppo(sampling={"top_k": 5}) == ppo(sampling={"top_p": 0.9})
    in_parts = ppo(zero_stage=3, gpus=2).memory
    assert in_parts.cache == 512 * row - in_parts.activations - in_parts.logits - in_parts.step
    # A sixteenth of the answers at a time: the weights are read for 16 times as many tokens.
    slower = ppo(rollout={"slots": 16}).seconds - ppo().seconds
    assert slower == pytest.approx((64 - 4) * 256 * 2 * B17.parameters / (0.6 * H100.bandwidth))


def test_a_gpu_is_a_name_or_its_gib() -> None:
    assert gpu_of("H100") == H100
    assert gpu_of("24").memory == 24 * GIB
    with pytest.raises(ConfigError, match="--gpu h1000: give its memory in GiB or one of t4, v100"):
        gpu_of("h1000")
    with pytest.raises(ConfigError, match="memory of a mamba cannot be told; known: gpt_neox, llama"):
        shape_of({"model_type": "mamba"})
