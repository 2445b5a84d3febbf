"""The page of `chat`: an image, questions, and the answers of several models side by side; needs the extra `chat`."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio

from minicpmv_finetune.errors import UserError

from .address import DEFAULT_HOST
from .asking import NEW_TOKENS, LoadedModel, answer_sample, check_question, question_sample, shown_slices

_LARGEST_IMAGE = "100mb"
_INTRODUCTION = """# minicpmv-finetune chat
Answers are greedy, as in the evaluation. Questions about the same image are one conversation."""

Turns = list[list[tuple[str, str]]]
"""For each model its conversation: question and answer."""


def build_page(models: Mapping[str, LoadedModel], max_new_tokens: int = NEW_TOKENS) -> gradio.Blocks:
    """The page.

    Args:
        models: The models by their headings, from left to right.
        max_new_tokens: Longest answer in tokens.
    """
    with gradio.Blocks(title="minicpmv-finetune chat", analytics_enabled=False) as page:
        gradio.Markdown(_INTRODUCTION)
        turns = gradio.State([[] for _ in models])
        with gradio.Row():
            with gradio.Column(min_width=300):
                image = gradio.Image(sources=["upload", "clipboard"], label="Image", height=300)
                # The file as it was dropped; Gradio would convert it, and fail where it is damaged or too large.
                image.preprocess = lambda file: file.path if file else None
                question = gradio.Textbox(label="Question", max_lines=6, placeholder="What is the total?")
                with gradio.Row():
                    again = gradio.Button("Start over", min_width=100)
                    button = gradio.Button("Ask", variant="primary", min_width=100)
            with gradio.Column(scale=2 * len(models), min_width=300), gradio.Row():
                columns = [_make_column(heading) for heading in models]
        shown = [component for column in columns for component in column]

        def check(path: str | None, asked: str) -> None:
            """Refuse what no model can be asked, before the page changes."""
            if not asked.strip():
                raise gradio.Error("Write a question.", print_exception=False)
            try:
                sample = question_sample([path] if path else [], asked)
                for model in models.values():
                    check_question(model.encoder, sample)
            except UserError as error:
                # The page would read a word such as <image> as HTML.
                raise gradio.Error(escape(str(error)), print_exception=False) from error

        def ask(path: str | None, asked: str, before: Turns) -> Iterator[dict[Any, Any]]:
            """Show the question, what each model sees, and the answers as they come."""
            asking = list(zip(columns, models.values(), before, strict=True))
            yield {question: "", **{talk: _messages([*earlier, (asked, "…")]) for (talk, _), _, earlier in asking}}
            sample = question_sample([path] if path else [], asked)
            for (_, slices), model, _ in asking:
                yield {slices: [(piece.pixels, piece.caption) for piece in shown_slices(model.encoder, sample)]}
            after: Turns = []
            for (talk, _), model, earlier in asking:
                after.append([*earlier, (asked, _continue(model, path, asked, earlier, max_new_tokens))])
                yield {talk: _messages(after[-1])}
            yield {turns: after}

        def start_over() -> list[Any]:
            """Forget the conversations."""
            return [[[] for _ in models], *([] for _ in shown)]

        # An "…" is the sign of progress.
        settings: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for event in (button.click, question.submit):
            # A step of its own, since Gradio covers what a function that fails would have changed.
            checked = event(check, [image, question], None, **settings)
            checked.success(ask, [image, question, turns], [question, turns, *shown], **settings)
        for event in (again.click, image.change, *(talk.clear for talk, _ in columns)):
            event(start_over, None, [turns, *shown], **settings)
    return page


def _make_column(heading: str) -> tuple[gradio.Chatbot, gradio.Gallery]:
    """What is shown of a model: its conversation, and the slices that it sees."""
    with gradio.Column(min_width=260):
        # Markdown would hide words such as <box>.
        talk = gradio.Chatbot(
            label=heading, height=300, render_markdown=False, buttons=[], feedback_options=None, layout="bubble"
        )
        slices = gradio.Gallery(
            label=f"What it sees: {heading}", columns=3, height=300, object_fit="contain", format="png"
        )
    return talk, slices


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """A conversation as Gradio writes it."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _continue(
    model: LoadedModel, path: str | None, asked: str, earlier: Sequence[tuple[str, str]], max_new_tokens: int
) -> str:
    """The answer to a question after a model's own conversation, or why there is none."""
    try:
        return answer_sample(model, question_sample([path] if path else [], asked, earlier), max_new_tokens)
    except UserError as error:
        # A random model may have answered nothing, or <image>.
        return f"Not asked, since its earlier answers cannot be part of a prompt; start over ({error})"


def run_page(page: gradio.Blocks, port: int, wait: bool = True) -> None:
    """Show the page to this machine alone; nothing is loaded from or sent to elsewhere.

    Args:
        page: The page.
        port: Port to listen on.
        wait: Whether to return only when a signal ends the process.
    """
    page.launch(
        server_name=DEFAULT_HOST,
        server_port=port,
        prevent_thread_lock=not wait,
        share=False,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        max_file_size=_LARGEST_IMAGE,
        theme=gradio.themes.Base(),  # its fonts are part of the package
    )
