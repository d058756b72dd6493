"""Reading a checkpoint's folder: config, tokenizer, end-of-sequence ids, weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from mm_engine.errors import StartupError

#: What is fetched from the Hub: never pickled weights, never code.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def locate(model: str) -> Path:
    """The checkpoint's folder: `model` itself, or a Hub id's snapshot (fetched if need be).

    Raises:
        StartupError: there is no such folder and no such repository.
    """
    path = Path(model).expanduser()
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
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartupError(
            f"checkpoint not found: {model} is neither a folder nor to be had from the Hub "
            f"({type(error).__name__}: {cause}). Check the name and the network."
        ) from error


def read_config(path: Path) -> tuple[Any, str]:
    """The checkpoint's config and its architecture.

    Raises:
        StartupError: config.json can't be read or names no single architecture.
    """
    try:
        raw = json.loads((path / "config.json").read_text())
        architectures = raw.get("architectures") or []
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartupError(
            f"config.json can't be read: {path} ({type(error).__name__}: {_first_line(error)}). "
            "Fetch the checkpoint again."
        ) from error
    if len(architectures) != 1:
        raise StartupError(
            f"config.json must name one architecture: {path} names {architectures or 'none'}. "
            'Add "architectures": ["…"] to it.'
        )
    return config, str(architectures[0])


def read_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer, backed by the `tokenizers` library.

    Raises:
        StartupError: it can't be read or has no fast form.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what its many readers raise
        raise StartupError(
            f"tokenizer can't be read: {path} ({type(error).__name__}: {_first_line(error)}). "
            "Fetch the checkpoint again, tokenizer.json included."
        ) from error
    if not tokenizer.is_fast:
        raise StartupError(
            f"tokenizer has no fast form: {path} ({type(tokenizer).__name__}). "
            "Convert it with transformers and save tokenizer.json."
        )
    return tokenizer


def read_eos_token_ids(path: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json's, else the config's, else the tokenizer's."""
    found: Any = None
    file = path / "generation_config.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text()).get("eos_token_id")
        except ValueError as error:
            raise StartupError(
                f"generation_config.json can't be read: {path} ({_first_line(error)}). "
                "Fetch the checkpoint again."
            ) from error
    if found is None:
        found = getattr(config.get_text_config(), "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files; the index, if there is one, says which.

    Raises:
        StartupError: none, or one that the index names is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    missing = [name for name in names if not (path / name).is_file()]
    if missing or not names:
        what = ", ".join(missing[:3]) if missing else "no *.safetensors file"
        raise StartupError(
            f"weights are missing: {path} lacks {what}. Fetch the checkpoint again."
            if missing
            else f"weights are missing: {path} has {what}. "
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
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (a safe_open is not a dict)
                        tensor = shard.get_tensor(name)
                        yield name, tensor
                        bar.advance(task, tensor.numel() * tensor.element_size())
            except SafetensorError as error:
                raise StartupError(
                    f"a shard of the weights is corrupt: {file} ({_first_line(error)}). "
                    "Fetch the file again."
                ) from error
        bar.update(task, completed=bar.tasks[0].total)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
