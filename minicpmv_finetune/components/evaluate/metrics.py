"""The metrics that score an answer against the expected answers, each as it was published.

A metric is a plain function of an answer and the sample's expected answers. Its docstring states the normalization
that the publication prescribes; none is added, so scores can be compared with the literature. The score of a data set
is the mean of its samples' scores, weighted by the length of the reference where the publication pools errors (CER,
WER).

`METRICS_VERSION` is logged with every score and is raised whenever a change in this file changes a score.
"""

import json
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import LCSseq, Levenshtein

from minicpmv_finetune.data.samples import Sample
from minicpmv_finetune.errors import UserError

from .teds import find_table, table_similarity

METRICS_VERSION = "2"


@dataclass(frozen=True)
class Metric:
    """A metric, with the properties that the comparison of two models needs.

    Attributes:
        name: Name in options and data.
        score: Function that scores an answer, given the expected answers; in [0, 1], for error rates in [0, ∞).
        right_at: Least score (for error rates: greatest score) of an answer that counts as right.
        lower_is_better: Whether the metric counts errors.
        weight: Function that computes the weight of a sample in the data set's score from its expected answers.
        find_problem: Function that returns why the metric is undefined for these expected answers, or None.
    """

    name: str
    score: Callable[[str, Sequence[str]], float]
    right_at: float = 1.0
    lower_is_better: bool = False
    weight: Callable[[Sequence[str]], float] = lambda expected: 1.0
    find_problem: Callable[[Sequence[str]], str | None] = lambda expected: None

    def is_right(self, score: float) -> bool:
        """Whether an answer with this score counts as right."""
        return score <= self.right_at if self.lower_is_better else score >= self.right_at


def metric_named(name: str) -> Metric:
    """The metric of this name.

    Args:
        name: Name, as in the option `--metric`.

    Raises:
        UserError: There is no such metric.
    """
    if name not in METRICS:
        raise UserError(f"metric: {name!r} is none of {', '.join(METRICS)}; choose one of these.")
    return METRICS[name]


def expected_answers(sample: Sample) -> tuple[str, ...]:
    """The accepted answers: those listed in the data, or else the last turn."""
    return sample.answers or (sample.turns[-1].text,)


def metric_of(sample: Sample, default: str) -> Metric:
    """The metric that scores a sample: the one that the sample names, or else the default.

    Raises:
        UserError: The metric does not exist, or is undefined for the sample's expected answers.
    """
    try:
        metric = metric_named(sample.metric or default)
    except UserError as error:
        raise UserError(f"{sample.source}, sample {sample.id}: {error}") from None
    if problem := metric.find_problem(expected_answers(sample)):
        raise UserError(f"{sample.source}, sample {sample.id}: {metric.name} {problem}")
    return metric


def check_metrics(samples: Sequence[Sample], default_metric: str) -> None:
    """Check before any answer is generated that all samples can be scored.

    Raises:
        UserError: A metric does not exist or is undefined for a sample, or error rates would be averaged with scores.
    """
    metrics = {metric.name: metric for metric in (metric_of(sample, default_metric) for sample in samples)}
    if len({metric.lower_is_better for metric in metrics.values()}) > 1:
        raise UserError(
            f"metric: the samples' metrics {', '.join(sorted(metrics))} mix error rates with scores, and the mean of "
            "both is meaningless; evaluate them separately."
        )


