"""Learning rates by part of the model (`--vision_lr`, `--resampler_lr`, `--embedding_lr`), and of LoRA+."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import PEFT_PREFIX
from minicpmv_finetune.minicpmv.generations import Generation

from .arguments import Arguments


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of a training.

    Attributes:
        usual: The rate of every part that has none of its own.
        by_part: Rates by the flag that sets them.
        modules: Modules that a flag's rate is for, by the flag; a module's full name.
        ratio: LoRA+: how many times the rate of B is that of A.
    """

    usual: float
    by_part: Mapping[str, float]
    modules: Mapping[str, tuple[str, ...]]
    ratio: float | None

    def of(self, name: str) -> float:
        """The rate of a parameter by its name."""
        path = name.removeprefix(PEFT_PREFIX)
        own = (flag for flag in self.by_part if any(path.startswith(f"{module}.") for module in self.modules[flag]))
        rate = next((self.by_part[flag] for flag in own), self.usual)
        return rate * self.ratio if self.ratio is not None and ".lora_B." in name else rate

    @property
    def are_equal(self) -> bool:
        """Whether every parameter has the usual rate."""
        return not self.by_part and self.ratio is None

    def create_plus_optimizer(
        self, model: Any, kind: type[Optimizer], options: Mapping[str, Any], weight_decay: float
    ) -> Optimizer:
        """PEFT's optimizer for LoRA+.

        Args:
            model: Model with adapters.
            kind: Class of the optimizer.
            options: Its arguments.
            weight_decay: Weight decay of matrices.
        """
        settings = {**options, "lr": self.usual, "loraplus_weight_decay": weight_decay}
        return create_loraplus_optimizer(model, kind, loraplus_lr_ratio=self.ratio or 1.0, **settings)

    def divide(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Divide the optimizer's groups so that each part has its rate; those of the usual rate come first.

        The Trainer logs the rate of the first group.
        """
        # LoRA+ in PEFT also gives the rate of B to norms and biases that are trained whole; here they keep their own.
        rates = {id(parameter): self.of(name) for name, parameter in _trained(model)}
        divided: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            by_rate: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_rate.setdefault(rates[id(parameter)], []).append(parameter)
            divided += [{**group, "params": members, "lr": rate} for rate, members in by_rate.items()]
        optimizer.param_groups[:] = sorted(divided, key=lambda group: group["lr"] != self.usual)


def learning_rates(model: nn.Module, generation: Generation, arguments: Arguments) -> LearningRates:
    """The learning rates that the flags describe.

    Raises:
        UserError: A flag is for a part in which nothing is trained.
    """
    training = arguments.training
    head = next((name for name, module in model.named_modules() if name.endswith("lm_head")), "lm_head")
    modules = {
        "vision_lr": (generation.vision_tower,),
        "resampler_lr": (generation.merger,),
        "embedding_lr": (generation.embed_tokens, head.removeprefix(PEFT_PREFIX)),
    }
    given = {flag: getattr(training, flag) for flag in modules}
    by_part = {flag: rate for flag, rate in given.items() if rate is not None}
    paths = [name.removeprefix(PEFT_PREFIX) for name, _ in _trained(model)]
    for flag in by_part:
        if not any(path.startswith(f"{module}.") for path in paths for module in modules[flag]):
            raise UserError(
                f"--{flag}: nothing in {' or '.join(modules[flag])} is trained; leave the flag out, or train that part."
            )
    return LearningRates(training.learning_rate, by_part, modules, arguments.lora.loraplus_lr_ratio)


def warn_of_tower(model: nn.Module, generation: Generation, arguments: Arguments) -> str:
    """A sentence if adapters' usual rate, which is too high for whole weights, trains the whole vision tower."""
    training = arguments.training
    tower = f"{PEFT_PREFIX}{generation.vision_tower}."
    is_whole = any(name.startswith(tower) and ".lora_" not in name for name, _ in _trained(model))
    if not training.use_lora or training.vision_lr is not None or not is_whole:
        return ""
    return (
        f"--vision_lr: the whole vision tower trains at the adapters' learning rate, {training.learning_rate:g}; whole "
        "weights usually need a tenth of it or less, so give --vision_lr, or --lora_targets llm,vision for adapters."
    )


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
