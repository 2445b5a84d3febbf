"""From a sample to token ids and labels, by the checkpoint's own chat template.

The chat template renders the conversation as text, each image mark is replaced by the image's tokens, and the whole
text is tokenized once. The ids equal those of the model's processor at serving time (tested for each generation), so
training sees what serving sends. Of the equal tokens of a slice only one is in the text, and its id is repeated: a
tokenizer takes a microsecond for each, as long as for everything else where a sample shows a large image.

Answers are found in the rendered text: each is between the assistant's header and the end of the turn. Text that
contains a token of the format itself is refused, so no user can write such a header. The character offsets of the
tokenizer then give the supervised tokens. The prompt for an answer is the beginning of the conversation's ids, and each
token of the answer is supervised (tested with texts of many scripts). For that, line breaks at the beginning of an
answer are removed, because tokenizers join them with the line break of the header.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.data.samples import Sample, SampleError, Turn, open_image
from minicpmv_finetune.errors import UserError, first_line

from .generations import Generation, detect_generation, read_image_settings, read_slicing_config, read_tokens_per_slice
from .model_input import IGNORED_LABEL
from .slicing import SlicePlan, SlicingConfig, cut_slices, plan_slices

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# Beside the generation's own: the marks of images and videos, and the start of a turn.
_STRUCTURAL_TOKENS = (
    *("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<unk>", "<s>", "</s>"),
)
_THINK, _END_THINK = "<think>", "</think>"
_LEADING_LINE_BREAKS = re.compile(r"^\s*[\r\n]+")


@dataclass(frozen=True)
class EncodedConversation:
    """A tokenized conversation.

    Attributes:
        input_ids: Token ids.
        labels: Ids of the supervised tokens, -100 at all other positions, not shifted.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoder:
    """Converts samples to token ids for one checkpoint.

    Attributes:
        generation: Generation of the checkpoint.
        tokenizer: Tokenizer of the checkpoint, with its chat template.
        slicing: Settings that decide how images are sliced.
        use_image_id: Whether the number of each image is written before the image's tokens.
        tokens_per_slice: Number of tokens of each slice; None if it depends on the slice's size.
        patches_per_token: Number of patches of each token, if the number of tokens depends on the slice's size.
    """

    generation: Generation
    tokenizer: "PreTrainedTokenizerBase"
    slicing: SlicingConfig
    use_image_id: bool
    tokens_per_slice: int | None
    patches_per_token: int

    @classmethod
    def from_checkpoint(cls, checkpoint: Path, max_slice_nums: int | None = None) -> "Encoder":
        """Read a checkpoint folder's tokenizer and processor settings.

        Args:
            checkpoint: Local folder of the checkpoint.
            max_slice_nums: Largest number of slices; None keeps the processor's number.

        Raises:
            UserError: A file is missing or damaged, or the tokenizer lacks special tokens of the generation.
        """
        # What AutoTokenizer would make for every generation (tested); that class imports torch and torchvision, six
        # times as long as everything else here.
        from transformers import PreTrainedTokenizerFast

        generation = detect_generation(checkpoint)
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{checkpoint}: the tokenizer cannot be loaded ({first_line(error)}); the folder needs the base "
                "model's tokenizer files."
            ) from error
        settings = read_image_settings(checkpoint)
        encoder = cls(
            generation=generation,
            tokenizer=tokenizer,
            slicing=read_slicing_config(checkpoint).with_max_slices(max_slice_nums),
            use_image_id=settings.get("use_image_id", True),
            tokens_per_slice=read_tokens_per_slice(checkpoint),
            patches_per_token=4 if settings.get("downsample_mode", "16x") == "4x" else 16,
        )
        encoder.check_special_tokens(checkpoint)
        return encoder

    def check_special_tokens(self, checkpoint: Path) -> None:
        """Raise an error if the tokenizer would split a special token into ordinary tokens.

        Args:
            checkpoint: Folder of the checkpoint, for the message.

        Raises:
            UserError: The tokenizer lacks special tokens of the generation.
        """
        needed = ["<image>", "</image>", "<slice>", "</slice>", self.generation.image_token]
        needed += [self.generation.end_of_turn]
        vocabulary = self.tokenizer.get_vocab()
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise UserError(
                f"{checkpoint}: the tokenizer lacks the special tokens {', '.join(missing)}; use the tokenizer that "
                f"belongs to MiniCPM-V {self.generation.version}."
            )

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids of the tokens that end generation: the end of the turn and the end of the text."""
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[token] for token in self.generation.stop_tokens if token in vocabulary]

    @cached_property
    def structural_tokens(self) -> frozenset[str]:
        """The tokens that the format itself writes: marks of images, headers and ends of turns, and fillers.

        A text that contains one would be read as something else than text. All other special tokens, such as `<box>`
        or `<ref>`, are words that users train on.
        """
        tokenizer = self.tokenizer
        fillers = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
        named = {*_STRUCTURAL_TOKENS, *self.generation.stop_tokens, self.generation.image_token, *fillers}
        return frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.content in named)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, with special tokens such as `<box>`, without white space at its ends."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False)).strip()

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token, or 0 if there is none; any id is correct, because the attention mask hides it."""
        return int(self.tokenizer.pad_token_id or 0)

    def plan(self, sample: Sample) -> list[SlicePlan]:
        """Decide how each image of a sample is sliced."""
        return [plan_slices(image.width, image.height, self.slicing) for image in sample.images]

    def cut_images(self, sample: Sample) -> list[NDArray[np.uint8]]:
        """Return the slices of a sample's images, in the order in which the images appear in the turns."""
        plans = self.plan(sample)
        return [
            pixels
            for number in sample.image_order
            for pixels in cut_slices(open_image(sample.images[number]), plans[number], self.slicing)
        ]

    def encode(self, sample: Sample) -> EncodedConversation:
        """Tokenize a complete conversation for training.

        Raises:
            SampleError: A text contains a token of the format itself.
        """
        trained = [turn.loss for turn in sample.turns if turn.role == "assistant"]
        text, counts = self._render(sample, sample.turns, add_generation_prompt=False)
        return self.encode_text(text, trained, counts)

    def encode_text(
        self, text: str, trained: Sequence[bool] | None = None, counts: Sequence[int] | None = None
    ) -> EncodedConversation:
        """Tokenize a rendered conversation; the supervised tokens are each answer and the end of its turn.

        Args:
            text: The conversation as the chat template writes it.
            trained: Whether each answer is supervised; None for all.
            counts: For how many image tokens each one in the text stands; None for one.

        Raises:
            SampleError: A token contains the beginning of an answer and text in front of it.
            UserError: The chat template wrote another number of answers.
        """
        tokens = self.tokenizer(text, return_offsets_mapping=True)
        answers = [match.span(1) for match in self._answer_pattern.finditer(text)]
        if trained is not None and not all(trained):
            if len(trained) != len(answers):
                raise UserError(
                    f"The chat template wrote {len(answers)} answers for {len(trained)}; use the chat template of "
                    f"MiniCPM-V {self.generation.version}."
                )
            answers = [span for span, is_trained in zip(answers, trained, strict=True) if is_trained]
        ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
        labels = [IGNORED_LABEL] * len(ids)
        position = 0
        for start, end in answers:
            while position < len(ids) and offsets[position][0] < start:
                position += 1
                if offsets[position - 1][1] > start:
                    raise SampleError(
                        "joined_answer",
                        f"the tokenizer joins the beginning of the answer {text[start:end][:20]!r} with the prompt "
                        "in front of it, so that it cannot be trained; let the answer begin with another character.",
                    )
            while position < len(ids) and offsets[position][1] <= end:
                labels[position] = ids[position]
                position += 1
        if counts is not None:
            repeats = self._count_repeats(text, tokens, counts)
            ids, labels = _repeat(ids, repeats), _repeat(labels, repeats)
        return EncodedConversation(ids, labels)

    def encode_prompt(self, sample: Sample, enable_thinking: bool | None = None) -> list[int]:
        """Tokenize the prompt that a server would send to get a sample's last answer.

        It is the beginning of the ids that `encode` returns for the sample with its last answer.

        Args:
            sample: Sample to answer. If the last turn is the assistant's, it is left out.
            enable_thinking: Whether the prompt requests reasoning before the answer, in generations that support it;
                None if the sample's own answer decides.

        Raises:
            SampleError: A text contains a token of the format itself.
        """
        turns = sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns
        if enable_thinking is None:
            enable_thinking = self.asks_for_reasoning(sample)
        text, counts = self._render(sample, turns, add_generation_prompt=True, enable_thinking=enable_thinking)
        tokens = self.tokenizer(text, return_offsets_mapping=True)
        return _repeat(tokens["input_ids"], self._count_repeats(text, tokens, counts))

    def asks_for_reasoning(self, sample: Sample) -> bool:
        """Whether the sample's last answer has reasoning, so that the prompt for this answer requests it."""
        last = sample.turns[-1]
        return last.role == "assistant" and bool(self.split_reasoning(last.text)[0])

    def split_reasoning(self, text: str, is_open: bool = False) -> tuple[str, str]:
        """Split an answer into the reasoning in a think block at its beginning, and the rest.

        Args:
            text: Answer from the data or from a model.
            is_open: Whether the prompt has already opened the think block, so that an answer that does not close it
                consists of reasoning alone.

        Returns:
            The reasoning and the answer, without white space at the ends of the reasoning and in front of the answer.
            The reasoning is empty in generations without think blocks.
        """
        is_opened = text.lstrip().startswith(_THINK)
        if not self.generation.empty_thinking or not (is_open or is_opened):
            return "", text
        reasoning, end, answer = text.partition(_END_THINK)
        if not end and not is_open:
            return "", text
        reasoning = reasoning.strip()
        return reasoning.removeprefix(_THINK).strip() if is_opened else reasoning, answer.lstrip()

    def normalize_answer(self, text: str) -> str:
        """An answer as it comes back from the model: without reasoning, and as the tokenizer writes it.

        Many tokenizers change text: they compose accents (Unicode's NFC), for example. Expected answers and the
        answers of other models become comparable with the model's own answers in this way.
        """
        answer = self.split_reasoning(text)[1]
        return self.decode(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    @cached_property
    def _answer_pattern(self) -> re.Pattern[str]:
        header, end = re.escape(self.generation.assistant_header), re.escape(self.generation.end_of_turn)
        unsupervised = f"(?:{re.escape(self.generation.empty_thinking)})?"
        return re.compile(f"{header}{unsupervised}(.*?{end})", re.DOTALL)

    @cached_property
    def _structural_token_pattern(self) -> re.Pattern[str]:
        by_length = sorted(self.structural_tokens, key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in by_length))

    @cached_property
    def _image_token_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.generation.image_token))

    @cached_property
    def _image_token_id(self) -> int:
        found: Any = self.tokenizer.convert_tokens_to_ids(self.generation.image_token)
        return int(found)

    def _render(
        self, sample: Sample, turns: tuple[Turn, ...], add_generation_prompt: bool, enable_thinking: bool = False
    ) -> tuple[str, list[int]]:
        """Render turns by the chat template.

        Returns:
            The text with one image token for each slice, and the number of tokens for which each of these stands.
        """
        for turn in turns:
            found = self._structural_token_pattern.search(turn.text)
            if found:
                raise SampleError(
                    "special_token",
                    f"the {turn.role}'s text contains the special token {found.group()}; rephrase or escape it.",
                )
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        if self.generation.empty_thinking:
            options["enable_thinking"] = enable_thinking
        messages: list[Any] = [{"role": turn.role, "content": self._content(turn)} for turn in turns]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        # Images are inserted in the order of their marks in the text, not in the order of the sample's image list.
        order = [part for turn in turns for part in turn.parts if isinstance(part, int)]
        pieces = text.split(self.generation.image_mark)
        if len(pieces) != len(order) + 1:
            raise UserError(
                f"The chat template wrote {len(pieces) - 1} image marks for {len(order)} images; use the chat template "
                f"of MiniCPM-V {self.generation.version}."
            )
        if any(self._image_token_pattern.search(piece) for piece in pieces):
            raise UserError(
                f"The chat template wrote {self.generation.image_token}, which stands for an image, without one; use "
                f"the chat template of MiniCPM-V {self.generation.version}."
            )
        all_plans = self.plan(sample)
        plans = [all_plans[number] for number in order]
        images = [self._image_text(image_id, plan) for image_id, plan in enumerate(plans)]
        counts = [count for plan in plans for count in self._count_tokens(plan)]
        return "".join(piece for pair in zip(pieces, [*images, ""], strict=True) for piece in pair), counts

    def _count_repeats(self, text: str, tokens: "BatchEncoding", counts: Sequence[int]) -> list[int]:
        """How often to repeat each token, because image tokens of a text stand for `counts` tokens."""
        starts = (match.start() for match in self._image_token_pattern.finditer(text))
        of_position = dict(zip(starts, counts, strict=True))
        # An unknown character may have the id of an image token, and a token without text the position of one.
        return [
            of_position.get(start, 1) if token == self._image_token_id else 1
            for token, (start, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ]

    def _content(self, turn: Turn) -> str | list[dict[str, Any]]:
        """Return a turn's content in the form that the chat template expects.

        A template that receives images as list items writes the line break next to an image mark itself, so that line
        break is removed from the text.
        """
        parts = list(turn.parts)
        if self.generation.image_content == "text" or all(isinstance(part, str) for part in parts):
            text = "".join(self.generation.image_mark if isinstance(part, int) else part for part in parts)
            return self._written_answer(text) if turn.role == "assistant" else text
        items: list[dict[str, Any]] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                items.append({"type": "image"})
                continue
            if number > 0:
                part = part.removeprefix("\n")
            if number + 1 < len(parts):
                part = part.removesuffix("\n")
            if part:
                items.append({"type": "text", "text": part})
        return items

    def _written_answer(self, text: str) -> str:
        """Return an answer as it is trained and as it is part of the history.

        Line breaks at its beginning are removed, because the tokenizer joins them with the line break in front of the
        answer, which belongs to the prompt. White space around reasoning is that of the chat template.

        Raises:
            SampleError: The chat template would rewrite the answer, because it is not clear where its reasoning ends.
        """
        reasoning, answer = self.split_reasoning(text)
        if self.generation.empty_thinking and (_END_THINK in answer or _THINK in reasoning):
            raise SampleError(
                "special_token",
                f"the assistant's text contains {_END_THINK}, which the chat template takes for the end of reasoning; "
                f"write reasoning once, as {_THINK}…{_END_THINK} in front of the answer, or rephrase the text.",
            )
        answer = _LEADING_LINE_BREAKS.sub("", answer)
        return f"{_THINK}\n{reasoning}\n{_END_THINK}\n\n{answer}" if reasoning else answer

    def _count_tokens(self, plan: SlicePlan) -> list[int]:
        """The number of tokens of an image's overview and of each slice, row by row."""
        return [
            self.tokens_per_slice or rows * columns // self.patches_per_token for rows, columns in plan.target_sizes
        ]

    def _image_text(self, image_id: int, plan: SlicePlan) -> str:
        """An image as text: its number, the overview, then the slices row by row, with one image token for each."""
        text = f"<image_id>{image_id}</image_id>" if self.use_image_id else ""
        text += f"<image>{self.generation.image_token}</image>"
        if plan.grid is not None:
            rows, columns = plan.grid
            text += "\n".join([f"<slice>{self.generation.image_token}</slice>" * columns] * rows)
        return text


def _repeat(values: Sequence[int], times: Sequence[int]) -> list[int]:
    """Each value as often as its number says."""
    return list(chain.from_iterable(map(repeat, values, times)))
