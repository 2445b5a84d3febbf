"""The inputs of a run on a cluster: read from the command line and a recipe, checked, and the base model pinned.

All checks happen before anything is sent: names, types and ranges by the table of inputs, and whether the cluster can
read the addresses.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kubernetes.utils.quantity import parse_quantity

from minicpmv_finetune import environment, storage
from minicpmv_finetune.components.train.flags import as_flags, pop_num_nodes, take_processes
from minicpmv_finetune.errors import MistakesError, RetryableError, UserError
from minicpmv_finetune.estimate.cost import estimate_main_memory
from minicpmv_finetune.estimate.published import published_model_like
from minicpmv_finetune.inputs.checks import check_run
from minicpmv_finetune.inputs.planned import planned
from minicpmv_finetune.inputs.recipe import over_recipe, recipe_for
from minicpmv_finetune.inputs.table import INPUTS
from minicpmv_finetune.minicpmv.generations import parse_json
from minicpmv_finetune.options import raise_mistakes
from minicpmv_finetune.pipelines.pipeline import Pipeline
from minicpmv_finetune.terminal import print_sentence

from .forwarding import reachable
from .profile import Profile
from .store import use_store

BaseModelPlace = Literal["object storage", "volume", "hub", "this machine"]


def read_parameters(pipeline: Pipeline, assignments: Sequence[str], recipe: str | None = None) -> dict[str, Any]:
    """Inputs from a recipe and from `name=value` words, which have priority.

    Args:
        pipeline: The pipeline that gets them.
        assignments: The words.
        recipe: Name of a recipe of the package, or path of a YAML file of inputs.

    Raises:
        UserError: The file cannot be read, or a word has no value.
    """
    given = {}
    for assignment in assignments:
        name, mark, value = assignment.partition("=")
        if not mark:
            raise UserError(f"{assignment}: no value; write it as name=value.")
        given[name] = value
    return over_recipe(recipe_for(recipe, pipeline.inputs), given) if recipe else given


def resolve_parameters(pipeline: Pipeline, given: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """The inputs in the pipeline's types, with a base model on the hub pinned to its current commit.

    Without the commit, a schedule or a retry would fetch whatever the branch contains by then, and results would be
    compared with a base model that nobody chose.

    Raises:
        UserError: An input is unknown, missing, of the wrong type, or an address that the cluster cannot read; or the
            hub has no such model.
        RetryableError: The hub does not answer.
    """
    mistakes = []
    for name in ("data_uri", "eval_data_uri"):
        address = str(given.get(name) or "")
        is_readable = storage.is_object_uri(address) or address.startswith("hf://") or profile.claim_of(address)
        if address and not is_readable:
            mistakes.append(not_reachable(name, address))
    base_model = str(given.get("base_model_uri") or INPUTS["base_model_uri"].default)
    place = base_model_place(base_model, profile)
    if place == "this machine":
        mistakes.append(not_reachable("base_model_uri", base_model))
    if profile.mlflow is None:
        mistakes += needs_registry(pipeline, given)
    _use_store_if_possible(profile)
    checked: dict[str, Any] = {}
    try:
        checked = check_run(pipeline.inputs, given, runs_here=False)
    except MistakesError as error:
        mistakes += error.sentences
    flags = checked.get("training_flags", given.get("training_flags"))
    raise_mistakes(mistakes + _needs_more_gpus(flags if isinstance(flags, dict) else {}, profile))
    raise_mistakes(_needs_more_memory(checked, base_model, profile))
    if profile.mlflow is None:
        checked["registered_model"] = ""
    return {**checked, "base_model_uri": pin_to_commit(base_model, profile) if place == "hub" else base_model}


def needs_registry(pipeline: Pipeline, given: Mapping[str, Any]) -> list[str]:
    """A sentence for what a run without MLflow cannot do; nothing if it can do all that is given."""
    remedy = f"set {environment.MLFLOW}, or mlflow in the profile (k8s/README.md)"
    if "plan-retraining" in pipeline.steps:
        return [f"{pipeline.name}: needs the champion in MLflow's registry, but the profile names no MLflow; {remedy}."]
    if given.get("registered_model"):
        return [f"registered_model: the profile names no MLflow to register it in; {remedy}, or leave the input out."]
    return []


def _needs_more_gpus(training_flags: Mapping[str, Any], profile: Profile) -> list[str]:
    """A sentence if the train step would start more processes than its pod has GPUs; nodes have their own number."""
    given = dict(training_flags)
    try:
        nodes = pop_num_nodes(given)
        _, processes = take_processes(as_flags(given))
    except UserError:  # which the checks of the run name
        return []
    accelerator = profile.step_settings("train").accelerator
    if profile.train_on_nodes or nodes > 1 or accelerator is None or (processes or 1) <= accelerator.count:
        return []
    return [
        f"training_flags: nproc_per_node is {processes}, but the profile gives train {accelerator.count} "
        f"GPU{'s' * (accelerator.count > 1)}; give --gpus {processes}, or nproc_per_node {accelerator.count}."
    ]


def _needs_more_memory(inputs: Mapping[str, Any], base_model: str, profile: Profile) -> list[str]:
    """A sentence if FSDP2 writes more main memory at its start than the profile gives the train step's pod.

    Before the base model is fetched only the sizes of published models are known.
    """
    flags, train = dict(inputs.get("training_flags", {})), profile.step_settings("train")
    if flags.get("strategy") != "fsdp2" or profile.train_on_nodes or pop_num_nodes(dict(flags)) > 1:
        return []
    if train.accelerator:
        flags.setdefault("nproc_per_node", train.accelerator.count)
    try:
        settings = planned({**inputs, "training_flags": flags})
        config = parse_json(storage.read_model_file(base_model, "config.json"), base_model)
        model = published_model_like(config, base_model, settings.targets)
    except (UserError, RetryableError):  # which the checks of the run have named, or which concern `plan` alone
        return []
    if model is None or settings.loading is None:
        return []
    needed, limit = estimate_main_memory(model, settings.recipe, settings.loading), train.memory[1]
    if needed <= parse_quantity(limit):
        return []
    return [
        f"training_flags: before fsdp2 has divided the model, {settings.loading.processes} processes write "
        f"{needed / 1e9:,.0f} GB of main memory, but the profile limits train to {limit}; raise steps.train.memory, "
        "train in bf16, or train fewer modules whole."
    ]


def _use_store_if_possible(profile: Profile) -> None:
    """Let the checks look into the profile's store; where they cannot, the run itself still may."""
    try:
        use_store(profile)
    except (UserError, RetryableError) as error:
        print_sentence(f"warning: the object store is not looked into before the run: {error}")


