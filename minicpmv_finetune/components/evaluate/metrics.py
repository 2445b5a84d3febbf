"""How an answer is scored against the expected ones: each metric as it was published.

A metric is a plain function of an answer and the sample's expected answers. Its docstring says which normalization
the publication prescribes; none is added, so a figure can be laid beside the literature's. The score of a data set
is the mean of its samples' scores, weighted by the length of the reference where the publication pools errors (CER,
WER).

`METRICS_VERSION` is logged with every figure and raised whenever a definition here changes a score.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import LCSseq, Levenshtein

from minicpmv_finetune.data.samples import Sample
from minicpmv_finetune.errors import UserError

METRICS_VERSION = "1"


@dataclass(frozen=True)
class Metric:
    """A way to score, with what comparing two models needs to know about it.

    Attributes:
        name: as users write it.
        score: of an answer, given the expected answers; in [0, 1], for error rates in [0, ∞).
        right_at: a score from which on (for error rates: down to which) an answer counts as right.
        lower_is_better: whether it counts errors.
        weight: of a sample in the data set's score, from its expected answers.
        refuses: why the metric is undefined for these expected answers, or None.
    """

    name: str
    score: Callable[[str, Sequence[str]], float]
    right_at: float = 1.0
    lower_is_better: bool = False
    weight: Callable[[Sequence[str]], float] = lambda expected: 1.0
    refuses: Callable[[Sequence[str]], str | None] = lambda expected: None

    def is_right(self, score: float) -> bool:
        """Whether a sample with this score counts as answered."""
        return score <= self.right_at if self.lower_is_better else score >= self.right_at


def metric_named(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METRICS:
        raise UserError(f"metric: {name!r} is none of {', '.join(METRICS)}; choose one of these.")
    return METRICS[name]


def expected_answers(sample: Sample) -> tuple[str, ...]:
    """The accepted answers: those the data lists, or else the last turn."""
    return sample.answers or (sample.turns[-1].text,)


def metric_of(sample: Sample, default: str) -> Metric:
    """The metric that scores a sample: its own, or the set's.

    Raises:
        UserError: it does not exist, or is undefined for the sample's expected answers.
    """
    try:
        metric = metric_named(sample.metric or default)
    except UserError as error:
        raise UserError(f"{sample.source}, sample {sample.id}: {error}") from None
    if why := metric.refuses(expected_answers(sample)):
        raise UserError(f"{sample.source}, sample {sample.id}: {metric.name} {why}")
    return metric


def exact_match(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer equals an expected one, outer white space aside; HELM's `exact_match` (Liang et al. 2022)."""
    return float(any(answer.strip() == text.strip() for text in expected))


