"""benchmarks/cpu_peers.py runs to its end, and an engine that fails costs only its own figures."""

from __future__ import annotations

import importlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mm_engine_kernels import ops
from safetensors import safe_open
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
#: An engine that is played: it takes a millisecond a token. `{extra}` comes before each answer.
PLAYED = """
import os, sys, time
from protocol import Events, serve, versions

loaded = {{}}

def load(**arguments):
    loaded.update(quantization=2 * bool(arguments.get("quantization")))
    return {{"versions": versions(), "kv_bytes": arguments["kv_bytes"]}}

def prepare(**arguments):
    return {{"path": "x"}}

def answer(prompts, num_tokens, images, image_size):
    {extra}
    events = Events()
    for i in range(num_tokens):
        time.sleep(0.001)
        count = len(prompts)
        events.tell(count * (i == 0), count, count * (i == num_tokens - 1))
    print("what a library prints")
    return events.answer([7] * len(prompts))

def logits(prompts, path):
    {extra}
    import numpy as np
    np.save(path, np.arange(12.0).reshape(3, 4) + loaded.get("quantization", 0))
    return {{}}

serve({{"load": load, "answer": answer, "prepare": prepare, "logits": logits}})
"""
PLAYED_FLOORS = """
from protocol import serve
serve({
    "load": lambda threads: {"import_torch_seconds": 0.01, "capability": "x", "versions": {}},
    "bandwidth": lambda num_bytes, seconds: {"bytes_per_second": 1e9},
    "products": lambda shapes, dtype, seconds: {"flops_per_second": 1e9},
})
"""


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts import each other by their bare names, and none is left behind."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def part(name: str) -> Any:
    return importlib.import_module(f"cpu_peer_parts.{name}")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cpu_peers")


