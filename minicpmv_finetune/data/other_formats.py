"""Fields of other programs' data, and the conversion of their samples to this project's format.

The formats are those of LLaMA-Factory (Alpaca, ShareGPT, OpenAI and KTO), ms-swift, TRL, LLaVA and OpenAI, and rows of
Hugging Face datasets with a question and an answer. All are conversations that name images, in a list beside the turns
or within them, so one conversion is enough: images are named `<image_00>`, `<image_01>`, … in the order in which the
turns show them. A field is converted, or its sample is refused, or it is counted as ignored; none is lost silently.
The conversion repeats no check of validate-data.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .samples import SampleError

_PLACEHOLDER = "<image>"
_OWN_PLACEHOLDER = re.compile(r"<image>|<image_\d+>")
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system", "model": "assistant", "bot": "assistant"}
_SPEAKERS = {"system", "human", "user", "assistant", "gpt", "bot"}
_TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation")
_TURNS = ("messages", "conversations", "conversation")
_QUESTIONS = ("question", "query", "prompt", "instruction", "input")
_ANSWERS = ("answer", "answers", "response", "output", "completion")
_SYSTEMS = ("system", "system_prompt", "system_message")
_PREFERRED = ("chosen", "completion", "preferred_output")
# Names of fields that contain images, and names that look as if.
_IMAGE_FIELD = re.compile(r"(image|img|picture|photo|pic)s?([_-]?(path|url|uri|file|name|file_?name|base64|data)s?)?")
_IMAGE_FILE = re.compile(r".*\.(jpe?g|png|webp|gif|bmp|tiff?|avif|jp2|heic)", re.IGNORECASE)
_IMAGE_LIKE = re.compile(r"(image|img|picture|photo).*|.*[_-](image|img|picture|photo|pic)s?([_-].*)?")
_VIDEOS = ("video", "videos", "video_path", "video_url")
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PART_FIELDS = ("image_url", "image", "url", "path")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("loss", "weight", "loss_scale", "train", "trainable")
_FALSE = (False, 0, "false", "False", "0")  # as programs write a judgement

_TOOLS = "tool calls are not supported; write the conversation without them"
# Fields of a row that change what is trained in a way that this project does not offer.
_REFUSED_IN_ROWS = {
    **dict.fromkeys(
        ("audio", "audios", "audio_path", "audio_url"), "audio is not supported; write what is said as text"
    ),
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    "objects": "boxes beside the text are not supported; write them into the text as the model answers them",
}
# Fields of a question that no rule places.
_REFUSED_IN_QUESTIONS = ("context", "options", "choices", "hint")
_REFUSED_IN_TURNS = {
    **dict.fromkeys(("tool_calls", "function_call"), _TOOLS),
    "audio": "audio is not supported; write what is said as text",
    "mask": 'what a mask leaves out is not known; write "loss": false on answers that are not trained',
    "refusal": "a refusal beside the content is not supported; write it as the content",
    **dict.fromkeys(("image", "images"), "images of a turn are named in the row or within the content"),
    **dict.fromkeys(("video", "videos"), "videos are not supported; give frames as images"),
}

# Where a row has `conversations` already, these fields are more than a remark: what they say would not be trained.
_MEANINGFUL_IN_ROWS = frozenset(
    {"images", *_VIDEOS, *_REFUSED_IN_ROWS, *_REASONING, *_SYSTEMS, "history", "messages"}
    | {"chosen", "rejected", "rejected_response", "rejected_messages", "preferred_output", "kto_tag"}
)
_MEANINGFUL_IN_TURNS = frozenset({"from", "value", *_WEIGHTS, *_REASONING, *_REFUSED_IN_TURNS} - {"loss"})
_OWN = ("id", "image", "conversations", "metric", "tags", "answers")
_SHOWN_FIELDS = 20
_REMEDY = "convert the data with minicpmv-finetune import-data, or remove them"


@dataclass(frozen=True)
class ConvertedSample:
    """A sample in this project's format.

    Attributes:
        content: The sample as a data file contains it.
        ignored: Names of the fields that the conversion did not use.
    """

    content: dict[str, Any]
    ignored: tuple[str, ...]


def find_ignored_fields(content: Mapping[str, Any]) -> list[str]:
    """The fields of a sample in this project's format that have no meaning in it.

    Raises:
        SampleError: A field has a meaning in another program's format, so that ignoring it would lose something.
    """
    fields = _filled(content)
    meaningful = _MEANINGFUL_IN_ROWS
    if "conversations" not in fields:
        meaningful = meaningful.union(_TURNS, _QUESTIONS, _ANSWERS)
    others = [name for name in fields if name not in _OWN]
    foreign = [name for name in others if _plain(name) in meaningful or _plain(name) in _OWN]
    if "image" not in fields:  # further names of images are remarks where `image` names them
        foreign += _image_like({name: fields[name] for name in others})
    foreign += [name for name in others if _plain(name) == "label" and _is_judgement(fields[name])]
    foreign += [name for name in others if _plain(name) in _WEIGHTS and fields[name] in _FALSE]
    foreign = list(dict.fromkeys(foreign))
    ignored = [name for name in others if name not in foreign]
    turns = fields.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        for name in _filled(turn) if isinstance(turn, dict) else ():
            if name in ("role", "content", "loss"):
                continue
            is_foreign = _plain(name) in _MEANINGFUL_IN_TURNS or _plain(name) in ("role", "content", "loss")
            is_foreign = is_foreign or _is_image(name, turn[name]) or _names_image(turn[name])
            (foreign if is_foreign else ignored).append(f"conversations.{name}")
    if foreign:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(foreign))
        raise SampleError(
            "other_format", f"this format does not have {names:.300}, which would not be trained; {_REMEDY}."
        )
    return list(dict.fromkeys(ignored))


def convert(item: Any, refer: Callable[[Any], str]) -> ConvertedSample:
    """Convert a sample of another format.

    Args:
        item: The sample.
        refer: Returns the reference of an image.

    Raises:
        SampleError: The sample cannot be converted.
    """
    if not isinstance(item, dict):
        raise SampleError("schema", f"the sample is {kind_of(item)}, not an object; see docs/data-format.md.")
    fields: dict[str, Any] = {}
    for name, value in _filled(item).items():
        if _plain(name) in fields:
            raise SampleError("doubled_key", f"has {_plain(name)!r} in two spellings; keep one.")
        fields[_plain(name)] = value
    _refuse_unsupported(fields)
    own = {name: fields.pop(name) for name in ("id", "metric", "tags") if _is_own(name, fields.get(name))}
    images = _take_images(fields)
    turns = _take_turns(fields)
    answers = fields.get("answers")
    if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers):
        fields.pop("answers", None)
        own["answers"] = answers
    in_turns = [name for turn in turns for name in (*turn.ignored, *_ignored_in_parts(turn.content))]
    ignored = [*fields, *dict.fromkeys(in_turns)]
    image, conversations = _place_images(turns, images, refer)
    identity = {"id": own.pop("id")} if "id" in own else {}
    content = {**identity, **({"image": image} if image else {}), "conversations": conversations, **own}
    return ConvertedSample(content, tuple(ignored))


def describe_ignored(counts: Mapping[str, int]) -> str:
    """A sentence with the fields that are not used, and the number of samples that have each."""
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN_FIELDS]
    names = ", ".join(f"{name!r:.60} ({count:,})" for name, count in shown)
    more = f" and {len(counts) - len(shown):,} more" if len(counts) > len(shown) else ""
    return f"fields without a meaning here are ignored: {names}{more}"


def kind_of(value: Any) -> str:
    """What a JSON value is, in the words of messages."""
    kinds = {type(None): "null", bool: "true or false", str: "text", list: "an array", dict: "an object"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


@dataclass(frozen=True)
class _Turn:
    """A turn of another format; `ignored` are the names of its fields that are not used."""

    role: str
    content: Any
    loss: bool = True
    ignored: tuple[str, ...] = ()


def _filled(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something; tables have a null in every row that lacks a field."""
    return {str(name): value for name, value in content.items() if value not in (None, "", [], {})}


