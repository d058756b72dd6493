"""Which backend is chosen, and why, on cards that aren't here with packages that aren't installed.

Only what lies outside of this program is faked: the import of a package, its metadata, and what a
card computes.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops
from packaging.version import Version

from mm_engine.attention import importing, select, torch_varlen
from mm_engine.attention.backend import Attention, Needs
from mm_engine.attention.select import BACKENDS, choose, needs_of
from mm_engine.config import ATTENTION_BACKENDS
from mm_engine.errors import StartupError

NO_FLASH = "flash-attn isn't installed: pip install --no-build-isolation 'mm-engine[cuda]'"
NO_TRITON = "triton isn't installed: pip install 'mm-engine[cuda]'"
TORCH = importing.torch_version()

#: What varlen_attn takes from PyTorch 2.13 on.
PAGED = ("seqused_k", "block_table", "num_splits", "enable_gqa")

World = Callable[..., None]


def flash_attn_varlen_func(q: Any, k: Any, v: Any, softcap: float, block_table: Any) -> None: ...
def flash_attn_with_kvcache(q: Any, k: Any, v: Any, softcap: float, block_table: Any) -> None: ...
def flash_attn_with_kvcache_of_2_4(q: Any, k: Any, v: Any, block_table: Any) -> None: ...


def undefined_symbol() -> ImportError:
    return ImportError(
        "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi\nand a line more"
    )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """`world(flash_attn=...)`: what is imported, or what importing it raises; `absent=(...)`.

    Without arguments both packages are installed, PyTorch's varlen_attn reads a paged cache, and
    every card computes what it should.
    """

    real_loader = ops.LOADERS["triton"]

    def set_up(
        *,
        flash_attn: ModuleType | Exception | None = None,
        absent: tuple[str, ...] = (),
        fault: Callable[[Any, Needs], str | None] = lambda backend, needs: None,
    ) -> None:
        package = ModuleType("flash_attn")
        for function in (flash_attn_varlen_func, flash_attn_with_kvcache):
            setattr(package, function.__name__, function)
        real = importlib.import_module

        def import_module(name: str, package: str | None = None) -> Any:
            if name == "flash_attn" and isinstance(flash_attn, Exception):
                raise flash_attn
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", import_module)
        monkeypatch.setitem(sys.modules, "flash_attn", flash_attn or package)
        for name in absent:
            monkeypatch.setitem(sys.modules, name, None)  # Python's way to say so
        installed = "triton" not in absent
        loader = (lambda device_type: ("3.9.0", None)) if installed else real_loader
        monkeypatch.setitem(ops.LOADERS, "triton", loader)
        version = metadata.version
        versions = {"flash-attn": "2.8.3"}
        monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or version(name))
        monkeypatch.setattr(select, "fault_of", fault)
        monkeypatch.setattr(torch_varlen, "_parameters", lambda: dict.fromkeys(PAGED))

    return set_up


def card(
    capability: tuple[int, int] | None = (9, 0),
    *,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    head_dim: int = 128,
    softcap: float | None = None,
    block_size: int = 256,
) -> Needs:
    """What a model asks for on a card; the second layer may be an odd one."""
    layers = [Attention(8, 2, 64), Attention(8, 2, head_dim, softcap=softcap)]
    device = torch.device("cpu" if capability is None else "cuda")
    return Needs(layers, device, dtype, kv_dtype or dtype, block_size, capability)


def chosen(caplog: pytest.LogCaptureFixture, name: str = "auto", needs: Needs | None = None) -> str:
    """The name of what is chosen and the one line that the log says about it."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "mm_engine.attention"):
        backend = choose(name, needs or card())
    (record,) = caplog.records
    assert record.levelname == "INFO"
    return f"{backend.name}: {record.getMessage()}"


def test_the_names_are_those_of_the_config() -> None:
    assert tuple(backend.name for backend in BACKENDS) == ATTENTION_BACKENDS[1:]


