"""From a name to a model in memory: checkpoint, plugin, context, weights."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from mm_engine_kernels import ops
from torch import nn
from transformers.initialization import no_init_weights

from mm_engine.config import DEFAULT_LIMITS, EngineConfig, ModelContext, Shard
from mm_engine.errors import MMEngineError, StartupError
from mm_engine.models import checkpoint
from mm_engine.models.decoder import Decoder
from mm_engine.models.interfaces import SupportsVision
from mm_engine.models.layers import Linear, alone_in_memory, pack_linears
from mm_engine.models.packed_cache import key_of
from mm_engine.models.packed_weights import pack_encoders
from mm_engine.models.quantization import Quantization
from mm_engine.models.quantization_schemes import Scheme, make_scheme
from mm_engine.models.weights import WeightReport, does_not_fit, fill_random
from mm_engine.plugins.blame import kind_of, may_be_the_users, one_line
from mm_engine.plugins.discovery import demos, find, load
from mm_engine.plugins.plugin import Plugin
from mm_engine.plugins.record import PluginRecord

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint and the plugin that serves it; no weights yet. Cheap: each process opens it."""

    config: EngineConfig
    ctx: ModelContext
    plugin: Plugin
    eos_token_ids: tuple[int, ...]


def open_model(
    config: EngineConfig, record: PluginRecord | None = None, shard: Shard | None = None
) -> OpenedModel:
    """Read what `config.model` is and load the plugin that owns its architecture.

    With `record` it is the plugin that another process found, and no other. `shard` is the part of
    the model that this process is to hold; rank 0's, where it isn't given.

    Raises:
        StartupError: no such checkpoint, no plugin for it, or options that contradict it.
    """
    bundled = demos()
    path = bundled[config.model] if config.model in bundled else checkpoint.locate(config.model)
    found_here = record is None
    record = record or find(checkpoint.read_architecture(path), config.plugins)
    plugin = load(record, timeout=config.hook_timeout)
    for notice in plugin.notices if found_here else ():  # the process that found it says it
        logger.warning("%s", notice)
    # After its plugin, which may bring the config's class.
    hf_config, architecture = checkpoint.read_config(path)
    tokenizer = checkpoint.read_tokenizer(path)
    ctx = ModelContext(
        hf_config=hf_config,
        checkpoint=path,
        tokenizer=tokenizer,
        dtype=pick_dtype(config, hf_config, says=found_here),
        max_model_len=pick_max_model_len(config, hf_config),
        limits=MappingProxyType({**DEFAULT_LIMITS, **config.limit_mm_per_prompt}),
        architecture=architecture,
        shard=shard or Shard(0, config.tensor_parallel_size),
    )
    eos = checkpoint.read_eos_token_ids(path, hf_config, tokenizer)
    return OpenedModel(config, ctx, plugin, eos)


def pick_device(config: EngineConfig, rank: int = 0) -> torch.device:
    """The device to run on; `auto` takes CUDA where there is one. Each rank has a GPU of its own.

    Raises:
        StartupError: the device asked for isn't there.
    """
    if config.device == "auto":
        config = replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise StartupError("device is not available: cuda. Use --device cpu, or check the driver.")
    if config.device not in ("cpu", "cuda"):
        raise StartupError(f"device is not known: {config.device}. Use auto, cpu or cuda.")
    if config.device == "cpu":
        return torch.device("cpu")
    size, num_cards = config.tensor_parallel_size, torch.cuda.device_count()
    if size > num_cards:
        raise StartupError(
            f"tensor_parallel_size is above the number of GPUs: {size} of {num_cards}. "
            f"Use --tensor-parallel-size {num_cards}, or make more visible (CUDA_VISIBLE_DEVICES)."
        )
    torch.cuda.set_device(rank)  # a process computes on one
    return torch.device("cuda", rank)


