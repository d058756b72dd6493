"""What must hold before anything runs: hooks that fit, a checkpoint, a model with its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_engine.errors import StartupError
from mm_engine.models.checkpoint import read_weights
from mm_engine.plugins.registration import hook_names
from mm_engine.testing.oracle import Refused
from mm_engine.testing.registry import check
from mm_engine.testing.sizes import picture

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject


@check("hooks-fit")
def hooks_fit(subject: Subject) -> str:
    """The module can be imported; its hooks are spelt and called as the specifications say."""
    hooks = subject.loaded.hooks
    left = len(hook_names()) - len(hooks)
    return f"{', '.join(hooks)}" + (f"; {left} by default" if left else "")


@check("checkpoint-opens")
def checkpoint_opens(subject: Subject) -> str:
    """There is a checkpoint, and an engine could take requests for it."""
    _ = subject.pipeline  # made here, so that what is wrong with it is blamed here
    return subject.target.origin


@check("model-builds")
def model_builds(subject: Subject) -> str:
    """`model_class` gives a module with `SupportsVision` that `cls(ctx)` builds."""
    try:
        model = subject.model
    except StartupError as error:
        raise subject.blame(
            "model_class",
            "a model of which the checkpoint has every tensor, in its shape",
            str(error),
            "do weight_prefixes rename the checkpoint's names to the model's? "
            "Does the config say what the model is built by?",
        ) from error
    number = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}, {number / 1e6:.1f} M parameters"


@check("weights-load")
def weights_load(subject: Subject) -> str:
    """Every tensor of the checkpoint is taken, or doesn't matter for what the model says."""
    folder, load_format = subject.checkpoint
    if load_format == "dummy":
        return f"random: {subject.no_oracle}"
    tensors = dict(read_weights(folder, progress=False))
    unused = {
        name: tensors[name] for name in subject.model.load_weights(iter(tensors.items())).unused
    }
    if not unused:
        return f"all of {len(tensors)} tensors"
    listed = _listed(sorted(unused))
    if subject.oracle is None:
        return f"{len(unused)} of {len(tensors)} tensors unused: {listed}"
    ids = (*subject.ctx.tokenizer("a")["input_ids"], subject.placeholder_id)
    side = max(subject.geometry.sides, default=100)
    try:
        inputs = subject.oracle.inputs(ids, [picture((2 * side, side))])
    except Refused as error:
        return f"{len(unused)} of {len(tensors)} tensors unused: {listed} (not judged: {error})"
    lost = subject.oracle.reaching(unused, inputs)
    if lost:
        own = "load_weights" in vars(type(subject.model))
        raise subject.blame(
            "load_weights" if own else "model_class",
            f"every tensor that the model's answers depend on to be taken, such as {lost[0]}",
            f"{len(lost)} of the checkpoint's {len(tensors)} left over: {_listed(lost)}",
            "does the model have a parameter for it, and does weight_prefixes rename the "
            "checkpoint's name to it? Is the tower built as deep as its features are taken?",
        )
    return f"{len(tensors)} tensors, {len(unused)} unused that answers don't depend on: {listed}"


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