def _plain(name: str) -> str:
    return name.strip().lower()


def _image_like(fields: Mapping[str, Any]) -> list[str]:
    """The fields that seem to contain an image, by name or value; a number or a truth value contains none."""
    return [
        name
        for name, value in fields.items()
        if (not isinstance(value, int | float) and _IMAGE_LIKE.fullmatch(_plain(name)))
        or _is_image(name, value)
        or _names_image(value)
    ]


def _is_image(name: str, value: Any) -> bool:
    """Whether a field of this name contains images; `file_name` does in a folder of images with its metadata.jsonl."""
    if _plain(name) in ("file_name", "filename"):
        return isinstance(value, str) and _IMAGE_FILE.fullmatch(value) is not None
    return not isinstance(value, int | float) and _IMAGE_FIELD.fullmatch(_plain(name)) is not None


def _names_image(value: Any) -> bool:
    """Whether a field's value is the path or the content of an image, or a list of them, whatever the field's name."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(
        isinstance(text, str) and (_IMAGE_FILE.fullmatch(text) or text.startswith("data:image/")) for text in texts
    )


def _is_judgement(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def _is_own(name: str, value: Any) -> bool:
    if name == "tags":
        return isinstance(value, list) and all(isinstance(tag, str) for tag in value)
    return isinstance(value, str) or (name == "id" and type(value) is int)


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    for name in _VIDEOS:
        if name in fields:
            shown = fields[name] if isinstance(fields[name], str) else "one"
            raise SampleError(
                "video", f"contains a video ({shown:.100}), which is not supported; give frames as images."
            )
    for name, reason in _REFUSED_IN_ROWS.items():
        value = fields.get(name)
        # Tables have {"ref": [], "bbox": []} in each row without boxes.
        if _filled(value) if isinstance(value, dict) else value is not None:
            raise SampleError("unsupported", f"has `{name}`: {reason}.")
    # Beside a question and its answer, a label that is a number or a word may be a class.
    is_question = bool(fields.keys() & {"answer", "answers"})
    for name in ("label", "kto_tag"):
        value = fields.get(name)
        if name == "label" and is_question and not _is_judgement(value):
            continue
        if name in fields and (_is_judgement(value) or value in (0, 1)) and fields.pop(name) in _FALSE:
            raise SampleError(
                "undesired_answer",
                f"`{name}` is false, so the answer is one that the model should not give; it is not trained.",
            )
    if not _take_loss(fields, _WEIGHTS, "the sample"):
        raise SampleError("nothing_supervised", "its weight is 0, so that nothing of it is trained; remove it.")


def _take_loss(fields: dict[str, Any], names: Iterable[str], where: str) -> bool:
    """Whether a row or a turn is trained on, by the fields of these names."""
    is_trained = True
    for name in names:
        value = fields.pop(name, 1)
        if not isinstance(value, int | float) or value not in (0, 1):
            raise SampleError(
                "unsupported", f"{where} has `{name}` {value!r:.60}; an answer is trained or not: use 1 or 0."
            )
        is_trained = is_trained and bool(value)
    return is_trained


def _take_images(fields: dict[str, Any]) -> dict[str, Any] | list[Any]:
    """The images that are listed beside the turns, by placeholder or in the order of their places."""
    found = [name for name, value in fields.items() if _is_image(name, value)]
    found.sort(key=lambda name: ("image", "images", name).index(name))
    if not found:
        if unclear := _image_like(fields):
            raise SampleError("schema", f"`{unclear[0]}` seems to name an image; rename it to `image`, or remove it.")
        return []
    images = fields.pop(found[0])
    if found[:2] == ["image", "images"] and fields.pop("images") not in (images, [images]):
        raise SampleError("schema", "`image` and `images` name different images; keep one of them.")
    if isinstance(images, dict) and all(_OWN_PLACEHOLDER.fullmatch(str(name)) for name in images):
        return images
    return list(images) if isinstance(images, list) else [images]


def _take_turns(fields: dict[str, Any]) -> list[_Turn]:
    """All turns of a sample, from the fields that contain them."""
    if isinstance(request := fields.get("input"), dict):  # OpenAI's preference format
        fields |= _filled(fields.pop("input"))
        _refuse_unsupported(fields)
        if request.get("messages") is None:
            raise SampleError("schema", "`input` has no `messages`; see docs/data-format.md.")
    name = next((name for name in (*_TURNS, "prompt") if _are_turns(fields.get(name))), None)
    turns = _as_turns(fields.pop(name)) if name else []
    preferred = next((name for name in _PREFERRED if name in fields), None)
    if preferred and (turns or _are_turns(fields[preferred])):
        turns = _with_preferred(turns, _as_turns(fields.pop(preferred)))
    if not turns:
        turns = _take_question(fields)
    start = 1 if turns[0].role == "system" else 0
    turns = [*turns[:start], *_take_history(fields), *turns[start:]]
    for name in _SYSTEMS:
        if (system := fields.pop(name, None)) is None:
            continue
        if not isinstance(system, str):
            raise SampleError("schema", f"`{name}` is {kind_of(system)}, not text; correct it.")
        if turns[0].role != "system":
            turns = [_Turn("system", system), *turns]
        elif turns[0].content != system:
            raise SampleError("two_system_turns", f"`{name}` and another field are two system prompts; keep one.")
    return _with_reasoning(turns, fields)


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _as_turns(value: Any) -> list[_Turn]:
    """The turns of a list, of a single turn, or of an answer alone."""
    if isinstance(value, str):
        return [_Turn("assistant", value)]
    listed = [value] if isinstance(value, dict) else value
    if not _are_turns(listed):
        raise SampleError("schema", f"its turns are {kind_of(value)}; see docs/data-format.md.")
    return [turn for fields in listed for turn in _as_turn(fields)]


def _as_turn(turn: Mapping[str, Any]) -> Iterable[_Turn]:
    fields = {_plain(str(name)): value for name, value in turn.items()}
    role = fields.pop("role", None) or fields.pop("from", None)
    if role is None and fields and fields.keys() <= _SPEAKERS:  # ms-swift's pairs: {"human": …, "assistant": …}
        return [_Turn(_ROLES.get(name, name), content) for name, content in fields.items() if content is not None]
    if not isinstance(role, str):
        raise SampleError("schema", "a turn has neither `role` nor `from`; see docs/data-format.md.")
    if role in _TOOL_ROLES:
        raise SampleError("unsupported", f"a turn has the role {role!r}: {_TOOLS}.")
    content = fields.pop("content", fields.pop("value", None))
    fields = _filled(fields)
    for name, reason in _REFUSED_IN_TURNS.items():
        if name in fields:
            raise SampleError("unsupported", f"a turn has `{name}`: {reason}.")
    role = _ROLES.get(role, role)
    if named := [name for name, value in fields.items() if _is_image(name, value) or _names_image(value)]:
        raise SampleError("unsupported", f"a turn has `{named[0]}`: {_REFUSED_IN_TURNS['images']}.")
    says_loss = any(name in fields for name in _WEIGHTS)
    loss = _take_loss(fields, _WEIGHTS, "a turn")
    if says_loss and loss and role != "assistant":
        raise SampleError("unsupported", f"a turn of the {role} is to be trained, but only answers are; remove that.")
    [result] = _with_reasoning([_Turn(role, content, loss or role != "assistant")], fields)
    return [_Turn(result.role, result.content, result.loss, tuple(f"messages.{name}" for name in fields))]


def _ignored_in_parts(content: Any) -> list[str]:
    """The fields of a turn's parts that are not used.

    Raises:
        SampleError: A field says something that would be lost.
    """
    ignored = []
    for part in content if isinstance(content, list) else [content]:
        fields = _filled(part) if isinstance(part, dict) else {}
        is_text = fields.pop("type", "") in _TEXT_PARTS
        content_field = "text" if is_text else next((name for name in _IMAGE_PART_FIELDS if name in fields), "")
        value = fields.pop(content_field, None)
        if isinstance(value, dict) and "url" in value:
            fields |= {name: more for name, more in _filled(value).items() if name != "url"}
        if not _take_loss(fields, _WEIGHTS, "a part of a turn"):
            raise SampleError(
                "unsupported", "a part of a turn is not to be trained, but a turn is trained whole; divide the turn."
            )
        for name, more in fields.items():
            if name in _REFUSED_IN_TURNS or name == "text" or _is_image(name, more) or _names_image(more):
                raise SampleError(
                    "unsupported", f"a part of a turn has `{name}` beside its own content; write it as another part."
                )
            ignored.append(f"messages.content.{name}")
    return ignored


def _with_preferred(turns: list[_Turn], preferred: list[_Turn]) -> list[_Turn]:
    """The conversation with the preferred answer at its end; some programs write the whole conversation there."""
    if preferred[0].role != "assistant":
        return preferred
    if turns and turns[-1].role == "assistant":
        raise SampleError("schema", "the conversation has an answer, and another one beside it; keep one.")
    return [*turns, *preferred]


def _take_question(fields: dict[str, Any]) -> list[_Turn]:
    question = next((name for name in _QUESTIONS if isinstance(fields.get(name), str)), None)
    answer = next((name for name in (*_ANSWERS, "chosen") if name in fields), "")
    found = fields.get(answer)
    if isinstance(found, list):
        if len(found) > 1 and answer not in ("answer", "answers"):  # LLaMA-Factory ranks two answers in such a list
            raise SampleError(
                "unsupported",
                f"`{answer}` has {len(found)} answers, of which some may be wrong; keep the right one, or name the "
                "right ones `answers`.",
            )
        fields.setdefault("answers", found)  # all of them are right
        found = found[0]
    if question is None or not isinstance(found, str):
        raise SampleError(
            "schema",
            f"none of its fields {', '.join(fields)[:200]} is messages, conversations, or a question with an answer; "
            "rename them.",
        )
    for name in _REFUSED_IN_QUESTIONS:
        if name in fields:
            raise SampleError(
                "unsupported", f"has `{name}`, which no rule places; write it into the text of `{question}`."
            )
    if answer != "answers":
        fields.pop(answer)
    text = fields.pop(question)
    others = [name for name in _QUESTIONS if name != "input" and isinstance(fields.get(name), str)]
    if others:
        raise SampleError(
            "unsupported", f"has `{question}` and `{others[0]}`, and no rule joins them; write them into one field."
        )
    if not isinstance(fields.get("input", ""), str):
        raise SampleError("schema", f"`input` is {kind_of(fields['input'])}, not text; correct it.")
    if isinstance(fields.get("input"), str):
        text += f"\n{fields.pop('input')}"  # as LLaMA-Factory and ms-swift join them
    return [_Turn("user", text), _Turn("assistant", found)]


def _take_history(fields: dict[str, Any]) -> list[_Turn]:
    history = fields.pop("history", [])
    if _are_turns(history):
        return _as_turns(history)
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise SampleError("schema", "`history` is not a list of pairs of question and answer; correct it.")
    roles = ("user", "assistant")
    return [_Turn(role, text) for pair in history for role, text in zip(roles, pair, strict=True)]


def _with_reasoning(turns: list[_Turn], fields: dict[str, Any]) -> list[_Turn]:
    """The turns, the last of which begins with the reasoning that is in a field of its own, as Qwen3 writes it."""
    name = next((name for name in _REASONING if name in fields), None)
    if name is None:
        return turns
    reasoning, last = fields.pop(name), turns[-1]
    if not isinstance(reasoning, str) or not isinstance(last.content, str) or last.role != "assistant":
        raise SampleError("unsupported", f"`{name}` belongs to no answer that is text; write it into the answer.")
    content = f"<think>\n{reasoning.strip()}\n</think>\n\n{last.content.lstrip()}"
    return [*turns[:-1], _Turn(last.role, content, last.loss, last.ignored)]


def _place_images(
    turns: list[_Turn], images: dict[str, Any] | list[Any], refer: Callable[[Any], str]
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The images by placeholder, and the turns with these placeholders."""
    placed: dict[str, str] = {}
    unplaced: list[Any] = []
    if isinstance(images, dict):  # this project's own format: the text contains the placeholders already
        placed = {name: refer(image) for name, image in images.items()}
    else:
        unplaced = images
    is_named = bool(placed)

    def place(image: Any) -> str:
        placeholder = f"<image_{len(placed):02}>"
        placed[placeholder] = refer(image)
        return placeholder

    conversations: list[dict[str, Any]] = []
    for turn in turns:
        text = turn.content if is_named and isinstance(turn.content, str) else _text(turn.content, unplaced, place)
        conversations.append({"role": turn.role, "content": text, **({} if turn.loss else {"loss": False})})
    if unplaced and placed:
        raise SampleError(
            "placeholder_missing", f"the turns show {len(placed)} of its images and not the others; mark all of them."
        )
    if unplaced:
        first = next((turn for turn in conversations if turn["role"] == "user"), None)
        if first is None:
            raise SampleError("roles", "there is no user turn that its images could belong to; add one.")
        first["content"] = "\n".join([*map(place, unplaced), first["content"]])
    return placed, conversations