def exact_match(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer equals an expected one except for white space at the ends; HELM (Liang et al. 2022)."""
    return float(any(answer.strip() == text.strip() for text in expected))


def anls(answer: str, expected: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one sample (Biten et al., ICCV 2019, eq. 1; threshold τ = 0.5).

    The best value over the expected answers of 1 - NL, where NL is the edit distance divided by the longer length; 0
    if NL is at least τ. As in the DocVQA challenge, case and the amount of white space are ignored.
    """

    def folded(text: str) -> str:
        return " ".join(text.lower().split())

    distance = min(Levenshtein.normalized_distance(folded(answer), folded(text)) for text in expected)
    return 1 - distance if distance < 0.5 else 0.0


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """VQA accuracy (Antol et al., ICCV 2015): the mean over annotators of min(1, agreeing others / 3).

    Each annotator is left out once, which needs several annotators: with one expected answer the score would be 0 by
    definition, so one expected answer is refused. Normalized as in the published evaluation: lower case, punctuation,
    articles, number words and missing apostrophes. (The published evaluation skips the normalization if all annotators
    agree word for word; here it is always applied, so that "A cat." matches "cat" from ten annotators.)
    """
    given = _vqa_normalized(answer)
    people = [_vqa_normalized(text) for text in expected]
    agreeing = [
        sum(given == other for number, other in enumerate(people) if number != left_out)
        for left_out in range(len(people))
    ]
    return sum(min(1.0, count / 3) for count in agreeing) / len(people)


def relaxed_accuracy(answer: str, expected: Sequence[str]) -> float:
    """Relaxed accuracy (ChartQA, Masry et al. 2022; PlotQA, Methani et al. 2020).

    Numbers, also percentages, may differ from the expected number by 5 % of it; every other answer, and an expected 0,
    must be equal except for case.
    """

    def matches(text: str) -> bool:
        given, right = _number(answer), _number(text)
        if given is not None and right:
            # A difference of exactly 5 % is accepted, although neither 0.095 nor 0.1 is a binary fraction.
            return abs(given - right) <= 0.05 * abs(right) * (1 + 1e-9)
        return answer.strip().lower() == text.strip().lower()

    return float(any(matches(text) for text in expected))


def contains(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer contains an expected one; OCRBench (Liu et al. 2023).

    Normalized as in OCRBench: lower case, line breaks replaced by spaces.
    """

    def folded(text: str) -> str:
        return text.lower().strip().replace("\n", " ")

    return float(any(folded(text) in folded(answer) for text in expected))


def token_f1(answer: str, expected: Sequence[str]) -> float:
    """F1 of the words in common, the best value over the expected answers; SQuAD (Rajpurkar et al. 2016).

    Normalized as in SQuAD: lower case, no punctuation, no articles. If one side has no words left, the score is 1 if
    the other side has none either, else 0 (SQuAD 2.0).
    """

    def words(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    given = words(answer)
    return max(_f1(sum((Counter(given) & Counter(right)).values()), given, right) for right in map(words, expected))


def cer(answer: str, expected: Sequence[str]) -> float:
    """Character error rate: edits divided by the reference's characters; above 1 if the answer is far too long.

    Only white space at the ends is removed. The rate of a data set pools edits and lengths (weight: the length).
    """
    reference = expected[0].strip()
    return Levenshtein.distance(answer.strip(), reference) / len(reference)


def wer(answer: str, expected: Sequence[str]) -> float:
    """Word error rate: edits of words, separated by white space, divided by the reference's words.

    Case and punctuation matter. The rate of a data set pools edits and lengths (weight: the number of words).
    """
    reference = expected[0].split()
    return Levenshtein.distance(answer.split(), reference) / len(reference)


def rouge_l(answer: str, expected: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, the best value over the expected answers.

    β is 1, and words are lower-case sequences of letters and digits without stemming, as in Google's `rouge-score`,
    which supports only ASCII; here each Chinese or Japanese character is also a word, since those scripts have no
    spaces.
    """
    given = _WORD.findall(answer.lower())
    return max(
        _f1(LCSseq.similarity(given, right), given, right) if right else 0.0
        for right in (_WORD.findall(text.lower()) for text in expected)
    )


def multiple_choice(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer names the expected option's letter; the rule-based match of MMBench and MMMU (2023).

    Normalized: full-width characters (Ｂ) and marks of emphasis (**B**). The letter is, in this order: the whole answer
    ("b", "(B)"), its beginning ("B. a cat", "B) a cat", "B a cat", "B、一只猫"), boxed or in an <answer> tag, the
    letter after "answer is", "option", "I think", 答案 or 选, before "is correct", in brackets, or at the end of a
    sentence ("It is B."). Several letters at the first of these places are no choice, and neither is the article of
    "A dog".
    """
    option = chosen_option(answer)
    return float(option is not None and any(option == chosen_option(text) for text in expected))


def chosen_option(text: str) -> str | None:
    """The letter of the option that a text chooses, or None."""
    text = _EMPHASIS.sub("", unicodedata.normalize("NFKC", text)).strip()
    for pattern in _OPTION:
        if found := {match[match.lastindex or 0].upper() for match in pattern.finditer(text)}:
            return found.pop() if len(found) == 1 else None
    return None


def json_fields(answer: str, expected: Sequence[str]) -> float:
    """JSON accuracy: 1 - differing fields / expected fields, at least 0; as in OmniAI's OCR benchmark (2025).

    A field is a leaf of the document, identified by its path. Missing, wrong and additional fields differ; numbers of
    equal value, such as 1 and 1.0, are the same. A code fence around the answer is allowed; an answer that is not JSON
    scores 0.
    """
    right = dict(_leaves(json.loads(expected[0])))
    try:
        given = dict(_leaves(json.loads(_FENCE.sub(r"\1", answer.strip()))))
    except (ValueError, RecursionError):
        return 0.0
    differing = sum(
        path not in given or path not in right or not _is_same_leaf(given[path], right[path])
        for path in given.keys() | right.keys()
    )
    return max(0.0, 1 - differing / len(right))


def teds(answer: str, expected: Sequence[str]) -> float:
    """TEDS (Zhong et al., ECCV 2020): the similarity of two tables in HTML, by structure and content; see `teds.py`.

    The first table of the answer counts, with or without a document around it. As published, nothing is normalized:
    white space, `<b>` and the letters' case differ, and the score of an extremely different table can be below 0.
    """
    try:
        return table_similarity(answer, expected[0])
    except RecursionError:
        return 0.0


_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿]|[^\W_぀-ヿ㐀-䶿一-鿿]+")
_FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*```$", re.DOTALL)

_EMPHASIS = re.compile(r"[*`$]|__|\\(?:text|mathrm|textbf)\b")
# An option's letter: a capital that stands alone, or a small letter with which the text ends.
_LETTER = r"([A-Z]|[a-z](?=\W*(?:$|</)))(?![A-Za-z0-9_]|['’-][A-Za-z]|\.[A-Za-z]\.)"
# Not the article of "A dog" or the pronoun of "I think".
_NO_WORD = r"(?:(?<![AI])|(?![ \t]+(?!(?:as|because|due|for|is|since|was|which)\b)[A-Za-z]))"
# Not the first of several letters: "A or B", "A, B", "A和B"; but "B, a cat".
_NO_LIST = (
    r"(?!\W*\s(?:and|or)\s+\W*[A-Z](?![\w'’])|\W*[/&+、和或与及]\s*\W?[A-Z](?![\w'’])"
    r"|\W*[,\n]\s*(?:(?:and|or)\s+)?\W?[A-Z](?![\w'’]|\s+[a-z]))"
)
# "I think B", but not "I think B is wrong".
_NOT_DENIED = r"(?!\s+(?:is|was)(?:n['’]t|\s+(?:not|wrong|incorrect|false))\b)"
_CHOSEN = rf"[\s\"'(\[{{\\【「]*{_LETTER}{_NO_WORD}{_NO_LIST}{_NOT_DENIED}"
_OPTION = (
    re.compile(r"^\W*([A-Za-z])\W*$"),
    # At the beginning, unless that is an abbreviation (U.S.) or a later line begins with another option.
    re.compile(
        rf"^[\"'(\[【「]*([A-Z]){_NO_LIST}"
        r"(?:\s*[)\]】」:;、。]|\s*\.(?![A-Za-z]\.)|(?<!I)\s*,|\s+[-–—]\s|\s*\n|\s*[选選]?[项項]|\s+(?=[一-鿿]))"
        r"(?![\s\S]*\n\W*[A-Z][.):、])"
    ),
    # "B a cat", also "A a cat", but neither "A cat" nor "C major".
    re.compile(r"^([A-H])\s+(?=(?:a|an|the)\s)"),
    re.compile(r"^\(?([a-z])\)\s"),
    re.compile(r"\\boxed\{\W*([A-Z])\W*\}"),
    re.compile(rf"(?i:<answer>){_CHOSEN}"),
    re.compile(
        r"(?:(?i:\b(?:answer|choice|option|choose|select|pick|go with|it (?:is|(?:must|should|has to) be)|it's)\b"
        r"(?: (?:to|for) [^.:\n]*?)?"
        rf"(?:\s+(?:is|should be|would be|must be|option|choice|letter)\b)*)\s*(?:[:=–—]|-+>?)?{_CHOSEN}"
        rf"|(?<!n['’]t )(?<!not )\b(?:think|believe|guess)\b(?:\s+(?:that|it is|it['’]s|option))*{_CHOSEN}"
        rf"|(?:答案[」』】\])]?|(?<!不)[选選])[应應该該就择擇项項]*[是为為选選]?(?:[选選][项項])?\s*:?{_CHOSEN})"
    ),
    re.compile(
        r"(?<![\w'’.-])(?<!or )(?<!and )([A-Z])\)?\s*(?:is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
        r"|(?:[选選]?[项項])?是?正[确確])"
    ),
    re.compile(r"[(\[【「]([A-Z])[)\]】」]"),
    re.compile(
        r"(?:\b(?:is|ist|es|est|è|é|là|هي|هو)\s+|정?답[은는이]?\s+|:\s*|[は是]\s*|คือ\s*|\w{2}\W*\n)"
        r"[\"'(\[【「]*([A-Z])(?:입니다|이다|です|ครับ|ค่ะ)?\W*$"
    ),
)

# The contractions of the published evaluation, without apostrophes: the answer may lack some or all of them.
_VQA_CONTRACTIONS = frozenset(
    re.findall(
        r"\w+",
        "aint arent cant couldve couldnt couldntve didnt doesnt dont hadnt hadntve hasnt havent hed hedve hes howd "
        "howll hows isnt itd itdve itll maam mightnt mightntve mightve mustnt mustve neednt notve oclock oughtnt "
        "shant shedve shouldve shouldnt shouldntve somebodyd somebodydve somebodyll somebodys someoned someonedve "
        "someonell someones somethingd somethingdve somethingll thats thered theredve therere theres theyd theydve "
        "theyll theyre theyve twas wasnt wedve weve werent whatll whatre whats whatve whens whered wheres whereve "
        "whod whodve wholl whos whove whyll whyre whys wont wouldve wouldnt wouldntve yall yallll yalldve youd youdve "
        "youll youre youve",
    )
)
_VQA_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_VQA_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _vqa_normalized(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    digits_with_comma = re.search(r"\d,\d", text) is not None
    before = text
    for mark in _VQA_PUNCTUATION:
        # A mark next to a space is removed; a mark between letters separates two words.
        drops = f"{mark} " in before or f" {mark}" in before or digits_with_comma
        text = text.replace(mark, "" if drops else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = []
    for word in text.lower().split():
        word = _VQA_NUMBERS.get(word, word)
        if word in {"a", "an", "the"}:
            continue
        bare = word.replace("'", "")
        words.append(bare if bare in _VQA_CONTRACTIONS else word)
    return " ".join(words)


def _number(text: str) -> float | None:
    """The finite number that the text is, a percentage as a fraction; None if it is no number."""
    text = text.strip()
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _f1(common: int, given: Sequence[str], right: Sequence[str]) -> float:
    if not given and not right:
        return 1.0
    return 2 * common / (len(given) + len(right))


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """Each leaf of a JSON document with its path; an empty object or array is a leaf."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    return [(path, value)]


def _is_same_leaf(one: Any, other: Any) -> bool:
    """Whether two leaves have the same value in JSON, where 1 equals 1.0 but not true, and NaN equals itself."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other) or (one != one and other != other)


def _require_several(expected: Sequence[str]) -> str | None:
    if len(expected) < 2:
        return "is 0 by definition with one expected answer; list several `answers`, or use anls."
    return None


def _require_one(expected: Sequence[str]) -> str | None:
    if len(expected) != 1 or not expected[0].strip():
        return (
            f"needs one expected answer that is not empty, but there are {len(expected)}; give one answer, or use anls."
        )
    return None


def _require_option(expected: Sequence[str]) -> str | None:
    without = next((text for text in expected if chosen_option(text) is None), None)
    if without is None:
        return None
    return f"finds no option's letter in the expected answer {without!r}; write the letter at its beginning."


def _require_json(expected: Sequence[str]) -> str | None:
    try:
        for text in expected:
            _leaves(json.loads(text))
    except (ValueError, RecursionError) as error:
        return f"cannot read the expected answer as JSON ({error}); correct it."
    return _require_one(expected)


def _require_table(expected: Sequence[str]) -> str | None:
    if not all(map(find_table, expected)):
        return "finds no <table> in the expected answer; write the table in HTML, or use another metric."
    return _require_one(expected)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match),
        Metric("anls", anls, right_at=0.5),
        Metric("vqa_accuracy", vqa_accuracy, right_at=0.5, find_problem=_require_several),
        Metric("relaxed_accuracy", relaxed_accuracy),
        Metric("contains", contains),
        Metric("token_f1", token_f1, right_at=0.5),
        Metric(
            "cer",
            cer,
            right_at=0.0,
            lower_is_better=True,
            weight=lambda expected: len(expected[0].strip()),
            find_problem=_require_one,
        ),
        Metric(
            "wer",
            wer,
            right_at=0.0,
            lower_is_better=True,
            weight=lambda expected: len(expected[0].split()),
            find_problem=_require_one,
        ),
        Metric("rouge_l", rouge_l, right_at=0.5),
        Metric("multiple_choice", multiple_choice, find_problem=_require_option),
        Metric("json_fields", json_fields, find_problem=_require_json),
        Metric("teds", teds, find_problem=_require_table),
    )
}
