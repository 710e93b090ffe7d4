import pytest

from data_prep.keys import fraction, prompt_group, signs
from data_prep.text import citations, html_entities, line_ends, repair


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Rain falls [1]. Snow too [2, 3].", "Rain falls. Snow too."),
        ("Rain falls.[1][12]\nSnow [2,3] too.", "Rain falls.\nSnow too."),
        ("a list [x] of (2 things) [sic] [1a] {3} [...]", "a list [x] of (2 things) [sic] [1a] {3} [...]"),
    ],
)
def test_only_citation_marks_go(before: str, after: str) -> None:
    assert citations(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("R&amp;D &lt;b&gt; &#x27;a&#39; &quot;b&quot;", "R&D <b> 'a' \"b\""),
        ("a&nbsp;b&amp;#x200B;c", "a bc"),
        ("x?a=1&copy=2 & AT&T; &notareference;", "x?a=1&copy=2 & AT&T; &notareference;"),
    ],
)
def test_html_entities(before: str, after: str) -> None:
    assert html_entities(before) == after


def test_line_ends_and_names_of_what_changed() -> None:
    assert line_ends("a\r\nb\rc\u2029d") == "a\nb\nc\n\nd"
    assert repair("Cafe\u0301\r\n", ["line_ends", "nfc"]) == ("Café\n", ["line_ends", "nfc"])
    assert repair("plain [1] &amp;", ["line_ends", "nfc"]) == ("plain [1] &amp;", [])


def test_groups_are_the_same_for_prompts_that_differ_in_form_only() -> None:
    def group(text: str) -> str:
        return prompt_group([{"role": "user", "content": text}])

    assert group("How do I  cook rice?") == group("how do I cook RICE") == group("How do I cook ｒｉｃｅ!")
    assert group("How do I cook rice?") != group("How do I cook oats?")
    assert group("a") != prompt_group([{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("What is 7 + 2?", "+"),
        ("What is 7 - 2?", "\u2212"),
        ("7−2, 7–2, -5", 3 * "\u2212"),  # the minus sign, an en dash
        ("What is C++ - and C#, in a.b/c_d?", "++#/"),
        ("f(x) ＝ 10 % of ５＊６ €", "()=%*€"),
        ("Is this 🙂 or 🙁?", "🙂🙁"),
        ("कि, की", "िी"),  # vowels
        ('Well-known covid-19 – a ‘quote’, "it\'s" so… `x`; no: yes! «why»\n- a point', ""),
    ],
)
def test_the_signs_that_say_something(text: str, meant: str) -> None:
    assert signs(text) == meant


def test_fractions_are_even_and_for_ever_the_same() -> None:
    values = [fraction("phase", "0", f"group {number}") for number in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    # Pinned: another hash would move every group of every workspace to another phase.
    assert fraction("phase", "0", "p-abc") == pytest.approx(PINNED, abs=1e-12)


PINNED = 0.49399948190584553