def anls(answer: str, expected: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity, of one sample (Biten et al., ICCV 2019, eq. 1; threshold τ = 0.5).

    The best over the expected answers of 1 - NL, where NL is the edit distance over the longer length; 0 where
    NL reaches τ. As in the DocVQA challenge, case and runs of white space do not count.
    """

    def folded(text: str) -> str:
        return " ".join(text.lower().split())

    distance = min(Levenshtein.normalized_distance(folded(answer), folded(text)) for text in expected)
    return 1 - distance if distance < 0.5 else 0.0


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """VQA accuracy (Antol et al., ICCV 2015): the mean over annotators of min(1, agreeing others / 3).

    Leaving one annotator out needs several of them: with one expected answer the score would be 0 by definition, so
    that is refused. Normalized as in the published evaluation: lower case, punctuation, articles, number
    words and missing apostrophes. (It skips this when all annotators agree word for word; here it always
    happens, so that "A cat." matches ten times "cat".)
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

    Numbers, also as per cent, may be off by 5 % of the expected one; everything else, and an expected 0, must be
    equal but for case.
    """

    def agrees(text: str) -> bool:
        given, wanted = _number(answer), _number(text)
        if given is not None and wanted:
            # Exactly 5 % off counts, though neither 0.095 nor 0.1 is a binary fraction.
            return abs(given - wanted) <= 0.05 * abs(wanted) * (1 + 1e-9)
        return answer.strip().lower() == text.strip().lower()

    return float(any(agrees(text) for text in expected))


def contains(answer: str, expected: Sequence[str]) -> float:
    """1 if an expected answer stands anywhere in the answer; OCRBench (Liu et al. 2023).

    As there: lower case, line breaks as spaces.
    """

    def folded(text: str) -> str:
        return text.lower().strip().replace("\n", " ")

    return float(any(folded(text) in folded(answer) for text in expected))


def token_f1(answer: str, expected: Sequence[str]) -> float:
    """Overlap of words as F1, the best over the expected answers; SQuAD (Rajpurkar et al. 2016).

    Normalized as there: lower case, no punctuation, no articles. Where either side has no word left, 1 if both
    have none (SQuAD 2.0).
    """

    def words(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    given = words(answer)
    return max(_f1(sum((Counter(given) & Counter(wanted)).values()), given, wanted) for wanted in map(words, expected))


def cer(answer: str, expected: Sequence[str]) -> float:
    """Character error rate: edits over the reference's characters; over 1 when the answer is far too long.

    Outer white space aside nothing is normalized. The set's rate pools edits and lengths (weight: the length).
    """
    reference = expected[0].strip()
    return Levenshtein.distance(answer.strip(), reference) / len(reference)


def wer(answer: str, expected: Sequence[str]) -> float:
    """Word error rate: edits of white-space separated words over the reference's words.

    Case and punctuation count. The set's rate pools edits and lengths (weight: the number of words).
    """
    reference = expected[0].split()
    return Levenshtein.distance(answer.split(), reference) / len(reference)


def rouge_l(answer: str, expected: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, the best over the expected answers.

    β is 1 and words are lower-case runs of letters and digits without stemming, as in Google's `rouge-score`, which
    knows ASCII alone; here each Chinese or Japanese character is a word too, since those scripts write no spaces.
    """
    given = _WORD.findall(answer.lower())
    return max(
        _f1(LCSseq.similarity(given, wanted), given, wanted) if wanted else 0.0
        for wanted in (_WORD.findall(text.lower()) for text in expected)
    )


def multiple_choice(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer names the expected option's letter; the rule-based match of MMBench and MMMU (2023).

    The letter is, in this order: the whole answer ("b", "(B)"), its head ("B. a cat", "B: a cat"), what follows "answer
    is" or "option", or the only letter in brackets.
    """
    option = chosen_option(answer)
    return float(option is not None and any(option == chosen_option(text) for text in expected))


def chosen_option(text: str) -> str | None:
    """The letter of the option that a text chooses, or None."""
    for pattern in _OPTION:
        if found := set(pattern.findall(text.strip())):
            return found.pop().upper() if len(found) == 1 else None
    return None


def json_fields(answer: str, expected: Sequence[str]) -> float:
    """JSON accuracy: 1 minus differing fields over expected fields, at least 0; as in OmniAI's OCR benchmark (2025).

    A field is a leaf, under its path. Missing, wrong and invented ones differ. A code fence around the answer is
    allowed; what is no JSON scores 0.
    """
    wanted = dict(_leaves(json.loads(expected[0])))
    try:
        given = dict(_leaves(json.loads(_FENCE.sub(r"\1", answer.strip()))))
    except (ValueError, RecursionError):
        return 0.0
    # The JSON text tells true from 1, which Python's == does not.
    differing = sum(
        path not in given or path not in wanted or json.dumps(given[path]) != json.dumps(wanted[path])
        for path in given.keys() | wanted.keys()
    )
    return max(0.0, 1 - differing / len(wanted))


_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿]|[^\W_぀-ヿ㐀-䶿一-鿿]+")
_FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*```$", re.DOTALL)
_OPTION = (
    re.compile(r"^\W*([A-Za-z])\W*$"),
    re.compile(r"^([A-Z])[).:](?=\s|$)"),
    re.compile(r"(?i:\b(?:answer|choice)(?:\s+is|:)|\boption)\s*[(\[*]*([A-Z])\b"),
    re.compile(r"[(\[]([A-Z])[)\]]"),
)

# The published evaluation's words: a contraction is restored from any spelling with apostrophes missing.
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
        # Beside a space a mark is dropped; between letters it parts two words.
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
    """A finite number, per cent as a fraction."""
    text = text.strip()
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _f1(common: int, given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(not given and not wanted)
    return 2 * common / (len(given) + len(wanted))


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """Each leaf of a JSON document with its path; an empty object or array is a leaf."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    return [(path, value)]


def _refuse_single(expected: Sequence[str]) -> str | None:
    if len(expected) < 2:
        return "leaves one annotator out and is 0 by definition with one answer; list several `answers`, or use anls."
    return None


def _refuse_several(expected: Sequence[str]) -> str | None:
    if len(expected) != 1 or not expected[0].strip():
        return f"compares with one reference, here are {len(expected)}; give one answer, or use anls."
    return None


def _refuse_without_option(expected: Sequence[str]) -> str | None:
    nameless = next((text for text in expected if chosen_option(text) is None), None)
    return None if nameless is None else f"finds no option's letter in the expected answer {nameless!r}; begin with it."


def _refuse_without_json(expected: Sequence[str]) -> str | None:
    try:
        for text in expected:
            json.loads(text)
    except ValueError as error:
        return f"cannot read the expected answer as JSON ({error}); mend it."
    return _refuse_several(expected)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match),
        Metric("anls", anls, right_at=0.5),
        Metric("vqa_accuracy", vqa_accuracy, right_at=0.5, refuses=_refuse_single),
        Metric("relaxed_accuracy", relaxed_accuracy),
        Metric("contains", contains),
        Metric("token_f1", token_f1, right_at=0.5),
        Metric(
            "cer",
            cer,
            right_at=0.0,
            lower_is_better=True,
            weight=lambda expected: len(expected[0].strip()),
            refuses=_refuse_several,
        ),
        Metric(
            "wer",
            wer,
            right_at=0.0,
            lower_is_better=True,
            weight=lambda expected: len(expected[0].split()),
            refuses=_refuse_several,
        ),
        Metric("rouge_l", rouge_l, right_at=0.5),
        Metric("multiple_choice", multiple_choice, refuses=_refuse_without_option),
        Metric("json_fields", json_fields, refuses=_refuse_without_json),
    )
}
