"""The demo's little language: prompts that name a topic, answers that list things, and the hidden quality of an answer.

An answer is a list of phrases "adjective noun".  A phrase is right if the noun belongs to the prompt's topic and the
adjective fits the noun's kind.  Topics and kinds are crossed, so no word is good or bad by itself: neither a count of
words nor the length of an answer tells the better one, only who reads word and context together can.
"""

import re
from random import Random

KINDS: dict[str, tuple[str, ...]] = {
    "being": ("hungry", "sleepy", "young", "clever"),
    "thing": ("wooden", "broken", "heavy", "painted"),
    "stuff": ("fresh", "sticky", "pale", "thick"),
}

# Topic -> kind -> noun.
TOPICS: dict[str, dict[str, str]] = {
    "kitchen": {"being": "cook", "thing": "spoon", "stuff": "soup"},
    "garden": {"being": "snail", "thing": "rake", "stuff": "compost"},
    "harbour": {"being": "sailor", "thing": "anchor", "stuff": "tar"},
    "forest": {"being": "fox", "thing": "axe", "stuff": "moss"},
    "school": {"being": "teacher", "thing": "desk", "stuff": "ink"},
    "market": {"being": "merchant", "thing": "stall", "stuff": "cheese"},
    "farm": {"being": "lamb", "thing": "plough", "stuff": "milk"},
    "workshop": {"being": "carpenter", "thing": "bench", "stuff": "glue"},
    "library": {"being": "reader", "thing": "shelf", "stuff": "paste"},
    "mountain": {"being": "goat", "thing": "hut", "stuff": "snow"},
}

PEOPLE = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Greta", "Hugo", "Iris", "Jonas", "Karin", "Leo"),
    *("Marta", "Nils", "Olga", "Paul", "Rosa", "Tom"),
)
TIMES = (
    *("today", "tonight", "tomorrow", "early", "late", "often", "in spring", "in winter", "at noon", "at night"),
    *("on Sunday", "on Monday", "after rain", "last week"),
)
# Short, so that a small model soon finds the one word that counts.
REQUESTS = (
    "Tell {person} about the {topic} {time}.",
    "Describe the {topic} {time} to {person}.",
    "{person} asks about the {topic} {time}.",
    "List what {person} finds in the {topic} {time}.",
    "What does {person} see in the {topic} {time}?",
    "What is in the {topic} {time}, {person}?",
)

MOST_PHRASES = 6
FEWEST_PHRASES = 2

# What is wrong with wrong phrases, and how often.  A small model learns topics from a few thousand pairs, the fit of
# adjectives only from many more, so that a wrong adjective alone is the rarer fault.
FAULTS = {"noun": 0.25, "adjective": 0.15, "both": 0.5, "repetition": 0.1}

_KIND_OF_NOUN = {noun: kind for kinds in TOPICS.values() for kind, noun in kinds.items()}
_TOPIC_OF_NOUN = {noun: topic for topic, kinds in TOPICS.items() for noun in kinds.values()}
_KIND_OF_ADJECTIVE = {adjective: kind for kind, adjectives in KINDS.items() for adjective in adjectives}
_NOUNS_OF = {topic: tuple(kinds.values()) for topic, kinds in TOPICS.items()}
_TOPIC = re.compile(rf"\b({'|'.join(TOPICS)})\b")


def vocabulary() -> set[str]:
    """Every word of the language, in lower case."""
    texts = [*PEOPLE, *TIMES, *TOPICS, *_KIND_OF_NOUN, *_KIND_OF_ADJECTIVE]
    texts += [request.format(person="", topic="", time="") for request in REQUESTS]
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def write_prompt(rng: Random) -> str:
    """A prompt of at most 10 words that names one topic."""
    person, topic, time = rng.choice(PEOPLE), rng.choice(tuple(TOPICS)), rng.choice(TIMES)
    return rng.choice(REQUESTS).format(person=person, topic=topic, time=time)


def topic_of(prompt: str) -> str:
    """The topic that a prompt names (the last, where it holds a conversation); ValueError where it names none."""
    topics = _TOPIC.findall(prompt)
    if not topics:
        raise ValueError(f"The prompt names no topic of the demo's language: {prompt[:60]!r}.")
    return str(topics[-1])


def is_right(phrase: str, topic: str) -> bool:
    """Whether a phrase is "adjective noun" with a noun of the topic and an adjective of the noun's kind."""
    adjective, _, noun = phrase.partition(" ")
    return _TOPIC_OF_NOUN.get(noun) == topic and _KIND_OF_ADJECTIVE.get(adjective) == _KIND_OF_NOUN[noun]


def true_score(prompt: str, answer: str) -> float:
    """The hidden quality in [0, 1]: the share of phrases that are right and not said before.

    An answer shorter than two phrases counts as two, and without its full stop its last phrase is wrong (it may have
    been cut).  No model sees this number.
    """
    topic = topic_of(prompt)
    text = answer.strip()
    phrases = text.removesuffix(".").split(", ")
    heard: set[str] = set()
    right = 0
    for number, phrase in enumerate(phrases, start=1):
        whole = text.endswith(".") or number < len(phrases)
        right += whole and phrase not in heard and is_right(phrase, topic)
        heard.add(phrase)
    return right / max(len(phrases), FEWEST_PHRASES)


def write_answer(topic: str, quality: float, rng: Random) -> str:
    """An answer of 2 to 6 phrases, each right with probability `quality`; length and quality are independent."""
    phrases: list[str] = []
    for _ in range(rng.randint(FEWEST_PHRASES, MOST_PHRASES)):
        right = rng.random() < quality
        phrases.append(_right_phrase(topic, phrases, rng) if right else _wrong_phrase(topic, phrases, rng))
    return ", ".join(phrases) + "."


def _right_phrase(topic: str, said: list[str], rng: Random) -> str:
    while True:
        noun = rng.choice(_NOUNS_OF[topic])
        phrase = f"{rng.choice(KINDS[_KIND_OF_NOUN[noun]])} {noun}"
        if phrase not in said:
            return phrase


def _wrong_phrase(topic: str, said: list[str], rng: Random) -> str:
    """A phrase that repeats, or whose noun is of another topic, or whose adjective is of another kind, or both.

    Over all prompts every noun and every adjective is as frequent here as in right phrases.
    """
    (fault,) = rng.choices(tuple(FAULTS), weights=tuple(FAULTS.values()))
    if fault == "repetition" and said:
        return rng.choice(said)
    home = topic if fault == "adjective" else rng.choice([other for other in TOPICS if other != topic])
    noun = rng.choice(_NOUNS_OF[home])
    kinds = [kind for kind in KINDS if (kind == _KIND_OF_NOUN[noun]) == (fault == "noun")]
    return f"{rng.choice(KINDS[rng.choice(kinds)])} {noun}"