def test_what_is_first_needs_no_reason(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world()
    assert chosen(caplog) == "flash-attn: Attention: flash-attn 2.8.3"


def test_without_flash_attn(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world(absent=("flash_attn",))
    assert chosen(caplog) == f"triton: Attention: triton 3.9.0 ({NO_FLASH})"


def test_without_triton(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world(absent=("triton",))
    assert chosen(caplog) == "flash-attn: Attention: flash-attn 2.8.3"
    assert not choose("flash-attn", card()).captures  # nothing skips padding rows then


def test_without_both(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world(absent=("flash_attn", "triton"))
    line = f"varlen of torch {TORCH} ({NO_FLASH}; {NO_TRITON})"
    assert chosen(caplog) == f"varlen: Attention: {line}"


def test_without_anything(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(absent=("flash_attn", "triton"))
    monkeypatch.setattr(torch_varlen, "_parameters", dict)
    old = f"varlen of torch {TORCH} reads no paged cache: install torch 2.13 or newer"
    assert chosen(caplog) == f"torch: Attention: torch ({NO_FLASH}; {NO_TRITON}; {old})"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (undefined_symbol(), "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"),
        (OSError("libcudart.so.12: cannot open shared object file"), "libcudart.so.12: cannot "),
        (RuntimeError(""), "RuntimeError"),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "No module named 'ein"),
    ],
    ids=["symbol", "library", "nothing-said", "dependency"],
)
def test_a_flash_attn_that_cannot_be_loaded_is_a_reason_in_one_line(
    world: World, caplog: pytest.LogCaptureFixture, error: Exception, told: str
) -> None:
    world(flash_attn=error)
    line = chosen(caplog)
    assert line.startswith(
        f"triton: Attention: triton 3.9.0 (flash-attn 2.8.3 can't be loaded: {told}"
    )
    assert line.endswith(f". Install the one built for torch {TORCH})")
    assert "\n" not in line


def test_a_flash_attn_without_a_paged_cache_is_told_apart(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    old = ModuleType("flash_attn")
    old.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    reason = "flash-attn 2.8.3 has no paged flash_attn_with_kvcache with a soft cap: install"
    world(flash_attn=old)
    assert reason in chosen(caplog)
    old.flash_attn_with_kvcache = flash_attn_with_kvcache_of_2_4  # type: ignore[attr-defined]
    assert reason in chosen(caplog)


@pytest.mark.parametrize(
    ("needs", "name", "reason"),
    [
        (card((7, 5)), "torch", "flash-attn needs a card of compute capability 8.0 or newer, not "),
        (card((7, 5)), "torch", "triton needs a card of compute capability 8.0 or newer, not 7.5"),
        (card((7, 5)), "torch", "varlen needs a card of compute capability 8.0 or newer, not 7.5"),
        (
            card(dtype=torch.float32),
            "triton",
            "flash-attn takes bfloat16 and float16, not float32: --dtype bfloat16",
        ),
        (
            card(kv_dtype=torch.float8_e4m3fn),
            "triton",
            "flash-attn can't read a KV cache of float8_e4m3fn",
        ),
        (
            card(head_dim=320),
            "triton",
            "flash-attn takes head sizes up to 256 in multiples of 8, not 320",
        ),
        (card(head_dim=100), "triton", "in multiples of 8, not 100"),
    ],
    ids=["card", "card-triton", "card-varlen", "float32", "fp8-cache", "head", "head-8"],
)
def test_what_a_card_or_a_model_rules_out(
    world: World, caplog: pytest.LogCaptureFixture, needs: Needs, name: str, reason: str
) -> None:
    world()
    line = chosen(caplog, "auto", needs)
    assert line.startswith(f"{name}: ")
    assert reason in line


@pytest.mark.parametrize("needs", [card((8, 0)), card(block_size=512), card(head_dim=256)])
def test_what_flash_attn_just_takes(
    world: World, caplog: pytest.LogCaptureFixture, needs: Needs
) -> None:
    world()
    assert chosen(caplog, "auto", needs) == "flash-attn: Attention: flash-attn 2.8.3"


@pytest.mark.parametrize(
    ("name", "wanted", "size"),
    [("flash-attn", 16, 256), ("flash-attn", 257, 512), ("varlen", 1, 256)],
)
def test_the_log_says_where_blocks_are_larger_than_wanted(
    world: World, caplog: pytest.LogCaptureFixture, name: str, wanted: int, size: int
) -> None:
    world()
    line = chosen(caplog, name, card(block_size=wanted))
    assert line.endswith(f", blocks of {size} tokens (as asked)")
    for other in ("triton", "torch"):
        assert "blocks of" not in chosen(caplog, other, card(block_size=wanted))


def test_a_soft_cap_rules_out_varlen_alone(world: World, caplog: pytest.LogCaptureFixture) -> None:
    needs = card(softcap=30.0)
    world()
    assert chosen(caplog, "auto", needs) == "flash-attn: Attention: flash-attn 2.8.3"
    with pytest.raises(StartupError, match="here: varlen has no soft cap, which the model needs"):
        choose("varlen", needs)
    world(absent=("flash_attn", "triton"))
    assert "; varlen has no soft cap, which the model needs)" in chosen(caplog, "auto", needs)


def test_a_backend_that_fails_on_the_card_is_passed_over(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A build for other cards, say: it can be imported, and its first kernel can't be launched."""

    def fault(backend: Any, needs: Needs) -> str | None:
        return "2.8.3 fails on this device: no kernel" if backend.name == "flash-attn" else None

    world(fault=fault)
    line = "triton 3.9.0 (flash-attn 2.8.3 fails on this device: no kernel)"
    assert chosen(caplog) == f"triton: Attention: {line}"
    with pytest.raises(StartupError, match="here: flash-attn 2.8.3 fails on this device: no kern"):
        choose("flash-attn", card())


@pytest.mark.parametrize("name", ["flash-attn", "triton", "varlen", "torch", "TRITON_ATTN"])
def test_one_that_is_named_is_taken(
    world: World, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    world()
    line = chosen(caplog, name)
    assert line.partition(":")[0] in (name, "triton")
    assert line.endswith("(as asked)")


def test_one_that_is_named_and_cannot_serve_is_refused_with_its_reason(world: World) -> None:
    world(absent=("flash_attn", "triton"))
    for name, reason in (("flash-attn", NO_FLASH), ("triton", NO_TRITON)):
        with pytest.raises(StartupError) as raised:
            choose(name, card())
        told = f"attention backend can't serve this model here: {reason}. Change that, or use auto."
        assert str(raised.value) == told


@pytest.fixture
def cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernels are built for this CPU."""
    extension = pytest.importorskip(
        "mm_engine_kernels.cpu.extension",
        reason="the C++ kernels aren't built",
        exc_type=ImportError,
    )
    monkeypatch.setattr(extension, "isa", lambda: "avx9")


def test_on_a_cpu_it_is_the_cpp_kernels(
    world: World, caplog: pytest.LogCaptureFixture, cpp: None
) -> None:
    world()  # Triton runs under its interpreter, and is no better a choice for that
    for dtype in (torch.float32, torch.bfloat16):
        needs = card(None, dtype=dtype, head_dim=37, softcap=30.0, block_size=3)
        assert chosen(caplog, "auto", needs) == "cpu: Attention: cpu avx9"


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (
            card(None, dtype=torch.float16),
            "cpu takes bfloat16 and float32, not float16: --dtype bfloat16",
        ),
        (
            card(None, kv_dtype=torch.float8_e4m3fn),
            "cpu can't read a KV cache of float8_e4m3fn",
        ),
    ],
    ids=["float16", "fp8-cache"],
)
def test_on_a_cpu_what_the_cpp_kernels_do_not_take_is_torchs(
    world: World, caplog: pytest.LogCaptureFixture, needs: Needs, reason: str
) -> None:
    world()
    assert chosen(caplog, "auto", needs) == f"torch: Attention: torch ({reason})"
    with pytest.raises(StartupError, match=f"here: {reason}. Change that, or use auto"):
        choose("cpu", needs)


def test_on_a_cpu_without_the_cpp_kernels_it_is_torch_and_the_log_says_so(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world()

    def missing(device_type: str) -> None:
        raise ops.Unavailable("the C++ kernels can't be loaded: install a wheel")

    monkeypatch.setitem(ops.LOADERS, "cpp", missing)
    line = "torch (cpu can't run: the C++ kernels can't be loaded: install a wheel)"
    assert chosen(caplog, "auto", card(None)) == f"torch: Attention: {line}"


def test_on_a_card_what_is_for_cpus_is_refused(world: World) -> None:
    world()
    with pytest.raises(StartupError, match="here: cpu runs on a CPU only. Change that"):
        choose("cpu", card())


@pytest.mark.parametrize("name", ["flash-attn", "varlen"])
def test_on_a_cpu_what_is_for_cards_is_refused(world: World, name: str) -> None:
    world()
    with pytest.raises(StartupError, match=f"here: {name} needs a CUDA card. Change that"):
        choose(name, card(None))


def test_on_a_cpu_triton_runs_under_its_interpreter_only(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton", reason="triton isn't installed")
    from mm_engine_kernels.triton import device

    monkeypatch.setattr(device, "INTERPRETED", True)
    line = f"triton: Attention: triton {triton.__version__} (as asked)"
    assert chosen(caplog, "triton", card(None)) == line
    monkeypatch.setattr(device, "INTERPRETED", False)
    with pytest.raises(StartupError, match="here: triton doesn't run on cpu: set TRITON_INTERPRET"):
        choose("triton", card(None))


def test_an_unknown_name_is_refused(world: World) -> None:
    world()
    with pytest.raises(StartupError, match="attention backend is not known: magic. Use auto, "):
        choose("magic", card())


def test_the_needs_are_read_off_the_layers() -> None:
    layers = [Attention(4, 2, 64), Attention(4, 2, 100, softcap=3.0)]
    needs = needs_of(layers, torch.device("cpu"), torch.bfloat16)
    assert needs.odd_head_sizes == [100]
    assert needs.has_softcap
    assert needs.kv_dtype == torch.bfloat16
    assert needs.capability is None


def test_from_2_13_on_the_torch_that_is_installed_has_a_paged_varlen_attn() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert dict(inspect.signature(varlen_attn).parameters) == torch_varlen._parameters()
    old = f"of torch {TORCH} reads no paged cache: install torch 2.13 or newer"
    is_new = Version(TORCH) >= Version("2.13")
    assert torch_varlen.VarlenAttention.unfit(card()) == (None if is_new else old)
