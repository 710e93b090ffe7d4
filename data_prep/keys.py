"""Hashes that stay the same on every machine and in every run: what rows are the same, what rows belong together."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from data_prep.conversation import Message

_WORD = re.compile(r"\w+")
_DASHES = str.maketrans("\u2013\u2212", "--")
_MINUS = re.compile(r"-(?=\s*\d)(?<![^\W\d]-)")  # a hyphen before a number, but not after a letter
_SIGN = re.compile(r"[^\w\s!\"',.:;?`-]")
# Of what is not ASCII: marks (a vowel, in some scripts), mathematics, currencies, other symbols (emoji).
_MEANT = {"Mn", "Mc", "Sm", "Sc", "So"}


def digest(*parts: str) -> bytes:
    """16 bytes that name the parts; their borders count ("a", "bc" differs from "ab", "c")."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big") + data)
    return state.digest()


def fraction(*parts: str) -> float:
    """A number in [0, 1), evenly spread over different parts; the same parts give the same number for ever."""
    return int.from_bytes(digest(*parts)[:6], "big") / 2**48


def normalised(text: str) -> str:
    """The words of a text, one space apart, without case, punctuation and Unicode's look-alikes."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def signs(text: str) -> str:
    """The signs of a text that say something and that its words lack, in order: "C++" is not "C", nor 7 + 2 7 - 2.

    A sentence's punctuation, quotes and dashes are none of them.
    """
    text = _MINUS.sub("\u2212", unicodedata.normalize("NFKC", text).translate(_DASHES))
    return "".join(sign for sign in _SIGN.findall(text) if sign.isascii() or unicodedata.category(sign) in _MEANT)


def prompt_group(prompt: Sequence[Message]) -> str:
    """The group of a prompt: the same for all prompts, of whatever source, that are equal after normalising."""
    return _group(_normalised_turns(prompt))


def inner_groups(prompt: Sequence[Message]) -> list[str]:
    """The groups of the prompts within a prompt: of what stands before each of its answers."""
    parts = _normalised_turns(prompt)
    return [_group(parts[: 2 * place]) for place, turn in enumerate(prompt) if turn["role"] == "assistant"]


def _normalised_turns(prompt: Sequence[Message]) -> list[str]:
    return [part for turn in prompt for part in (turn["role"], normalised(turn["content"]))]


def _group(parts: Sequence[str]) -> str:
    return "p-" + digest(*parts).hex()


def messages_digest(*conversations: Sequence[Message]) -> bytes:
    """16 bytes that name the exact messages of one or more conversations."""
    parts: list[str] = []
    for turns in conversations:
        parts.append(str(len(turns)))
        parts += (part for turn in turns for part in (turn["role"], turn["content"]))
    return digest(*parts)
