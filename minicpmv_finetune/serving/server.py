"""An OpenAI-compatible server: transformers' serving application with one model of this project, or vLLM.

transformers' application loads any model of the hub that a request names, reads images from files and addresses, and
knows no keys. Here it has one model, three of its paths, images that are part of the request, and this machine's
clients only.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError

from .address import LOOPBACK, Server, require_loopback
from .asking import LoadedModel
from .processor import ServedProcessor, greedy_config

SERVED_NAME = "minicpmv"
"""What requests call the model."""
_PATHS = ("/v1/chat/completions", "/v1/models", "/health")
_NO_KEYS = "transformers' server asks nobody for a key"
_NEW_TOKENS = 1024  # the application's own least number


def require_server(wanted: Server, host: str) -> None:
    """Refuse what is known before a model is fetched; see `choose_server`.

    Raises:
        UserError: The wanted program is not there, or must not listen on this address.
    """
    found = shutil.which("vllm") is not None
    if wanted == "vllm" and not found:
        raise UserError("--server: there is no command vllm; install vLLM, or leave --server out.")
    if wanted == "transformers" or not found:
        require_loopback(host, _NO_KEYS)
    elif not environment.VLLM_KEY.read():
        require_loopback(host, f"{environment.VLLM_KEY} is not set, the key that clients must send")


def choose_server(wanted: Server, checkpoint: Path, host: str) -> Literal["transformers", "vllm"]:
    """Decide which program serves a checkpoint.

    vLLM is taken where its command is found, for models that it can load without running the checkpoint's own code.

    Raises:
        UserError: The wanted one is not there, cannot load the model, or must not listen on this address.
    """
    require_server(wanted, host)
    needs_code = _needs_own_code(checkpoint)
    if wanted == "vllm" and needs_code:
        raise UserError(
            f"{checkpoint}: vLLM loads this generation only by running the Python files in the folder, which this "
            "command never does; leave --server out, or see docs/serving.md."
        )
    if wanted == "transformers" or needs_code or shutil.which("vllm") is None:
        require_loopback(host, _NO_KEYS)
        return "transformers"
    return "vllm"


def _needs_own_code(checkpoint: Path) -> bool:
    """Whether transformers knows the model only through this project."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from minicpmv_finetune.minicpmv.generations import detect_generation

    return detect_generation(checkpoint).model_type not in CONFIG_MAPPING_NAMES


def vllm_command(checkpoint: Path, host: str, port: int) -> list[str]:
    """The command that serves a checkpoint with vLLM; it reads the key from its own environment variable."""
    return [
        *("vllm", "serve", str(checkpoint), "--served-model-name", SERVED_NAME),
        *("--host", host, "--port", str(port), "--limit-mm-per-prompt", json.dumps({"image": 4})),
    ]


def build_app(model: LoadedModel) -> Any:
    """Build transformers' serving application for one loaded model; needs the extra `serve`.

    Returns:
        A FastAPI application.
    """
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState, Modality

    model.model.eval()
    model.model.generation_config = greedy_config(model, _NEW_TOKENS)

    class OneModel(ModelManager):
        """Has this model alone, under one name."""

        def _load_processor(self, *names: Any, **options: Any) -> Any:
            return ServedProcessor(model.encoder)

        def _load_model(self, *names: Any, **options: Any) -> Any:
            return model.model

        @staticmethod
        def get_model_modality(*model: Any, **options: Any) -> Any:
            return Modality.VLM

        @staticmethod
        def get_gen_models(*folder: Any) -> Any:  # type: ignore[override]  # the base class caches its result
            return [{"id": SERVED_NAME, "object": "model", "owned_by": "minicpmv-finetune", "created": 0}]

    class Chat(ChatCompletionHandler):
        """Answers greedily, as the evaluation does, unless a request has a temperature or top_p."""

        def _build_generation_config(self, body: dict[str, Any], *configs: Any, **options: Any) -> Any:
            if body.get("stop"):
                raise UserError("stop: not supported by this server; leave it out.")
            config = super()._build_generation_config(body, *configs, **options)
            temperature = body.get("temperature")
            if not body.get("generation_config"):
                config.do_sample = body.get("top_p") is not None if temperature is None else float(temperature) > 0
            return config

    models, state = OneModel(force_model=SERVED_NAME), GenerationState()
    # The handlers of other paths, which are removed below.
    others: Any = dict.fromkeys(
        ("completion_handler", "response_handler", "transcription_handler", "systemone_handler")
    )
    app = build_server(models, Chat(models, state), generation_state=state, **others)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in _PATHS]
    app.add_exception_handler(UserError, _refuse)
    # A page in a browser cannot reach the server under a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    return app


def _refuse(request: Any, error: Exception) -> Any:
    """The answer to a request with a mistake, as OpenAI's clients read it."""
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)


def run_app(app: Any, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until a signal ends the process."""
    import uvicorn

    announce(f"serving the model {SERVED_NAME} at http://{host}:{port}/v1; Ctrl-C ends it")
    uvicorn.run(app, host=host, port=port, log_level="warning")
