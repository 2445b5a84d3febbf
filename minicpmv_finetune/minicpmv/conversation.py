"""From a sample to token ids and labels, by the checkpoint's own chat template.

The template is rendered as text, each image's mark is replaced by its tokens, and the whole is tokenized once: the
ids are those that the model's processor produces at serving time (tested per generation), so training sees what
serving sends. An answer is found in the text, where it stands between the assistant's header and the end of the
turn; because text that contains a special token is refused, no user can write such a mark, and the character
offsets the tokenizer reports turn it into supervised tokens.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpmv_finetune.data.samples import Sample, SampleError, Turn
from minicpmv_finetune.errors import UserError

from .generations import Generation, detect_generation, read_image_settings, read_slicing_config, read_tokens_per_slice
from .model_input import IGNORED_LABEL
from .slicing import SlicePlan, SlicingConfig, plan_slices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedConversation:
    """A tokenized conversation; `labels` repeat the supervised ids and are -100 elsewhere (not shifted)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoder:
    """Everything needed to turn samples of one checkpoint into ids: template, tokenizer, slicing."""

    generation: Generation
    tokenizer: "PreTrainedTokenizerBase"
    slicing: SlicingConfig
    use_image_id: bool
    tokens_per_slice: int | None  # None: one for each `patches_per_token`
    patches_per_token: int

    @classmethod
    def from_checkpoint(cls, checkpoint: Path, max_slice_nums: int | None = None) -> "Encoder":
        """Read a checkpoint folder's tokenizer and processor settings.

        Args:
            checkpoint: a local folder.
            max_slice_nums: overrides the processor's own.

        Raises:
            UserError: a file is missing or damaged, or the tokenizer lacks the generation's special tokens.
        """
        from transformers import AutoTokenizer

        from . import configuration  # noqa: F401 - tells transformers of the native generations

        generation = detect_generation(checkpoint)
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{checkpoint}: its tokenizer cannot be loaded ({_first_line(error)}); the folder needs the base "
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
        """Refuse a tokenizer that would split a mark into ordinary tokens."""
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
        """What ends generation: the end of the turn, and of the text."""
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[token] for token in self.generation.stop_tokens if token in vocabulary]

    @property
    def pad_token_id(self) -> int:
        """Fills padding; any id will do, since the attention mask hides it."""
        return int(self.tokenizer.pad_token_id or 0)

    def plan(self, sample: Sample) -> list[SlicePlan]:
        """The slices of each of a sample's images."""
        return [plan_slices(image.width, image.height, self.slicing) for image in sample.images]

    def encode(self, sample: Sample) -> EncodedConversation:
        """Tokenize a whole conversation for training.

        Raises:
            SampleError: a text contains a special token.
        """
        return self.encode_text(self._render(sample, sample.turns, add_generation_prompt=False))

    def encode_text(self, text: str) -> EncodedConversation:
        """Tokenize a rendered conversation and find what is learnt in it: each answer up to the end of its turn."""
        tokens = self.tokenizer(text, return_offsets_mapping=True)
        answers = [match.span(1) for match in self._answer_pattern.finditer(text)]
        ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
        labels = [IGNORED_LABEL] * len(ids)
        position = 0
        for start, end in answers:
            while position < len(ids) and offsets[position][0] < start:
                position += 1
            while position < len(ids) and offsets[position][1] <= end:
                labels[position] = ids[position]
                position += 1
        return Encoded(ids, labels)

    def encode_prompt(self, sample: Sample, enable_thinking: bool = False) -> list[int]:
        """Tokenize everything before a sample's last answer, as a server would to have it answered.

        Args:
            sample: a last answer is left out.
            enable_thinking: ask for reasoning first, where the generation can.
        """
        turns = sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns
        text = self._render(sample, turns, add_generation_prompt=True, enable_thinking=enable_thinking)
        return list(self.tokenizer(text)["input_ids"])

    @cached_property
    def _answer_pattern(self) -> re.Pattern[str]:
        header, end = re.escape(self.generation.assistant_header), re.escape(self.generation.end_of_turn)
        unlearnt = f"(?:{re.escape(self.generation.empty_thinking)})?"
        return re.compile(f"{header}{unlearnt}(.*?{end})", re.DOTALL)

    @cached_property
    def _special_token_pattern(self) -> re.Pattern[str]:
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))

    def _render(
        self, sample: Sample, turns: tuple[Turn, ...], add_generation_prompt: bool, enable_thinking: bool = False
    ) -> str:
        for turn in turns:
            found = self._special_token_pattern.search(turn.text)
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
        # The order of the marks in the text decides, whatever the order in which images were listed.
        order = [part for turn in turns for part in turn.parts if isinstance(part, int)]
        pieces = text.split(self.generation.image_mark)
        if len(pieces) != len(order) + 1:
            raise UserError(
                f"The chat template wrote {len(pieces) - 1} image marks for {len(order)} images; it does not "
                f"belong to MiniCPM-V {self.generation.version}."
            )
        plans = self.plan(sample)
        expanded = [self._image_tokens(shown, plans[number]) for shown, number in enumerate(order)]
        return "".join(piece for pair in zip(pieces, [*expanded, ""], strict=True) for piece in pair)

    def _content(self, turn: Turn) -> str | list[dict[str, Any]]:
        """A turn as the chat template wants it; between list items, the line break beside a mark is the template's."""
        parts = list(turn.parts)
        if self.generation.image_content == "text":
            return "".join(self.generation.image_mark if isinstance(part, int) else part for part in parts)
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
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

    def _image_tokens(self, shown: int, plan: SlicePlan) -> str:
        """The tokens of the image shown as number `shown`, overview first, slices row by row."""
        counts = [
            self.tokens_per_slice or rows * columns // self.patches_per_token for rows, columns in plan.target_sizes
        ]
        text = f"<image_id>{shown}</image_id>" if self.use_image_id else ""
        text += f"<image>{self.generation.image_token * counts[0]}</image>"
        if plan.grid is not None:
            slices = [f"<slice>{self.generation.image_token * count}</slice>" for count in counts[1:]]
            columns = plan.grid[1]
            text += "\n".join("".join(slices[row : row + columns]) for row in range(0, len(slices), columns))
        return text


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