@pytest.fixture
def peers(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Run the script with these flags; the record that it wrote."""

    def run(*flags: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        always = ("--quick", "--dtype", "float32", "--checkpoint", str(checkpoint))
        monkeypatch.setattr(sys, "argv", ["cpu_peers", *always, "--out", str(out), *flags])
        importlib.import_module("cpu_peers").main()
        written: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return written

    return run


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Play all engines; what a keyword names runs before each answer of that driver."""

    def play(**extras: str) -> Path:
        folder = tmp_path / "drivers"
        folder.mkdir()
        shutil.copy(BENCHMARKS / "cpu_peer_parts" / "drivers" / "protocol.py", folder)
        for name in ("ours", "transformers", "vllm", "llama_cpp"):
            text = PLAYED.format(extra=extras.get(name, "pass"))
            (folder / f"run_{name}.py").write_text(text)
        (folder / "run_floors.py").write_text(PLAYED_FLOORS)
        monkeypatch.setattr(part("client"), "DRIVERS", folder)
        return folder

    return play


def has_kernels() -> bool:
    return ops.chosen("cpu").name == "cpp"


def rows(record: dict[str, Any]) -> dict[str, Any]:
    return {row["key"]: row for section in record["sections"].values() for row in section["rows"]}


def test_this_engine_and_transformers_answer_alike(
    peers: Callable[..., Any], checkpoint: Path
) -> None:
    """The real ones, in processes of their own."""
    sections = ("decode", "image", "memory", "context", "quantized")
    record = peers("--sections", *sections, "--threads", "1")
    assert record["benchmark"] == "cpu_peers" and record["dtype"] == "float32"
    assert record["threads"] == 1 and {"machine", "versions", "commit"} <= record.keys()
    assert record["engines"]["transformers"]["versions"]["torch"]
    rates = record["floors"]["rates"]
    assert min(rates.values()) > 0 and rates["import_torch_seconds"] > 0.1
    products = record["floors"]["before"]["products"]
    assert products.keys() == {"float32", "bfloat16"}
    for rate in products.values():
        ours = {name for name in rate["shapes"] if name.endswith("mm-engine's")}
        assert len(ours) == (len(rate["shapes"]) / 2 if has_kernels() else 0)
    assert record["floors"]["after"]["bandwidth"]["bytes_per_second"] > 0
    found = rows(record)
    errors = [found.pop(f"{kind} error")["medians"] for kind in ("int8", "int4")]
    assert [error.keys() for error in errors] == [{"mm-engine"}] * 2
    eight, four = (error["mm-engine"] for error in errors)
    assert 0.001 < eight < 0.03 < four < 0.5
    assert found.pop("int8")["medians"]["mm-engine"] > 0
    assert found.pop("int4")["medians"]["mm-engine"] > 0
    assert found.pop("slope")["medians"].keys() == {"mm-engine", "transformers"}
    contexts = {"context 16", "context 48", "context 256"}  # the last is all that the model takes
    assert found.keys() == {"decode 1", "decode 3", "image", "memory", *contexts}
    for row in found.values():
        assert row["medians"].keys() == {"mm-engine", "transformers"}, row
        assert min(row["medians"].values()) > 0 and row["floor"] > 0
        ours, theirs = row["medians"]["mm-engine"], row["medians"]["transformers"]
        ratio = ours / theirs if row["higher_is_better"] else theirs / ours
        assert row["ratios"]["transformers"] == pytest.approx(ratio)
        assert row["missing"]["vLLM"] == "no --vllm PATH was given"
    for key in ("decode 1", "image"):
        tokens = found[key]["details"]["first_token"]
        assert tokens["mm-engine"] == tokens["transformers"], key
    assert 100 < found["memory"]["medians"]["mm-engine"] < 4000  # MiB: torch, a tiny model
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        known = file.keys()
    towers = {".".join(name.split(".")[:2]) for name in known if name.startswith("vision")}
    assert towers == {"vision_tower.vision_model"}  # as on the Hub: vLLM knows no other


def test_all_sections_run_and_one_that_fails_says_why(
    peers: Callable[..., Any],
    drivers: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drivers(vllm="os.write(2, b'out of luck\\n'); os._exit(3)", llama_cpp="raise ValueError('no')")
    picture = tmp_path / "x.png"
    flags = ("--vllm", sys.executable, "--llama-cpp", sys.executable, "--plot", str(picture))
    record = peers(*flags)
    sections = importlib.import_module("cpu_peers").SECTIONS
    assert list(record["sections"]) == list(sections)
    assert {section["status"] for section in record["sections"].values()} == {"ok"}
    found = rows(record)
    assert {"launch", "memory", "decode 1", "prefill", "image", "slope", "busy"} <= found.keys()
    assert {"requests", "int8", "int4", "int4 error", "context 256"} <= found.keys()
    deviation = statistics.pstdev(range(12))
    assert found["int8 error"]["medians"] == {"mm-engine": pytest.approx(2 / deviation)}
    assert found["int8 error"]["missing"]["llama.cpp"] == "logits: ValueError: no"
    for key, row in found.items():
        assert row["medians"]["mm-engine"] > 0 or key == "slope"
        if not key.startswith(("int8", "int4", "slope")):
            assert row["medians"]["transformers"] > 0
            assert row["missing"]["vLLM"] == (
                "answer: its process ended with exit status 3: out of luck"
            )
    assert found["decode 1"]["missing"]["llama.cpp"] == "answer: ValueError: no"
    assert "text backbone only" in found["image"]["missing"]["llama.cpp"]
    assert found["decode 1"]["met"].keys() == {"floor", "vLLM", "llama.cpp"}
    assert found["decode 1"]["met"]["vLLM"] is None
    launch = found["launch"]["medians"]["mm-engine"]
    assert found["launch"]["met"] == {"at most": launch <= found["launch"]["at_most"]}
    assert found["busy"]["details"]["share_of_alone"].keys() == {"mm-engine", "transformers"}
    printed = capsys.readouterr().out
    assert "| decode, 1 sequence | " in printed and "- vLLM: answer: its process ended" in printed
    assert "- transformers: no 8- or 4-bit weights" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_python_that_is_not_there_is_told(
    peers: Callable[..., Any], drivers: Callable[..., Path]
) -> None:
    drivers()
    record = peers("--sections", "decode", "--vllm", "/nowhere/python")
    row = rows(record)["decode 1"]
    assert row["missing"]["vLLM"] == "--vllm: there is no program /nowhere/python"
    assert "llama.cpp" in row["missing"] and row["medians"]["mm-engine"] > 0


def test_a_section_that_breaks_costs_no_other(
    peers: Callable[..., Any], drivers: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers()

    def breaks(bench: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setitem(part("sections").SECTIONS, "decode", breaks)
    record = peers("--sections", "decode", "prefill")
    assert record["sections"]["decode"]["error"] == "RuntimeError: broken"
    assert rows(record)["prefill"]["medians"]["mm-engine"] > 0


def test_an_engine_that_takes_too_long_is_ended(
    drivers: Callable[..., Path], tmp_path: Path
) -> None:
    note = tmp_path / "child"
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    told = f"open({str(note)!r}, 'w').write(str({child}.pid))"
    drivers(vllm=f"import subprocess; {told}; time.sleep(60)")
    client = part("client")
    peer = client.Peer(sys.executable, "run_vllm.py", {}, tmp_path / "log")
    assert peer.ask("load", 60.0, kv_bytes=1)["kv_bytes"] == 1
    assert peer.resident_bytes() > 2**20
    process = psutil.Process(peer._process.pid)
    start = time.monotonic()
    with pytest.raises(client.PeerError, match="answer: no answer within 2 s"):
        peer.ask("answer", 2.0, prompts=[], num_tokens=1, images=[], image_size=1)
    assert time.monotonic() - start < 30
    assert not process.is_running() and not peer.alive
    peer.pause()
    peer.resume()
    with pytest.raises(psutil.NoSuchProcess):
        peer.resident_bytes()
    assert ended(int(note.read_text()))
    with pytest.raises(client.PeerError, match="can't be run"):
        client.Peer("/nowhere/python", "run_vllm.py", {}, tmp_path / "log")


def test_who_is_not_asked_takes_no_time(drivers: Callable[..., Path], tmp_path: Path) -> None:
    """Threads that wait in a loop after an answer are the next engine's loss."""
    drivers()
    parts = part("fleet")
    fleet = parts.Fleet(
        checkpoint=tmp_path,
        folder=tmp_path,
        sizes=part("sizes").quick("float32"),
        dtype="float32",
        threads=1,
        limit=60.0,
        pythons={parts.VLLM: sys.executable},
        say=print,
    )
    names = ("mm-engine", parts.VLLM)
    try:
        peers = {name: fleet.get(name) for name in names}
        for asked in (*names, *names):
            fleet.ask(asked, [[1]], 1)
            for name, peer in peers.items():
                stopped = psutil.Process(peer._process.pid).status() == psutil.STATUS_STOPPED
                assert stopped == (name != asked)
        fleet.start(parts.TRANSFORMERS).close()
        for peer in peers.values():
            assert psutil.Process(peer._process.pid).status() == psutil.STATUS_STOPPED
        assert fleet.logits(parts.VLLM).shape == (3, 4)
    finally:
        fleet.close_all()
    assert not any(peer.alive for peer in peers.values())


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie, before long."""
    deadline = time.monotonic() + 20  # less than the process would go on
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_turns_rotate_and_drop_what_fails() -> None:
    parts, error = part("rows"), part("client").PeerError
    calls: list[str] = []

    def engine(name: str, fails_in: int | None = None) -> Callable[[int], float]:
        def figure(round_: int) -> float:
            calls.append(name)
            if round_ == fails_in:
                raise error("gone")
            return float(round_)

        return figure

    row = parts.Row("k", "n", "s", False)
    said: list[str] = []
    engines = {"a": engine("a"), "b": engine("b"), "c": engine("c", 2)}
    parts.turns(row, engines, rounds=3, deadline=time.monotonic() + 60, say=said.append)
    assert "".join(calls) == "abc" + "bca" + "cab" + "ab"
    assert row.rounds == {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}  # none of the warm-up
    assert row.missing == {"c": "gone"} and len(said) == len(calls)
    late = parts.Row("k", "n", "s", False)
    parts.turns(late, {"a": engine("a")}, rounds=3, deadline=0.0, say=said.append)
    assert late.rounds == {"a": [1.0]}  # no time is left, and one is kept


def test_decode_rate_counts_from_the_last_begin_to_the_first_end() -> None:
    parts = part("rows")
    events = [[1.0, 1, 1, 0], [2.0, 1, 2, 0], [3.0, 0, 2, 0], [4.0, 0, 2, 1], [9.0, 0, 1, 1]]
    answer = {"events": events}
    assert parts.decode_rate(answer, 2) == pytest.approx(4 / 2)
    assert parts.first_seconds(answer, 2) == 2.0 and parts.last_seconds(answer) == 9.0
    with pytest.raises(part("client").PeerError, match="2 of 3 sequences began"):
        parts.first_seconds(answer, 3)
    with pytest.raises(part("client").PeerError, match="didn't decode together"):
        parts.decode_rate({"events": [[1.0, 1, 2, 1], [2.0, 1, 2, 1]]}, 2)
    assert parts.slope([1, 2, 4], [3, 5, 9]) == pytest.approx(2)


def test_floors_are_what_bytes_and_products_take() -> None:
    sizes = part("sizes")
    full = sizes.full("bfloat16")
    assert full.image_ids(full.image_text)[:2] == [1, 32000]
    assert full.scale.num_patches + full.image_text == 617
    floors = sizes.Floors(30e9, 400e9, 3.0, full)
    # 386.6 million weights of 2 bytes at 30 GB/s, and little for norms and cache
    assert 1 / floors.step_seconds([128]) == pytest.approx(38.7, abs=0.3)
    assert 1 / floors.step_seconds([128], 8.5) == pytest.approx(72.7, abs=1.0)
    assert 1 / floors.step_seconds([128], 4.5) == pytest.approx(137, abs=2.0)
    assert 32 / floors.step_seconds([128] * 32) == pytest.approx(400e9 / 2 / 386.6e6, rel=0.02)
    assert 1.5 < floors.prompt_seconds([617], 1) < 2.5
    assert floors.kv_seconds_per_token == pytest.approx(12288 / 30e9)


def test_the_busy_process_is_busy_and_ends() -> None:
    with part("sections").busy_process() as process:
        watched = psutil.Process(process.pid)
        deadline = time.monotonic() + 60
        while sum(watched.cpu_times()[:2]) < 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sum(watched.cpu_times()[:2]) >= 0.2
    assert not watched.is_running()


def test_tensors_get_llama_cpps_names_and_order(tmp_path: Path) -> None:
    parts = part("drivers.gguf_file")
    backbone = {
        "language_model.model.embed_tokens.weight": "token_embd.weight",
        "model.language_model.norm.weight": "output_norm.weight",
        "language_model.lm_head.weight": "output.weight",
        "language_model.model.layers.7.self_attn.q_proj.weight": "blk.7.attn_q.weight",
        "language_model.model.layers.11.mlp.down_proj.weight": "blk.11.ffn_down.weight",
        "language_model.model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }
    assert {name: parts.gguf_name(name) for name in backbone} == backbone
    for name in (
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
    ):
        assert parts.gguf_name(name) is None
    saved = {"a": torch.randn(8, 3).bfloat16(), "b": torch.randn(4)}
    save_file(saved, tmp_path / "x.safetensors")
    read = dict(parts.tensors(tmp_path / "x.safetensors"))
    for name, tensor in saved.items():
        assert torch.equal(torch.from_numpy(read[name]), tensor.float())
    # Two heads of 4 rows: (0, 2) and (1, 3) are rotated together, and lie in pairs afterwards.
    order = parts.permuted(torch.arange(8).numpy()[:, None], 2)[:, 0].tolist()
    assert order == [0, 2, 1, 3, 4, 6, 5, 7]