def pick_dtype(config: EngineConfig, hf_config: Any, *, says: bool = False) -> torch.dtype:
    """The dtype of weights and cache. `auto` is the checkpoint's; on a CPU bfloat16 for float16,
    whose instructions few CPUs have, and the other way round on a card that is too old for it,
    which is logged if `says`.

    Raises:
        StartupError: the name is none of float32, bfloat16, float16, or the card is too old.
    """
    if config.dtype != "auto":
        if config.dtype not in DTYPES:
            raise StartupError(
                f"dtype is not known: {config.dtype}. Use auto, {', '.join(DTYPES)}."
            )
        if config.dtype == "bfloat16" and (card := _card_without_bfloat16(config)) is not None:
            raise StartupError(f"dtype is not for this card: bfloat16. {card}: --dtype float16.")
        return DTYPES[config.dtype]
    own = hf_config.dtype or getattr(hf_config.get_text_config(), "dtype", None)
    if own not in DTYPES.values() or (own == torch.float16 and pick_device(config).type == "cpu"):
        own = torch.bfloat16
    if own == torch.bfloat16 and (card := _card_without_bfloat16(config)) is not None:
        if says:
            logger.info("Computing in float16 instead of bfloat16: %s.", card)
        return torch.float16
    assert isinstance(own, torch.dtype)
    return own


def _card_without_bfloat16(config: EngineConfig) -> str | None:
    """Why this model's cards don't compute in bfloat16; None: they do, or there is none."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    for index in range(min(config.tensor_parallel_size, torch.cuda.device_count())):
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            name = torch.cuda.get_device_name(index)
            return f"{name} has compute capability {major}.{minor}, and bfloat16 takes 8.0"
    return None


def pick_max_model_len(config: EngineConfig, hf_config: Any) -> int:
    """The most tokens of one prompt and its answer: the model's, or less if asked for.

    Raises:
        StartupError: more than the model has positions for, less than one, or the model has none.
    """
    own = getattr(hf_config.get_text_config(), "max_position_embeddings", 2048)
    if type(own) is not int or own < 1:
        raise StartupError(
            f"max_position_embeddings must be a whole number above 0: {own!r}. "
            "Correct it in config.json."
        )
    if config.max_model_len is None:
        return own
    if not 1 <= config.max_model_len <= own:
        raise StartupError(
            f"max_model_len is out of range: {config.max_model_len}. "
            f"This checkpoint takes from 1 to {own} tokens."
        )
    return config.max_model_len


@contextmanager
def _uninitialised(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in `dtype` without spending time on weights that are about to be loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what loading it was like."""

    model: Any
    num_parameters: int  # tower included
    seconds: float


def load_model(opened: OpenedModel, device: torch.device) -> LoadedModel:
    """Build the plugin's model, load (or draw) its weights, move it to `device`.

    Raises:
        StartupError: weights are missing, corrupt or of other shapes, memory is too small, or the
            weights can't be quantised as asked for, here or at all.
        PluginError: the plugin's class can't be built.
    """
    start = time.perf_counter()
    scheme = make_scheme(opened.config.quantization, device, opened.ctx.dtype)
    try:
        model = _load(opened, scheme).to(device).eval()
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        num_parameters += sum(m.num_packed for m in model.modules() if isinstance(m, Linear))
        pack_linears(model)
        pack_encoders(model)
        pack_heads(model)
    except (RuntimeError, MemoryError) as error:
        if not does_not_fit(error):
            raise
        raise StartupError(
            f"the model doesn't fit in memory: {opened.ctx.checkpoint} in {opened.ctx.dtype} on "
            f"{device} ({one_line(error)}). Serve it where there is more, or correct the sizes in "
            "config.json."
        ) from error
    return LoadedModel(model, num_parameters, time.perf_counter() - start)


