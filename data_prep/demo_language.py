"""The demo's little language: prompts that name a topic, answers that list things, and the hidden quality of an answer.

An answer is a list of phrases "adjective noun".  A phrase is right if both words belong to the prompt's topic.  Every
word is right under one topic and wrong under all others, so no word is good or bad by itself: neither a count of words
nor the length of an answer tells the better one, only who reads prompt and answer together can.
"""

import re
from random import Random

# Topic -> its adjectives and its nouns.
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kitchen": (("hot", "salty", "sweet", "greasy"), ("cook", "spoon", "soup", "kettle")),
    "garden": (("green", "muddy", "leafy", "sunny"), ("snail", "rake", "compost", "tulip")),
    "harbour": (("tarred", "foggy", "distant", "rusty"), ("sailor", "anchor", "rope", "gull")),
    "forest": (("dark", "wild", "mossy", "hollow"), ("fox", "axe", "fern", "oak")),
    "school": (("strict", "young", "noisy", "clever"), ("teacher", "desk", "ink", "lesson")),
    "farm": (("woolly", "fresh", "dusty", "hungry"), ("lamb", "plough", "milk", "barn")),
}

PEOPLE = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Greta", "Hugo", "Iris", "Jonas", "Karin", "Leo"),
    *("Marta", "Nils", "Olga", "Paul", "Rosa", "Tom"),
)
TIMES = (
    *("today", "tonight", "tomorrow", "soon", "late", "often", "in spring", "in winter", "at noon", "at night"),
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
FEWEST_PHRASES = 3

# What is wrong with wrong phrases, and how often.
FAULTS = {"noun": 0.25, "adjective": 0.25, "both": 0.35, "repetition": 0.15}

_PHRASE = {topic: (frozenset(adjectives), frozenset(nouns)) for topic, (adjectives, nouns) in TOPICS.items()}
_TOPIC = re.compile(rf"\b({'|'.join(TOPICS)})\b")


def vocabulary() -> set[str]:
    """Every word of the language, in lower case."""
    texts = [*PEOPLE, *TIMES, *TOPICS, *(word for parts in TOPICS.values() for words in parts for word in words)]
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
    """Whether a phrase is "adjective noun" with both words of the topic."""
    adjectives, nouns = _PHRASE[topic]
    adjective, _, noun = phrase.partition(" ")
    return adjective in adjectives and noun in nouns


def true_score(prompt: str, answer: str) -> float:
    """The hidden quality in [0, 1]: the share of phrases that are right and not said before.

    An answer shorter than three phrases counts as three, and without its full stop its last phrase is wrong (it may
    have been cut).  No model sees this number.
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
    """An answer of 3 to 6 phrases, each right with probability `quality`; length and quality are independent."""
    phrases: list[str] = []
    for _ in range(rng.randint(FEWEST_PHRASES, MOST_PHRASES)):
        right = rng.random() < quality
        phrases.append(_right_phrase(topic, phrases, rng) if right else _wrong_phrase(topic, phrases, rng))
    return ", ".join(phrases) + "."


def _right_phrase(topic: str, said: list[str], rng: Random) -> str:
    while True:
        phrase = _phrase(topic, topic, rng)
        if phrase not in said:
            return phrase


def _wrong_phrase(topic: str, said: list[str], rng: Random) -> str:
    """A phrase that repeats, or one with one or both words of other topics.

    Over all prompts every noun and every adjective is as frequent here as in right phrases.
    """
    (fault,) = rng.choices(tuple(FAULTS), weights=tuple(FAULTS.values()))
    if fault == "repetition" and said:
        return rng.choice(said)
    others = [other for other in TOPICS if other != topic]
    adjective = topic if fault == "noun" else rng.choice(others)
    noun = topic if fault == "adjective" else rng.choice(others)
    return _phrase(adjective, noun, rng)


def _phrase(adjective_of: str, noun_of: str, rng: Random) -> str:
    return f"{rng.choice(TOPICS[adjective_of][0])} {rng.choice(TOPICS[noun_of][1])}"
