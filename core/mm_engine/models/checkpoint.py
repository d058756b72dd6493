"""Reading a checkpoint's folder: config, tokenizer, end-of-sequence ids, weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from mm_engine.errors import StartupError
from mm_engine.models.tensor_file import TensorFile

#: What is fetched from the Hub: never pickled weights, never code.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
MAX_CAUSE_LENGTH = 300  # characters of a foreign error's message that ours repeats
#: What reading a file of JSON raises when the file is damaged or is something else.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def locate(model: str) -> Path:
    """The checkpoint's folder: `model` itself, or a Hub id's snapshot (fetched if need be).

    Raises:
        StartupError: there is no such folder and no such repository.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # ~name of a user who isn't there
        path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartupError(
                f"no checkpoint in the folder: {path} has no config.json. "
                "Name the folder that holds config.json and the weights."
            )
        return path.resolve()
    if path.exists() or model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise StartupError(
            f"checkpoint not found: {model} is not a folder. "
            "Name a checkpoint's folder or a Hub id such as org/name."
        )
    import httpx  # here: not every start asks the Hub

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
        httpx.HTTPError,
    ) as error:
        raise StartupError(
            f"checkpoint not found: {model} is neither a folder nor to be had from the Hub "
            f"({_cause(error)}). Check the name and the network."
        ) from error


def read_architecture(path: Path) -> str:
    """The name under which a plugin serves the checkpoint.

    Raises:
        StartupError: config.json can't be read or names no single architecture.
    """
    try:
        architectures = json.loads((path / "config.json").read_text("utf-8")).get("architectures")
    except UNREADABLE as error:
        raise _bad_config(path, error) from error
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise StartupError(
            f"config.json must name one architecture: {path} names {architectures or 'none'}. "
            'Add "architectures": ["…"] to it.'
        )
    return str(architectures[0])


def read_config(path: Path) -> tuple[Any, str]:
    """The checkpoint's config and its architecture.

    A plugin may bring the config's class, so load it first (`read_architecture` says which).

    Raises:
        StartupError: config.json can't be read or names no single architecture, or the weights
            are quantised.
    """
    architecture = read_architecture(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (*UNREADABLE, StrictDataclassError, ArithmeticError) as error:
        raise _bad_config(path, error) from error
    if getattr(config, "quantization_config", None):
        raise StartupError(
            f"quantised checkpoints are not supported: {path} has a quantization_config. "
            "Use the checkpoint in bfloat16, float16 or float32."
        )
    return config, architecture


def read_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer, backed by the `tokenizers` library.

    Raises:
        StartupError: it can't be read or has no fast form.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what its many readers raise
        raise StartupError(
            f"tokenizer can't be read: {path} ({_cause(error)}). "
            "Fetch the checkpoint again, tokenizer.json included."
        ) from error
    if not tokenizer.is_fast:
        raise StartupError(
            f"tokenizer has no fast form: {path} ({type(tokenizer).__name__}). "
            "Convert it with transformers and save tokenizer.json."
        )
    return tokenizer


def read_eos_token_ids(path: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json's, else the config's, else the tokenizer's.

    Raises:
        StartupError: a file can't be read, or what it names is no id.
    """
    file = path / "generation_config.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text("utf-8")).get("eos_token_id")
            ids = _token_ids(found)
        except UNREADABLE as error:
            raise StartupError(
                f"generation_config.json can't be read: {path} ({_cause(error)}). "
                "Correct it, or fetch the checkpoint again."
            ) from error
        if found is not None:
            return ids
    try:
        ids = _token_ids(getattr(config.get_text_config(), "eos_token_id", None))
    except ValueError as error:
        raise _bad_config(path, error) from error
    return ids or _token_ids(tokenizer.eos_token_id)


def _token_ids(found: Any) -> tuple[int, ...]:
    ids = found if isinstance(found, list | tuple) else [] if found is None else [found]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"eos_token_id is no token id: {found!r}")
    return tuple(ids)


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files: the one, those that the index names, or all there are.

    Raises:
        StartupError: none, one that the index names is missing or lies outside of the folder, or
            the index can't be read.
    """
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():  # it wins over an index, as in transformers
        names = ["model.safetensors"]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name or "\\" in name]
            missing = [name for name in names if not (path / name).is_file()]
        except UNREADABLE as error:
            raise StartupError(
                f"the index of the weights can't be read: {index} ({_cause(error)}). "
                "Fetch the checkpoint again."
            ) from error
        if outside:
            raise StartupError(
                f"the index of the weights names a file outside of the checkpoint: {index} names "
                f"{outside[0]}. Fetch the checkpoint again."
            )
        if missing:
            raise StartupError(
                f"weights are missing: {path} lacks {', '.join(missing[:3])}. "
                "Fetch the checkpoint again."
            )
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise StartupError(
            f"weights are missing: {path} has no *.safetensors file. "
            "Convert the checkpoint to safetensors, or start with --load-format dummy."
        )
    return [path / name for name in names]


def read_weights(path: Path, *, progress: bool) -> Iterator[tuple[str, Tensor]]:
    """Every `(name, tensor)` of the checkpoint, memory-mapped, with a progress bar on stderr.

    Raises:
        StartupError: a shard is missing or corrupt.
    """
    files = weight_files(path)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    ) as bar:
        task = bar.add_task("Loading weights", total=sum(file.stat().st_size for file in files))
        for file in files:
            try:
                with contextlib.closing(TensorFile(file)) as shard:
                    for name, tensor in shard.tensors():
                        yield name, tensor
                        bar.advance(task, tensor.numel() * tensor.element_size())
            except (SafetensorError, OSError, ValueError) as error:
                raise StartupError(
                    f"a shard of the weights is corrupt: {file} ({_cause(error)}). "
                    "Fetch the file again."
                ) from error
        bar.update(task, completed=bar.tasks[0].total)


def _bad_config(path: Path, error: BaseException) -> StartupError:
    return StartupError(
        f"config.json can't be read: {path} ({_cause(error)}). "
        "Correct it, or fetch the checkpoint again."
    )


def _cause(error: BaseException) -> str:
    """The error's type and message, on one line and shortened."""
    message = " ".join(str(error).split())
    short = message if len(message) <= MAX_CAUSE_LENGTH else message[: MAX_CAUSE_LENGTH - 1] + "…"
    return f"{type(error).__name__}: {short}" if short else type(error).__name__