def base_model_place(address: str, profile: Profile) -> BaseModelPlace:
    """Where a base model is stored: in an object store, on a volume of the profile, on the hub, or only here."""
    if storage.is_object_uri(address):
        return "object storage"
    if profile.claim_of(address):
        return "volume"
    return "this machine" if address.startswith((".", "/", "~")) else "hub"


def not_reachable(name: str, address: str) -> str:
    """The sentence about an address of this machine."""
    how = "" if name == "base_model_uri" else ", as `minicpmv-finetune upload` does"
    return f"{name}: {address} is a path on this machine, which the cluster cannot read; copy it to s3:// first{how}."


def pin_to_commit(model: str, profile: Profile) -> str:
    """The address of a model on the hub with its current commit, `owner/name@COMMIT`; unchanged with a revision.

    The hub is the mirror that the profile names for the run, unless `HF_ENDPOINT` names one for this machine.

    Raises:
        UserError: The hub has no such model.
        RetryableError: The hub does not answer.
    """
    name, _, revision = model.removeprefix("hf://").partition("@")
    if revision:
        return model
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    is_named = environment.Variable("HF_ENDPOINT", "read by huggingface_hub").read()
    mirror = "" if is_named else reachable(profile.hub.endpoint)
    try:
        commit = HfApi(endpoint=mirror or None).model_info(name, timeout=10).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name}: the hub has no such model; check the spelling, or set HF_TOKEN.") from error
    except Exception as error:
        # The hub's client passes its HTTP library's exceptions on, and has changed that library before.
        raise RetryableError(
            f"{name}: the hub does not answer, so the current commit is not known; write {name}@COMMIT, or try again."
        ) from error
    return f"{model}@{commit}"
