"""What several tests of data preparation need: a small tokenizer, a demo hub, the mirror of the real sets."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.demo import make_pairs, write_hub

REPO = Path(__file__).parents[3]
EOS = "<|endoftext|>"


@pytest.fixture(scope="session")
def mirror() -> Path:
    hub = REPO.parent / "shared" / "hub"
    if not hub.is_dir():
        pytest.skip(f"The mirror of the six real sets is not at {hub}.")
    return hub


@pytest.fixture(scope="session")
def demo_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = tmp_path_factory.mktemp("hub")
    write_hub(hub, seed=0, pairs=1200)
    return hub


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a byte-level BPE tokenizer of the demo's language; keyword arguments name its special tokens."""
    corpus = [text for pair in make_pairs(Random(5), 500) for text in (f"\n\nHuman: {pair.prompt}", f" {pair.chosen}")]

    def make(special: tuple[str, ...] = (EOS,), chat_template: str | None = None, **named: str) -> Path:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=512, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(corpus, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
        tokenizer.chat_template = chat_template
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(make_tokenizer: Callable[..., Path]) -> Path:
    return make_tokenizer(eos_token=EOS)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A new empty folder of that name, as a step gets it."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir(parents=True)
        return tmp_path / name

    return make
