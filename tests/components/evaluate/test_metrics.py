"""Each metric compared with a simple implementation of its published definition, written without the project's code."""

import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minicpmv_finetune.components.evaluate.metrics import (
    METRICS,
    anls,
    cer,
    check_metrics,
    chosen_option,
    contains,
    exact_match,
    expected_answers,
    json_fields,
    metric_named,
    metric_of,
    multiple_choice,
    relaxed_accuracy,
    rouge_l,
    teds,
    token_f1,
    vqa_accuracy,
    wer,
)
from minicpmv_finetune.data.samples import Sample, Turn
from minicpmv_finetune.errors import UserError

WORDS = st.lists(st.sampled_from(["the", "cat", "Cat", "sat", "on", "a", "mat.", "7", "two"]), max_size=7).map(" ".join)
SOME_WORDS = WORDS.filter(bool)
SHORT = st.text("abAB ", max_size=8)


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """The algorithm of Wagner and Fischer 1974, for characters or words."""
    table = [list(range(len(second) + 1))]
    for row, left in enumerate(first, start=1):
        table.append([row])
        for column, right in enumerate(second, start=1):
            change = table[row - 1][column - 1] + (left != right)
            table[row].append(min(change, table[row - 1][column] + 1, table[row][column - 1] + 1))
    return table[-1][-1]


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Try all subsequences of the shorter list, from long to short."""
    short, long = sorted((a, b), key=len)
    for size in range(len(short), 0, -1):
        for chosen in combinations(short, size):
            rest = iter(long)
            if all(word in rest for word in chosen):
                return size
    return 0


@given(SHORT, st.lists(SHORT, min_size=1, max_size=3))
def test_anls_equals_its_published_definition(answer: str, expected: list[str]) -> None:
    best = 0.0
    for text in expected:
        one, other = " ".join(answer.lower().split()), " ".join(text.lower().split())
        longest = max(len(one), len(other))
        distance = edit_distance(one, other) / longest if longest else 0.0
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    assert anls(answer, expected) == pytest.approx(best)


def test_anls_is_zero_when_half_of_the_characters_differ() -> None:
    assert anls("abcd", ["abxx"]) == 0
    assert anls("abcd", ["abcx"]) == 0.75


@given(WORDS, SOME_WORDS)
def test_error_rates_are_edit_distances_over_lengths(answer: str, reference: str) -> None:
    assert cer(answer, [reference]) == pytest.approx(edit_distance(answer, reference) / len(reference))
    words = reference.split()
    assert wer(answer, [reference]) == pytest.approx(edit_distance(answer.split(), words) / len(words))


def test_samples_of_error_rates_are_weighted_by_length() -> None:
    for name, lengths in {"cer": (2, 8), "wer": (1, 2)}.items():
        assert tuple(METRICS[name].weight([text]) for text in (" ab", "abc defg")) == lengths


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"cer", "wer"}))
def test_samples_of_other_metrics_have_equal_weights(name: str) -> None:
    assert {METRICS[name].weight([text]) for text in ("", "ab", "abc defg")} == {1}


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        *((name, 0.5, 0.49) for name in ("anls", "vqa_accuracy", "token_f1", "rouge_l")),
        *(
            (name, 1, 0.99)
            for name in ("exact_match", "relaxed_accuracy", "contains", "multiple_choice", "json_fields", "teds")
        ),
        *((name, 0, 0.01) for name in ("cer", "wer")),
    ],
)
def test_each_metric_has_its_own_score_of_a_right_answer(name: str, right: float, wrong: float) -> None:
    assert METRICS[name].is_right(right)
    assert not METRICS[name].is_right(wrong)


@pytest.mark.parametrize("score", [exact_match, anls, relaxed_accuracy, contains, token_f1, rouge_l, multiple_choice])
def test_the_best_of_several_expected_answers_counts(score: Callable[[str, list[str]], float]) -> None:
    others = ["D. something else", "A. far away"]
    for place in range(3):
        expected = [*others[:place], "B", *others[place:]]
        assert score("B", expected) == 1
    assert score("C", others) == 0


@given(WORDS, SOME_WORDS)
def test_rouge_l_equals_its_published_definition(answer: str, reference: str) -> None:
    given_words, right_words = (re.sub(r"[^a-z0-9]+", " ", text.lower()).split() for text in (answer, reference))
    common = longest_common_subsequence(given_words, right_words)
    precision, recall = common / max(len(given_words), 1), common / len(right_words)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(answer, [reference]) == pytest.approx(expected)


def test_rouge_l_supports_scripts_without_spaces() -> None:
    assert rouge_l("数字是三", ["数字是五"]) == 0.75


@pytest.mark.parametrize(("answer", "expected"), [("", "a word"), ("a word", "!"), ("!", "!"), ("", "")])
def test_rouge_l_without_words_is_zero(answer: str, expected: str) -> None:
    assert rouge_l(answer, [expected]) == 0


@given(WORDS, st.lists(SOME_WORDS, min_size=1, max_size=3))
def test_token_f1_equals_its_published_definition(answer: str, expected: list[str]) -> None:
    def words(text: str) -> list[str]:
        kept = "".join(" " if c.isspace() else c for c in text.lower() if c not in string.punctuation)
        return [word for word in kept.split() if word not in {"a", "an", "the"}]

    best = 0.0
    for text in expected:
        given_words, right_words = words(answer), words(text)
        left, common = list(right_words), 0
        for word in given_words:
            if word in left:
                left.remove(word)
                common += 1
        if not given_words or not right_words:
            f1 = float(given_words == right_words)
        else:
            precision, recall = common / len(given_words), common / len(right_words)
            f1 = 2 * precision * recall / (precision + recall) if common else 0.0
        best = max(best, f1)
    assert token_f1(answer, expected) == pytest.approx(best)


@given(st.sampled_from(["yes", "no", "maybe"]), st.lists(st.sampled_from(["yes", "no"]), min_size=2, max_size=10))
def test_vqa_accuracy_leaves_each_annotator_out(answer: str, people: list[str]) -> None:
    scores = []
    for left_out in range(len(people)):
        others = people[:left_out] + people[left_out + 1 :]
        scores.append(min(1.0, others.count(answer) / 3))
    assert vqa_accuracy(answer, people) == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("answer", "person"),
    [
        ("A cat.", "cat"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("couldn'tve", "couldnt've"),
        ("red, white", "red white"),
        ("black/white", "black white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("the\nlarge dog", "large dog"),
    ],
)
def test_vqa_accuracy_normalizes_as_published(answer: str, person: str) -> None:
    assert vqa_accuracy(answer, [person] * 10) == 1


def test_vqa_accuracy_treats_number_words_as_digits() -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for number, word in enumerate(words):
        assert vqa_accuracy(word, [str(number)] * 10) == 1


@pytest.mark.parametrize(("answer", "person"), [("its", "it's"), ("were", "we're"), ("3.5", "35"), ("cat", "cats")])
def test_vqa_accuracy_keeps_different_words_apart(answer: str, person: str) -> None:
    assert vqa_accuracy(answer, [person] * 10) == 0


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6).filter(lambda number: abs(number) > 1e-9))
def test_relaxed_accuracy_of_numbers(given_number: float, right_number: float) -> None:
    # Computed in decimal fractions, because answers are decimal fractions.
    given_decimal, right_decimal = Decimal(repr(given_number)), Decimal(repr(right_number))
    error = abs(given_decimal - right_decimal) / abs(right_decimal)
    assume(error <= Decimal("0.05") or error > Decimal("0.0500001"))
    expected = float(error <= Decimal("0.05"))
    assert relaxed_accuracy(repr(given_number), [repr(right_number)]) == expected


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("94.9", "100", 0),
        ("-95", "-100", 1),
        ("9.5%", "0.1", 1),
        ("10.5%", "0.1", 1),
        ("9.4%", "0.1", 0),
        ("10.49%", "0.1", 1),
        ("10.6%", "0.1", 0),
        ("50%", "50 %", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("France", "france ", 1),
        ("nan", "NaN", 1),
        ("inf", "7", 0),
        ("about 100", "100", 0),
    ],
)
def test_relaxed_accuracy_of_percentages_and_texts(answer: str, expected: str, score: float) -> None:
    assert relaxed_accuracy(answer, [expected]) == score


def test_exact_match_ignores_only_white_space_at_the_ends() -> None:
    assert exact_match(" The digit is 3.\n", ["A 3.", "The digit is 3."]) == 1
    assert exact_match("the digit is 3.", ["The digit is 3."]) == 0


def test_contains_ignores_case_and_line_breaks() -> None:
    assert contains("It says\nSTOP here", ["go", "says stop"]) == 1
    assert contains("It says so", ["stop"]) == 0


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("B. A cat", "B"),
        ("B: a cat", "B"),
        ("(B) a cat", "B"),
        ("The answer is C.", "C"),
        ("Answer: **D**", "D"),
        ("I choose option A because it fits", "A"),
        ("It must be (B), I think", "B"),
        ("(A) or (B)", None),
        ("A, B", None),
        ("A cat sits there", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_chosen_option_is_found_in_an_answer(text: str, option: str | None) -> None:
    assert chosen_option(text) == option
    assert multiple_choice(text, ["B. a cat"]) == (option == "B")


CHOICES_OF_B = r"""
B|b|(B)|B.|(b)|B、|B，|Ｂ|（Ｂ）|**B**|**B.** A cat|`B`|$B$|\boxed{B}|The answer is $\boxed{B}$.|\(B\)|【B】|"B"
B) a cat|B.猫|B、一只猫|B，一只猫|B 一只猫|B：猫|B; a cat|B, a cat|B - a cat|b) a cat|B↵The cat sits.
B↵↵It is no dog: A dog is larger.
Answer: B|answer: b|Answer：B|Answer: (B) a cat|ANSWER: B|The answer is: B|The correct answer is: B|The answer is (B).
The correct option is B|The right choice is B.|The answer is option B.|The answer is **B. A cat**|The answer is B, a cat
Option B|option b|Option (B)|Option B: a cat|I choose B because it fits|I would go with B.|I'd pick B.
My answer is "B"|答案是B|答案：B|答案为B|正确答案是：B。|答案选B|选B。|故选：B|我选B|选择B|选项B
B選項|B選項正確|選擇B|答案為B|我選B|Answer – B|It must be B|B is the answer
B选项|B选项正确|B是正确的|因此，答案是选项B。
B is correct|B is the correct answer.|It is B.|It's B|The answer to this question is B because of the ears.|正解はB
B a cat|B the cat|I think B|I think B.|I think it is B|I think that B is right|I believe B because it fits
I guess option B|<answer>B</answer>|<answer> B. A cat </answer>|<answer>b</answer>|<ANSWER>B</ANSWER>
The ears are round.↵<answer>B</answer>|「答案」B|【答案】B|『答案』：B|「答案」是B|[答案]B。
Die Antwort ist B.|La respuesta correcta es B|Réponse : B|Ответ: B|정답은 B입니다.|정답은 B|답은 (B)이다|Đáp án là B
正解はBです。|คำตอบคือ B|الإجابة هي B|A. dog↵B. cat↵Answer: B|Let me think.↵B
"""
NO_CHOICES = r"""
A dog|a dog|A cat sits there|It must be A dog|不選B|Answer – A dog
I think so|I, for one, do not know|I'm sure|A or B|A and B|A/B|A、B|A和B|Both A and B
A, B, C|A↵B|The answer is A or B|The answer is A or B is right|Answer: A, B|答案是A和B|Answer: A dog|It is A dog
I choose A dog|The dog is a|不选B|The answer is not B|U.S. flag|J.P. Morgan|AB|Answer: AB|T-shirt|B's
A. dog↵B. cat↵C. cow|答案是猫|A股|C语言|7|C major|B flat
X marks the spot|I think A dog|I think so|I think I know
I think A or B|I don't think B|I do not think B|I think B is wrong
I think B isn't right|I think T-shirt|I think U.S. flag
<answer>A dog</answer>|<answer>A or B</answer>|<answer></answer>|<answer>cat</answer>
「答案」猫|「答案」A或B|【答案】|「答案」A dog
"""


def listed(examples: str) -> list[str]:
    return [text.replace("↵", "\n") for line in examples.strip().splitlines() for text in line.split("|")]


def test_a_choice_is_found_in_every_common_form() -> None:
    assert [text for text in listed(CHOICES_OF_B) if chosen_option(text) != "B"] == []
    assert [text for text in listed(CHOICES_OF_B) if multiple_choice(text, ["B"]) != 1] == []
    # The letter A, which is also an article, is found in the same forms.
    with_a = [
        text.replace("B", "A").replace("Ｂ", "Ａ")
        for text in listed(CHOICES_OF_B)
        if "b" not in text and "A" not in text
    ]
    assert [text for text in with_a if chosen_option(text) != "A"] == []


def test_articles_words_and_lists_of_letters_are_no_choice() -> None:
    assert [text for text in listed(NO_CHOICES) if chosen_option(text) is not None] == []


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"name": "Li", "items": [{"price": 3}, {"price": 4}], "paid": true}', 1),
        ('```json\n{"items": [{"price": 3}, {"price": 4}], "paid": true, "name": "Li"}\n```', 1),
        ('{"name": "Lu", "items": [{"price": 3}, {"price": 4}], "paid": true}', 0.75),
        ('{"name": "Li", "items": [{"price": 3}], "paid": true}', 0.75),
        ('{"name": "Li", "items": [{"price": 3}, {"price": 4}], "paid": 1}', 0.75),
        ('{"name": "Li", "items": [{"price": 3.0}, {"price": 4e0}], "paid": true}', 1),
        ('{"name": "Li", "items": [{"price": "3"}, {"price": 4}], "paid": true}', 0.75),
        ('{"name": "Li", "items": [{"price": 3}, {"price": 4}], "paid": true, "extra": 1}', 0.75),
        ("{}", 0),
        ("no JSON", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_fields_counts_differing_fields(answer: str, score: float) -> None:
    assert json_fields(answer, ['{"name": "Li", "items": [{"price": 3}, {"price": 4}], "paid": true}']) == score


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1", "1.0", True),
        ("0", "-0.0", True),
        ("1", "true", False),
        ("0", "false", False),
        ("1", '"1"', False),
        ("null", "false", False),
        ("null", "0", False),
        ("{}", "[]", False),
        ("NaN", "NaN", True),
        ("NaN", "1", False),
        ("9007199254740993", "9007199254740992.0", False),
    ],
)
def test_json_fields_compares_values(one: str, other: str, same: bool) -> None:
    assert json_fields(one, [other]) == json_fields(other, [one]) == same


def test_a_table_that_is_nested_too_deeply_scores_zero() -> None:
    score = teds("<table><tr><td>" * 5_000, ["<table><tr><td>3</td></tr></table>"])
    assert (type(score), score) == (float, 0.0)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_the_expected_answer_itself_is_right(name: str) -> None:
    expected = {
        "json_fields": ['{"digit": 3}'],
        "multiple_choice": ["C"],
        "teds": ["<table><tr><td>3</td></tr></table>"],
        "vqa_accuracy": ["cat"] * 10,
    }.get(name, ["The digit is 3."])
    metric = metric_named(name)
    assert metric.find_problem(expected) is None
    assert metric.is_right(metric.score(expected[0], expected))
    assert not metric.is_right(metric.score("something else entirely, and long", expected))


def sample(**fields: object) -> Sample:
    turns = (Turn(role="user", parts=("?",)), Turn(role="assistant", parts=("cat",)))
    return Sample.model_validate({"id": "s", "pictures": (), "turns": turns, "source": "data.json", **fields})


def test_expected_answers_are_those_listed_or_the_last_turn() -> None:
    assert expected_answers(sample()) == ("cat",)
    assert expected_answers(sample(answers=("cat", "dog"))) == ("cat", "dog")
    more = (Turn(role="user", parts=("And there?",)), Turn(role="assistant", parts=("A dog.",)))
    assert expected_answers(sample(turns=(*sample().turns, *more))) == ("A dog.",)
    assert metric_of(sample(metric="anls"), "cer").name == "anls"
    assert metric_of(sample(answers=("cat", "dog")), "vqa_accuracy").name == "vqa_accuracy"
    assert metric_of(sample(), "cer").name == "cer"


@pytest.mark.parametrize(
    ("fields", "metric", "words"),
    [
        ({}, "blue", "'blue' is none of exact_match"),
        ({}, "vqa_accuracy", "0 by definition"),
        ({"answers": ("a", "b")}, "wer", "there are 2"),
        ({}, "multiple_choice", "'cat'"),
        ({}, "json_fields", "as JSON"),
        ({"answers": ("[1]", "[2]")}, "json_fields", "there are 2"),
        ({"answers": ("[" * 100_000,)}, "json_fields", "as JSON"),
        ({"answers": (" ",)}, "cer", "there are 1"),
        ({}, "teds", "no <table>"),
        ({"answers": ("<table></table>", "cat")}, "teds", "no <table>"),
        ({"answers": ("<table></table>", "<table></table>")}, "teds", "there are 2"),
        ({"answers": ("A. cat", "dog")}, "multiple_choice", "'dog'"),
    ],
)
def test_an_error_about_an_undefined_metric_names_the_sample(
    fields: dict[str, object], metric: str, words: str
) -> None:
    with pytest.raises(UserError, match=r"data\.json, sample s: ") as caught:
        metric_of(sample(**fields), metric)
    assert words in str(caught.value)


def test_error_rates_and_scores_are_not_averaged() -> None:
    check_metrics([sample(), sample(metric="anls")], "exact_match")
    check_metrics([sample(), sample(metric="wer")], "cer")
    with pytest.raises(UserError, match="cer, exact_match"):
        check_metrics([sample(), sample(metric="cer")], "exact_match")
