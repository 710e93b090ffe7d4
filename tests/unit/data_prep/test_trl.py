"""Prepared sets load in TRL as they are: its own code takes the pairs of the split stage for training."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from data_prep.tables import PAIR_SCHEMA, write_table

pytest.importorskip("trl", reason="TRL is in the dev extra")

PROMPT = [
    {"role": "user", "content": "which one is red"},
    {"role": "assistant", "content": "the apple"},
    {"role": "user", "content": "and green"},
]
PROGRAM = """
import sys
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
import trl
table, tokenizer_dir, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
tokenizer.pad_token = tokenizer.eos_token
shape = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)
common = dict(output_dir=out, use_cpu=True, max_steps=1, per_device_train_batch_size=2, report_to=[], bf16=False,
              gradient_checkpointing=False)
rows = Dataset.from_file(table)
for trainer_class, args_class, model_class in (
    (trl.DPOTrainer, trl.DPOConfig, LlamaForCausalLM),
    (trl.RewardTrainer, trl.RewardConfig, LlamaForSequenceClassification),
):
    model_class(LlamaConfig(**shape)).save_pretrained(f"{out}/{model_class.__name__}")
    trainer = trainer_class(model=f"{out}/{model_class.__name__}", args=args_class(**common), train_dataset=rows,
                            processing_class=tokenizer)
    loss = trainer.train().training_loss
    first = trainer.train_dataset[0]
    print(trainer_class.__name__, loss > 0, len(trainer.train_dataset), sorted(first))
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """reward-train.arrow as the split stage writes it."""
    rows = [
        {
            "prompt": PROMPT,
            "chosen": [{"role": "assistant", "content": f"the leaf {number}"}],
            "rejected": [{"role": "assistant", "content": "the sky"}],
            "source": "a",
            "group": str(number),
            "weight": 1.0,
        }
        for number in range(4)
    ]
    write_table(rows, tmp_path / "reward-train.arrow", PAIR_SCHEMA)
    return tmp_path / "reward-train.arrow"


def test_trl_takes_the_pairs_for_a_conversational_preference_set(
    table: Path, make_tokenizer: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer
    from trl.data_utils import apply_chat_template, is_conversational

    from data_prep.conversation import HUMAN_ASSISTANT_TEMPLATE

    row = Dataset.from_file(str(table))[0]
    assert is_conversational(row)
    folder = make_tokenizer(eos_token="<|endoftext|>", chat_template=HUMAN_ASSISTANT_TEMPLATE)
    texts = apply_chat_template(row, AutoTokenizer.from_pretrained(folder))
    assert texts["prompt"].endswith("the apple<|endoftext|>\n\nHuman: and green\n\nAssistant:")
    assert texts["chosen"] == " the leaf 0<|endoftext|>"
    assert texts["rejected"] == " the sky<|endoftext|>"


@pytest.mark.slow
def test_trl_trains_on_the_pairs_with_dpo_and_a_reward_model(
    table: Path, make_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    from data_prep.conversation import HUMAN_ASSISTANT_TEMPLATE

    folder = make_tokenizer(eos_token="<|endoftext|>", chat_template=HUMAN_ASSISTANT_TEMPLATE)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(table), str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if "Trainer" in line]  # among what TRL prints itself
    assert [line.partition(" [")[0] for line in told] == ["DPOTrainer True 4", "RewardTrainer True 4"]