def _text(content: Any, unplaced: list[Any], place: Callable[[Any], str]) -> str:
    """The text of a turn, with a placeholder for each image."""
    if isinstance(content, str):
        text, *rest = content.split(_PLACEHOLDER)
        for piece in rest:
            text += (place(unplaced.pop(0)) if unplaced else _PLACEHOLDER) + piece
        return text
    if isinstance(content, dict):  # a single part
        content = [content]
    if not isinstance(content, list):
        raise SampleError("schema", f"a turn's content is {kind_of(content)}, not text; see docs/data-format.md.")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind in _TEXT_PARTS:
            part_text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(part_text, str):
                raise SampleError("schema", f"a turn has {kind_of(part_text)} in place of a text; correct it.")
            parts.append(part_text)
        elif kind in ("image_url", "input_image") or (kind == "image" and not unplaced):
            image = next((part[name] for name in _IMAGE_PART_FIELDS if part.get(name)), None)
            parts.append(place(image["url"] if isinstance(image, dict) and "url" in image else image))
        elif kind == "image":
            parts.append(place(unplaced.pop(0)))
        elif "video" in str(kind):
            raise SampleError("video", "a turn contains a video, which is not supported; give frames as images.")
        else:
            raise SampleError("schema", f"a turn contains {kind!r}, which is neither text nor an image; remove it.")
    # The published code joins the parts of a turn in the same way.
    return "\n".join(parts)
