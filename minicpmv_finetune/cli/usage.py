"""Mistakes in a command line, in one sentence with the command to type next."""

from collections.abc import Iterable
from typing import Any

from minicpmv_finetune.options import did_you_mean


def usage_sentence(error: Exception) -> str:
    """The sentence for an exception of the command line's library; empty for any other exception.

    The library has its exceptions under different names in different versions, so they are known by what they have.
    """
    context: Any = getattr(error, "ctx", None)
    if not hasattr(error, "format_message") or context is None:
        return ""
    command, path = context.command, context.command_path
    place = f"{path.partition(' ')[2]}: ".removeprefix(": ")
    if name := getattr(error, "option_name", ""):
        if not hasattr(error, "possibilities"):
            return f"{place}{_as_clause(error.format_message())}; see `{path} --help`."
        known = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        return f"{place}no option {name}; {_instead(command, name, known)}see `{path} --help`."
    parameter = getattr(error, "param", None)
    if parameter is not None and parameter.required and not getattr(error, "message", ""):
        return f"{place}{_word(parameter)} is missing; type `{path} {_required(command)}`."
    if parameter is not None:
        return f"{place}{_word(parameter)}: {_as_clause(getattr(error, 'message', ''))}; see `{path} --help`."
    return f"{place}{_as_clause(error.format_message())}; see `{path} --help`."


def unknown_command(path: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a command that does not exist.

    Args:
        path: The words before it.
        name: The word that should be a command.
        known: The commands that there are.
    """
    close = did_you_mean(name, known).strip().removeprefix("did you mean ").removesuffix("?")
    return f"no command {name}; " + (f"did you mean `{path} {close}`?" if close else f"`{path} --help` lists all.")


def _instead(command: Any, name: str, known: list[str]) -> str:
    """What to type in place of an unknown option; empty if nothing is like it."""
    if any(parameter.name == "training_flags" for parameter in command.params):
        from minicpmv_finetune.components.train.flags import table

        flag = name.lstrip("-").replace("-", "_")
        if flag in table() and f"--{flag.replace('_', '-')}" not in known:
            return f"flags of the training are given as --training-flags '{{\"{flag}\": …}}', "
    return did_you_mean(name.replace("_", "-"), known)


def _required(command: Any) -> str:
    """Every parameter that the command cannot do without, as it is typed."""
    words = []
    for parameter in command.params:
        if parameter.required:
            words.append(_word(parameter) + (" …" if parameter.param_type_name == "option" else ""))
    return " ".join(words)


def _word(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    return str(parameter.opts[0] if is_option else parameter.metavar or parameter.name.upper())


def _as_clause(message: str) -> str:
    """A library's sentence as the beginning of one of ours."""
    text = " ".join(message.split()).removeprefix("Value error, ").rstrip(".")
    return text[:1].lower() + text[1:]
