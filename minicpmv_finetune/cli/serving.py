"""The commands to try a model: over HTTP, and on a page."""

import os
import shutil
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.serving.address import DEFAULT_HOST, Server, require_free_port
from minicpmv_finetune.terminal import print_sentence

from .options import NewTokens

PANEL = "Run here"
app = typer.Typer()

Served = Annotated[str, typer.Option("--model", help="Merged model; a path, an s3:// URI or a hub id.")]
Port = Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")]


@app.command(rich_help_panel=PANEL)
def serve(
    model: Served,
    host: Annotated[str, typer.Option(help="Address to listen on; other machines only with vLLM and a key.")] = (
        DEFAULT_HOST
    ),
    port: Port = 8000,
    server: Annotated[
        Server, typer.Option(help="Program that serves; auto takes vLLM where it is found and can load the model.")
    ] = "auto",
) -> None:
    """Serve a tuned model over HTTP, as OpenAI's clients expect it, by transformers or vLLM."""
    from minicpmv_finetune import storage
    from minicpmv_finetune.inputs.checks import check_base_model
    from minicpmv_finetune.serving.server import build_app, choose_server, require_server, run_app, vllm_command

    check_base_model("--model", model)
    require_server(server, host)
    require_free_port(host, port)
    if server == "transformers" or shutil.which("vllm") is None:
        _require("openai", "serve")  # before a large download
    checkpoint = storage.fetch(model)
    if choose_server(server, checkpoint, host) == "vllm":
        command = vllm_command(checkpoint, host, port)
        print_sentence(f"starting {' '.join(command)}")
        os.execv(shutil.which("vllm") or "vllm", command)  # noqa: S606 - no shell: a list of words
    _require("openai", "serve")
    print_sentence(f"loading {model}")
    from minicpmv_finetune.serving.asking import load

    run_app(build_app(load(model)), host, port, print_sentence)


@app.command(rich_help_panel=PANEL)
def chat(
    model: Served,
    base_model: Annotated[
        str, typer.Option(help="Base model, to see its answers beside; a path, an s3:// URI or a hub id.")
    ] = "",
    port: Port = 7860,
    max_new_tokens: NewTokens = 128,
) -> None:
    """Ask a tuned model about images on a page of this machine, beside its base model."""
    from minicpmv_finetune.inputs.checks import check_base_model

    places = {"--model": model, **({"--base-model": base_model} if base_model else {})}
    for option, uri in places.items():
        check_base_model(option, uri)
    require_free_port(DEFAULT_HOST, port)
    _require("gradio", "chat")
    print_sentence(f"loading {' and '.join(places.values())}")
    # Gradio keeps what is dropped on a page in a folder that it reads from here when it is imported, and never empties.
    with TemporaryDirectory(prefix="minicpmv-chat-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        from minicpmv_finetune.serving.asking import load
        from minicpmv_finetune.serving.page import build_page, run_page

        models = {}
        for option, uri in places.items():
            loaded = load(uri)
            name = f"MiniCPM-V {loaded.encoder.generation.version}"
            models[f"{'base' if option == '--base-model' else 'tuned'}, {name}" if base_model else name] = loaded
        page = build_page(models, max_new_tokens)
        print_sentence(f"the page is at http://{DEFAULT_HOST}:{port}; Ctrl-C ends it")
        run_page(page, port)


def _require(library: str, extra: str) -> None:
    """Refuse a command whose library is not installed.

    Raises:
        UserError: It is not.
    """
    if find_spec(library) is None:
        raise UserError(f"{library} is not installed; run pip install 'minicpmv-finetune[{extra}]'.")