def _load(opened: OpenedModel, scheme: Scheme | None) -> Any:
    ctx, plugin, config = opened.ctx, opened.plugin, opened.config
    model_class = plugin.model_class(ctx)
    try:
        with _uninitialised(ctx.dtype):
            model: Any = model_class(ctx)
    except MMEngineError:
        raise
    except BaseException as error:  # SystemExit too: a plugin doesn't end the engine
        if may_be_the_users(error) or does_not_fit(error):
            raise
        fact = f"{model_class.__name__}(ctx) raised {one_line(error)}"
        raise plugin.blame("model_class", fact) from error
    if not isinstance(model, SupportsVision) or not isinstance(model, nn.Module):
        raise plugin.blame(
            "model_class", f"expected an nn.Module with SupportsVision, got {model_class.__name__}"
        )
    quantization = None if scheme is None else Quantization(model, scheme)
    if quantization is not None and config.packed_cache is not None:
        _use_cache(quantization, opened)
    if config.load_format == "dummy":
        fill_random(model, config.seed)
    elif config.load_format == "auto":
        weights = checkpoint.read_weights(ctx.checkpoint, progress=config.progress)
        try:
            report = model.load_weights(weights)
        except MMEngineError:
            raise
        except BaseException as error:
            if may_be_the_users(error) or does_not_fit(error):
                raise
            fact = f"raised {one_line(error)}"
            raise plugin.blame("load_weights", fact, error) from error
        if not isinstance(report, WeightReport):
            fact = f"expected a WeightReport, got {kind_of(report)}"
            raise plugin.blame("load_weights", fact)
        if report.missing:
            raise _missing(ctx, report)
    else:
        raise StartupError(f"load format is not known: {config.load_format}. Use auto or dummy.")
    if quantization is not None:
        quantization.finish(progress=config.progress)
    return model


def pack_heads(model: nn.Module) -> None:
    """Pack heads that are tied to embeddings which nobody else reads."""
    alone = alone_in_memory(model)
    for module in model.modules():
        if isinstance(module, Decoder) and alone(module.embedding.weight):
            module.pack_head()


def _use_cache(quantization: Quantization, opened: OpenedModel) -> None:
    """Have quantised weights kept in the folder that the config names: a CPU's, of a checkpoint."""
    ctx, config, scheme = opened.ctx, opened.config, quantization.scheme
    if scheme.device.type != "cpu" or config.load_format != "auto" or config.packed_cache is None:
        return
    kernels = ops.chosen("cpu")
    try:
        # Whatever may give the weights another order, or other numbers.
        code = [*_code_of("mm_engine"), *_code_of("mm_engine_kernels")]
        code += _code_of(type(quantization.model).__module__)
        key = key_of(
            checkpoint.weight_files(ctx.checkpoint),
            code,
            scheme=f"{scheme.name} {type(scheme).__name__}",
            kernels=f"{kernels.name} {kernels.version}",
            torch=torch.__version__,
            dtype=ctx.dtype,
            plugin=opened.plugin.label,
            architecture=ctx.architecture,
            shard=(ctx.shard.rank, ctx.shard.size),
            layers=[(name, list(m.weight.shape)) for name, m in quantization.by_name.items()],
        )
    except OSError as error:
        logger.warning("Packed weights aren't kept: %s.", one_line(error))
        return
    quantization.use_cache(Path(config.packed_cache).expanduser(), key)


def _code_of(module: str) -> list[Path]:
    """The files of the package that a module is of; of one outside of packages, its own."""
    loaded, top = sys.modules.get(module), sys.modules.get(module.partition(".")[0])
    file, package = getattr(loaded, "__file__", None), getattr(top, "__file__", None)
    if file is None:
        raise FileNotFoundError(f"no file of {module} is known")
    if package is None or not hasattr(top, "__path__"):
        return [Path(file)]
    found = Path(package).parent.rglob("*")
    return sorted(path for path in found if path.suffix in (".py", ".so", ".pyd"))


def _missing(ctx: ModelContext, report: WeightReport) -> StartupError:
    """Names what is missing, and what nothing took: they may be the same by other names."""
    fact = (
        f"weights are missing: {ctx.checkpoint} lacks {len(report.missing)} of the model's "
        f"tensors, {report.missing[0]} among them"
    )
    if not report.unused:
        return StartupError(f"{fact}. Fetch the checkpoint again.")
    ends = {name.rsplit(".", 2)[-2:][0] for name in report.missing}
    likely_first = sorted(report.unused, key=lambda name: name.rsplit(".", 2)[-2:][0] not in ends)
    return StartupError(
        f"{fact}; nothing took {len(report.unused)} of the checkpoint's, such as "
        f"{', '.join(likely_first[:3])}. If names differ, correct the model's weight_prefixes; "
        "else fetch the checkpoint again."
    )
