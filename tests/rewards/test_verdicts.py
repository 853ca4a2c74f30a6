"""Verdicts by mathematics: a corpus by kind, and generated values in ten ways of writing each."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import patience
from tests.support.corpus import corpus
from vime.rewards import math_answer
from vime.rewards.answer_reader import readings
from vime.rewards.extract import candidates, chosen_letter, final_part, last_boxed
from vime.rewards.latex_tokens import NoAnswer, Unreadable
from vime.rewards.math_answer import same
from vime.samples import Sample

PAIRS = corpus()


@pytest.mark.parametrize("kind", sorted({pair.kind for pair in PAIRS}))
def test_the_corpus_is_judged_as_mathematics_does(kind):
    wrong = [pair for pair in PAIRS if pair.kind == kind and pair.verdict() is not pair.right]
    assert not wrong


def test_the_corpus_is_large_and_has_both_verdicts_of_every_kind():
    assert len({(pair.reward, pair.response, pair.label) for pair in PAIRS}) >= 400
    for kind in {pair.kind for pair in PAIRS}:
        assert {pair.right for pair in PAIRS if pair.kind == kind} == {True, False}


# Ten ways of writing each value: every way of one value is equal to every way of it, and to none of another.

WRAPPINGS = ("{}", " {} ", "${}$", "\\({}\\)", "{}.", "\\displaystyle {}", "**{}**", "\\, {}", "x = {}", "{{{}}}")
FRACTIONS = ("S\\frac{T}{B}", "\\frac{ST}{B}", "S\\dfrac{T}{B}", "S\\tfrac{3*T}{3*B}", "ST/B", "ST / B", "S{T}/{B}",
             "\\frac{N}{-B}", "S\\frac{T} {B}", "S\\left(\\frac{T}{B}\\right)")  # fmt: skip
MIXED = ("W\\frac{T}{B}", "W \\frac{T}{B}", "W\\dfrac{T}{B}", "W\\,\\tfrac{T}{B}", "W T/B", "I/B", "\\frac{I}{B}",
         "W+\\frac{T}{B}", "W\\ \\frac{T}{B}", "W~\\frac{T}{B}")  # fmt: skip
TUPLES = ("(C)", "(D)", "\\left(C\\right)", "( C )", "\\left( D \\right)", "\\langle D \\rangle", "\\big(E\\big)",
          "(a, b) = (D)", "(F)", "\\begin{pmatrix}G\\end{pmatrix}")  # fmt: skip
CLOSED = ("[L,H]", "[L, H]", "\\left[L,H\\right]", "\\left[ L, H \\right]", "x \\in [L,H]", "L \\le x \\le H",
          "L\\le t \\leq H", "H \\ge x >= L", "[L.0,H]", "[\\frac{M}{2}, H]")  # fmt: skip
HALF_OPEN = ("(L,H]", "(L, H]", "\\left(L,H\\right]", "\\left( L, H \\right]", "x \\in (L,H]", "L < x \\le H",
             "L< t \\leq H", "H \\ge x > L", "(L.0,H]", "(\\frac{M}{2}, H]")  # fmt: skip


def filled(templates, **values):
    """Every template with its capital letters replaced."""
    return ["".join(str(values.get(letter, letter)) for letter in template) for template in templates]


def grouped(digits, separator):
    parts = []
    while len(digits) > 3:
        parts.insert(0, digits[-3:])
        digits = digits[:-3]
    return separator.join([digits, *parts])


def whole_spellings(value):
    sign, digits = "-" * (value < 0), str(abs(value))
    separated = [sign + grouped(digits, separator) for separator in (",", "{,}", "\\,", ",\\!")]
    templates = ("V", "V.0", "\\frac{D}{2}", "V/1", "V\\text{ units}", "(V)")
    return [*separated, *filled(templates, V=value, D=2 * value)]


def fraction_spellings(value):
    top, bottom, sign = abs(value.numerator), value.denominator, "-" * (value < 0)
    templates = [each.replace("3*T", str(3 * top)).replace("3*B", str(3 * bottom)) for each in FRACTIONS]
    return filled(templates, S=sign, T=top, B=bottom, N=-value.numerator)


def mixed_spellings(whole, part):
    top, bottom = part.numerator, part.denominator
    return filled(MIXED, W=whole, T=top, B=bottom, I=whole * bottom + top)


def tuple_spellings(values):
    plain = [str(value) for value in values]
    separators = {"C": ",", "D": ", ", "E": ",\\,", "F": ",\\ ", "G": "\\\\"}
    return filled(TUPLES, **{letter: separator.join(plain) for letter, separator in separators.items()})


def interval_spellings(low, high, closed):
    return filled(CLOSED if closed else HALF_OPEN, L=low, H=high, M=2 * low)


def agree(first, second, index, other_index):
    assert same(first[index], second[other_index])
    assert same(second[other_index], first[index])


def differ(first, second, index, other_index):
    assert not same(first[index], second[other_index])
    assert not same(second[other_index], first[index])


way = st.integers(0, 9)
integers = st.integers(-(10**9), 10**9)
fractions = st.fractions(-1000, 1000, max_denominator=997).filter(lambda value: value.denominator > 1)


@settings(max_examples=300, deadline=None)
@given(integers, integers, way, way, st.sampled_from(WRAPPINGS))
def test_whole_numbers(value, other, one, two, wrapping):
    spellings = whole_spellings(value)
    agree(spellings, [wrapping.format(each) for each in spellings], one, two)
    if value != other:
        differ(spellings, whole_spellings(other), one, two)


@settings(max_examples=300, deadline=None)
@given(fractions, fractions, way, way)
def test_fractions(value, other, one, two):
    agree(fraction_spellings(value), fraction_spellings(value), one, two)
    if value != other:
        differ(fraction_spellings(value), fraction_spellings(other), one, two)


proper = st.fractions(Fraction(1, 99), Fraction(98, 99), max_denominator=99)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 999), proper, st.integers(1, 999), proper, way, way)
def test_mixed_numbers_are_sums_and_never_joined_digits(whole, part, other, rest, one, two):
    spellings = mixed_spellings(whole, part)
    agree(spellings, spellings, one, two)
    joined = Fraction(int(f"{whole}{part.numerator}"), part.denominator)
    # 1 3/10 is 13/10, however it is read.
    if joined != whole + part:
        wrong = fraction_spellings(joined) if joined.denominator > 1 else whole_spellings(int(joined))
        differ(spellings, wrong, one, two)
    if whole + part != other + rest:
        differ(spellings, mixed_spellings(other, rest), one, two)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=4), st.randoms(), way, way)
def test_tuples_count_their_order(values, random, one, two):
    agree(tuple_spellings(values), tuple_spellings(values), one, two)
    other = list(values)
    random.shuffle(other)
    if other != values:
        differ(tuple_spellings(values), tuple_spellings(other), one, two)


@settings(max_examples=300, deadline=None)
@given(st.integers(-99, 99), st.integers(1, 99), st.integers(-99, 99), st.booleans(), way, way)
def test_intervals_count_their_ends(low, length, shift, closed, one, two):
    spellings = interval_spellings(low, low + length, closed)
    agree(spellings, spellings, one, two)
    differ(spellings, interval_spellings(low, low + length, not closed), one, two)
    if shift:
        differ(spellings, interval_spellings(low + shift, low + length + shift, closed), one, two)


@given(st.integers(0, 9999), st.integers(0, 9999), st.sampled_from((" ", "\\ ", "\\;", "\\quad ", "~", "$ $")))
def test_deleting_what_stands_between_never_joins_two_numbers(first, second, between):
    assert not same(f"{first}{between}{second}", f"{first}{second}")


@given(st.text(max_size=200), st.text(min_size=1, max_size=50))
@settings(max_examples=300, deadline=None)
def test_no_text_is_an_error_and_equal_raw_text_is_right(answer, label):
    assert same(answer, label) in (True, False)
    for text in (answer, label):
        list(candidates(text))
        last_boxed(text)
        final_part(text)
        chosen_letter(text)
    if label.strip(" .*_`:\t\n") and label == label.strip():
        assert same(label, label) or not math_answer.without_emphasis(label)


PIECES = (
    r"\frac { } 1 23 ( ) [ ] \{ \} , x + - ^ _ \sqrt \text{cm} \left \right | ! = < \pm \cup \begin{pmatrix} "
    r"\end{pmatrix} & \\ % $ \$ \circ \infty \log \overline : / . '"
)
LATEX = st.lists(st.sampled_from([*PIECES.split(), " "]), max_size=14).map("".join)


@settings(max_examples=500, deadline=None)
@given(LATEX, LATEX)
def test_broken_latex_is_read_or_refused(first, second):
    for text in (first, second):
        try:
            list(readings(text))
        except (Unreadable, NoAnswer):
            continue
    assert same(first, second) == same(first, second)


PATHOLOGICAL = {
    "digits": "7" * 5000,
    "decimals": "0." + "3" * 3000,
    "tower": "9^{9^{9^{9^9}}}",
    "tower in a fraction": r"\dfrac{5^{\left(5^{\left(5^{5^5}\right)} - 4\right)} - 5}{16}",
    "power": "10^{10^{10}}",
    "factorial": "1000000!",
    "factorial of a power": "(10^{7})!",
    "binomial": r"\binom{10^{9}}{5 \cdot 10^{8}}",
    "braces": "{" * 10000 + "5" + "}" * 10000,
    "parentheses": "(" * 3000 + "1" + ")" * 3000,
    "fractions": r"\frac{1}{" * 800 + "2" + "}" * 800,
    "roots": r"\sqrt{" * 800 + "2" + "}" * 800,
    "short sum": "+".join(["x"] * 450),
    "short signs": "-" * 900 + "1",
    "sum": "+".join(["x"] * 20000),
    "numbers": ",".join(map(str, range(20000))),
    "exponent": "1e999999999",
    "signs": "-" * 100000 + "1",
    "dollars": "$" * 200000,
    "escapes": "\\" * 9999,
    "sines": r"\sin(" * 300 + "1" + ")" * 300,
    "NUL": "\x00\x01\ud800 12",
}


@pytest.mark.parametrize("kind", PATHOLOGICAL)
@pytest.mark.parametrize("wrapping", ["\\boxed{{{}}}", "${}$", "the answer is {} and"])
@pytest.mark.parametrize("label", ["14", "x^2+1"])
def test_pathological_answers_are_wrong_within_a_second(kind, wrapping, label):
    response = wrapping.format(PATHOLOGICAL[kind])
    # The first expression loads the library that compares them.
    assert math_answer.math(Sample(0, 0, "?", [1], label="(x+1)^2", response="$x^2+2x+1$")) == 1.0
    started = time.thread_time()
    assert math_answer.math(Sample(0, 0, "?", [1], label=label, response=response)) == 0.0
    assert time.thread_time() - started < patience.SCALE


@pytest.mark.parametrize(
    "answer", [r"\begin{pmatrix}\pm1\\2\end{pmatrix}", r"(\sin^{-1} x, \pm 2)", "f'(x)", r"\max(1, 2)"]
)
@pytest.mark.parametrize("response", ["\\boxed{{{}}}", "the answer is {}", "{}"])
def test_what_vime_does_not_read_is_never_an_error(answer, response):
    assert math_answer.math(Sample(0, 0, "?", [1], label="14", response=response.format(answer))) == 0.0


def test_boxes_that_never_close_are_looked_through_once():
    started = time.process_time()
    assert last_boxed("\\boxed{" * 50000) is None
    assert last_boxed("\\boxed{" * 50000 + "5}") == "5"
    assert time.process_time() - started < 1


def test_cut_off_thinking_gives_credit_where_the_row_asks_for_it():
    cut = Sample(0, 0, "?", [1], label="12", response="<think>so \\boxed{12}")
    asked = Sample(0, 0, "?", [1], label="12", response="<think>so \\boxed{12}", metadata={math_answer.CUT_OFF: True})
    assert [function(each) for function in (math_answer.math, math_answer.deepscaler) for each in (cut, asked)] == [
        0.0, 1.0, 0.0, 1.0,
    ]  # fmt: skip


def test_a_choice_that_is_written_out_counts_as_its_letter():
    choices = ["4 meters", "5 meters"]
    assert chosen_letter("\\boxed{\\text{5 meters}}", choices) == "B"
    assert chosen_letter("The answer is 5 meters.", choices) == "B"
    assert chosen_letter("\\boxed{6 meters}", choices) is None
