"""A checkpoint with random weights, made of a small config, for plugins that bring no other."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from mm_engine.errors import StartupError
from mm_engine.plugins.blame import one_line
from mm_engine.testing.oracle import quiet

SEED = 0
RECIPE = "1"  # part of the folder's name: raised when what is made changes
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def random_checkpoint(config_folder: Path) -> tuple[Path, str | None]:
    """Return a checkpoint made of `config_folder`, and why it has no weights, if so.

    It is made once and kept in the system's folder for temporary files. Weights are float32, the
    same each time, and wide enough that answers vary. It has none where transformers doesn't know
    the architecture: then the plugin's own model gets random weights.

    Raises:
        StartupError: the config can't be read or the folder lacks a file that can't be made.
    """
    folder = _home(config_folder)
    note = folder / "no-weights.txt"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary, "checkpoint")
            _make(config_folder, made, note.name)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was faster
                    raise
    return folder, note.read_text("utf-8") if note.is_file() else None


def _home(config_folder: Path) -> Path:
    digest = hashlib.sha256(f"{RECIPE} {transformers.__version__} {torch.__version__}".encode())
    for file in sorted(path for path in config_folder.iterdir() if path.is_file()):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    parent = Path(tempfile.gettempdir(), f"mm-engine-checkpoints-{os.getuid()}")
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.stat().st_uid != os.getuid():
        raise StartupError(
            f"the folder for temporary checkpoints is somebody else's: {parent}. "
            "Set TMPDIR to a folder of your own."
        )
    return parent / digest.hexdigest()[:24]


def _make(config_folder: Path, folder: Path, note: str) -> None:
    ignore = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(config_folder, folder, ignore=ignore)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartupError(
            f"the config for tests can't be read: {config_folder} ({one_line(error)}). Correct it."
        ) from error
    if not (folder / "tokenizer.json").is_file():
        byte_tokenizer(config).save_pretrained(folder)
    try:
        model = random_model(config)
    except ValueError as error:  # no model of transformers has this config
        reason = f"transformers has no model for {type(config).__name__} ({one_line(error)})"
        (folder / note).write_text(reason, "utf-8")
        return
    with quiet(), tempfile.TemporaryDirectory() as temporary:  # it writes a config.json, too
        model.save_pretrained(temporary, max_shard_size="100GB")
        shutil.copyfile(Path(temporary, "model.safetensors"), folder / "model.safetensors")


def random_model(config: Any, seed: int = SEED) -> Any:
    """Return transformers' model of `config` in float32; nothing in it is zero or one by default.

    Raises:
        ValueError: transformers has none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15 if "embed" in name else 0.12, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.05, generator=generator)
            elif "norm" in name:  # a norm that is left out, or another's, shows
                noise = torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator)
                parameter.add_(noise)
    return model


def byte_tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer that can write any text: the special tokens that `config` numbers, and a
    token for each byte.

    Raises:
        StartupError: the config names no image token, or its vocabulary is too small.
    """
    text = config.get_text_config()
    special = _special_tokens(config, text)
    vocabulary: dict[str, int] = dict(special)
    taken = set(special.values())
    free = (index for index in range(text.vocab_size) if index not in taken)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary.update(zip(alphabet, free, strict=False))
    if len(vocabulary) < len(special) + len(alphabet):
        raise StartupError(
            f"the config's vocabulary is too small for a tokenizer of bytes: {text.vocab_size}. "
            f"Set vocab_size of the text_config to {len(special) + len(alphabet)} or more, "
            "or put a tokenizer.json into the folder."
        )
    known = set(vocabulary.values())
    for index in range(max(known)):  # ids without a gap
        if index not in known:
            vocabulary[f"<unused{index}>"] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if "<s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special["<s>"])]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: token for name, token in names.items() if token in special},
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=CHAT_TEMPLATE if "<s>" in special else CHAT_TEMPLATE[15:],
    )


def _special_tokens(config: Any, text: Any) -> Mapping[str, int]:
    ids = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    image = next((index for index in ids if isinstance(index, int)), None)
    if image is None:
        raise StartupError(
            "the config for tests names no image token: image_token_id is not set. Set it."
        )
    special: dict[str, int] = {IMAGE_TOKEN: image}
    for token, name in (("<s>", "bos"), ("</s>", "eos"), ("<pad>", "pad")):
        index = getattr(text, f"{name}_token_id", None)
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and index >= 0 and index not in special.values():
            special[token] = index
    return special
