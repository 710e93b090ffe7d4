"""The tokenizer as the data needs it: a pad token of its own, a chat template, one EOS; and prompts and answers as ids.

An answer is tokenised apart from its prompt, because generation too continues from the prompt's ids: a token that
reaches over the border would never be produced.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.conversation import HUMAN_ASSISTANT_TEMPLATE, Message
from data_prep.model_files import TOKENIZER_FILES

NEW_PAD = "<|pad|>"


def load_tokenizer(folder: str | Path, trusted: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, or of a model on the hub, made fit for training.

    It gets a pad token that is not EOS, and `HUMAN_ASSISTANT_TEMPLATE` where it has no chat template.  Where no unused
    token can be the pad, `<|pad|>` is added, so `len(tokenizer)` may be more than the model's vocabulary.  Code that
    the folder brings runs only if it is `trusted`.  ValueError for a folder without a tokenizer, or a tokenizer without
    EOS.
    """
    tokenizer = _load(str(folder), trusted)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {folder} has no EOS token: name one in its tokenizer_config.json.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _set_pad(tokenizer)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _begin_token(tokenizer) + HUMAN_ASSISTANT_TEMPLATE
    return tokenizer


def _load(name: str, trusted: bool) -> PreTrainedTokenizerBase:
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
            raise ValueError(f"The folder {name} holds no tokenizer: copy the model's tokenizer files into it.")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name}: correct the model's path.")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    except Exception as error:  # of a damaged file, its readers raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"No tokenizer could be loaded from {name}: name a local folder that has one. ({reason})"
        ) from error


def _set_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """An unused token becomes pad: with pad = EOS, a model would have to tell the end of an answer from filling."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    spare = [
        token for token in special if token not in taken and ("pad" in token.lower() or "reserved" in token.lower())
    ]
    if spare:
        tokenizer.pad_token = next((token for token in spare if "pad" in token.lower()), spare[0])
    elif tokenizer.unk_token is not None and tokenizer.unk_token not in taken:
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})


def _begin_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Template text for BOS, where this tokenizer puts one before a text by itself."""
    first = tokenizer("a").input_ids[0]
    return "{{- bos_token -}}" if tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id else ""


def check_eos(
    tokenizer: PreTrainedTokenizerBase, model_config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> None:
    """ValueError where the model's configs name EOS ids (a number or a list) and the tokenizer's is not among them."""
    named = {
        number for config in (model_config, generation_config or {}) for number in _as_list(config.get("eos_token_id"))
    }
    if named and tokenizer.eos_token_id not in named:
        raise ValueError(
            f"The tokenizer ends answers with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), the model with "
            f"{', '.join(str(number) for number in sorted(named))}: make eos_token_id the same in the model's "
            "config.json or generation_config.json and its tokenizer_config.json."
        )


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The messages in the chat template, up to where the assistant's answer begins."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: str, messages: Sequence[Message], answer: Message) -> str:
    """What the template adds to `prompt` (the text of `messages`) for the answer, up to and with its first EOS.

    Where the template does not end a turn with EOS, EOS is appended.
    """
    whole = str(tokenizer.apply_chat_template([*messages, answer], tokenize=False))
    if not whole.startswith(prompt):
        raise ValueError(
            "The tokenizer's chat template changes the text before an answer once the answer is there, so prompt and "
            "answer cannot be told apart: use a template whose generation prompt begins the answer's turn."
        )
    body, end, _ = whole[len(prompt) :].partition(str(tokenizer.eos_token))
    return body + (end or str(tokenizer.eos_token))


def turn_texts(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[str]:
    """A conversation that ends in an answer, in the chat template, cut where the loss mask changes.

    In turn: what stands before an answer, the answer with its EOS, what stands before the next one, and so on to the
    last.  An earlier answer that the template leaves out or changes in the history is none: it is not learnt.
    """
    *history, last = messages
    prompt = prompt_text(tokenizer, history)
    texts, done = [], 0
    for index, message in enumerate(history):
        if message["role"] != "assistant":
            continue
        start = len(before := prompt_text(tokenizer, history[:index]))
        found = prompt.find(message["content"], start) if prompt.startswith(before) else -1
        if found < 0:
            continue
        stop = found + len(message["content"])
        rest = prompt[stop:]
        if rest.lstrip().startswith(str(tokenizer.eos_token)):
            stop += rest.index(str(tokenizer.eos_token)) + len(str(tokenizer.eos_token))
        texts += [prompt[done:start], prompt[start:stop]]
        done = stop
    return [*texts, prompt[done:], answer_text(tokenizer, prompt, history, last)]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts that the template has already given their special tokens."""
    return list(tokenizer(texts, add_special_tokens=False).input_ids) if texts else []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of the prompt in the chat template, up to where the assistant's answer begins."""
    return encode(tokenizer, [prompt_text(tokenizer, messages)])[0]


def answer_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: Message) -> list[int]:
    """Ids of the answer to a prompt, tokenised alone; they end in the one EOS."""
    return encode(tokenizer, [answer_text(tokenizer, prompt_text(tokenizer, messages), messages, answer)])[0]


def same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give a conversation the same ids."""
    return bool(first.get_vocab() == second.get_vocab() and first.chat_template == second.chat_template)


def holds_special(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> bool:
    """Whether a text spells out a special token: tokenised, it would end the answer or begin another turn."""
    tokens = tokenizer.all_special_tokens
    return any(token in text for text in texts for token in tokens)
