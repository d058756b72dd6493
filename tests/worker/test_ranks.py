"""The processes of a tensor-parallel model: what each holds, and what one's fault costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from checkpoints import make_llava
from mm_engine import LLM, SamplingParams, processes
from mm_engine.config import EngineConfig, Shard
from mm_engine.errors import EngineDead, PluginError, StartupError
from mm_engine.models.weights import weight_targets
from mm_engine.sequence import ScheduledBatch, ScheduledSequence
from mm_engine.worker import rank_wire, ranks
from mm_engine.worker.loader import load_model, open_model
from mm_engine.worker.model_runner import ModelRunner
from mm_engine.worker.ranks import Ranks
from poisoned import POISON
from sequences import make_sequence
from serving import wait_until

pytestmark = pytest.mark.usefixtures("forked_ranks")

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PLUGIN = """
import torch
from mm_engine.plugins import hookimpl
from mm_llava.model import LlavaForConditionalGeneration
ARCHITECTURES = ["LlavaForConditionalGeneration"]

class Model(LlavaForConditionalGeneration):
    def __init__(self, ctx):
        super().__init__(ctx)
        self.rank = ctx.shard.rank

    def forward(self, ids, positions, metadata, **options):
        hidden = super().forward(ids, positions, metadata, **options)
        {code}
        return hidden

@hookimpl
def model_class(ctx): return Model

@hookimpl
def max_tokens(ctx, modality): return 16
"""


def start(checkpoint: Path, **options: Any) -> LLM:
    options = {"tensor_parallel_size": 2, "kv_cache_memory": 2**20, **options}
    return LLM(str(checkpoint), dtype="float32", device="cpu", progress=False, **options)


def with_plugin(checkpoint: Path, folder: Path, code: str) -> LLM:
    file = folder / "own_plugin.py"
    file.write_text(PLUGIN.format(code=code))
    return start(checkpoint, plugins=(str(file),))


def ranks_of(llm: LLM) -> Ranks:
    runner: Any = llm.engine.runner
    found: Ranks = runner._runner.ranks
    return found


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def answer(llm: LLM, prompt: str = "Hello there") -> list[int]:
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output.error is None
    ids: list[int] = output.outputs[0].token_ids
    return ids


@pytest.mark.usefixtures("reference_kernels")  # they leave weights as loaded
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
def test_each_rank_loads_its_pieces_of_the_weights(
    tmp_path: Path, backbone: str, size: int
) -> None:
    """Heads, rows of the MLP, the vocabulary: put side by side, they are the whole."""
    checkpoint = make_llava(tmp_path, backbone=backbone)
    config = EngineConfig(
        model=str(checkpoint), dtype="float32", progress=False, tensor_parallel_size=size
    )
    alone = replace(config, tensor_parallel_size=1)
    whole = weight_targets(load_model(open_model(alone), torch.device("cpu")).model)
    parts = []
    for rank in range(size):
        opened = open_model(config, shard=Shard(rank, size))
        parts.append(weight_targets(load_model(opened, torch.device("cpu")).model))
    num_cut = 0
    for name, target in whole.items():
        pieces = [part[name] for part in parts]
        if pieces[0].tensor.shape == target.tensor.shape:
            assert all(torch.equal(piece.tensor, target.tensor) for piece in pieces), name
            continue
        num_cut += 1
        dim = 0 if pieces[0].rows is not None else 1
        if pieces[0].tensor.shape[dim] * size == target.tensor.shape[dim]:
            joined = torch.cat([piece.tensor for piece in pieces], dim)
        else:  # fewer key/value heads than ranks: neighbours hold the same one
            num_kv = target.tensor.shape[dim] // pieces[0].tensor.shape[dim]
            assert name.rsplit(".", 2)[-2] in ("k_proj", "v_proj")
            joined = torch.cat([p.tensor for p in pieces[:: size // num_kv]], dim)
            assert torch.equal(pieces[0].tensor, pieces[1].tensor)
        assert torch.equal(joined, target.tensor), name
    assert num_cut >= 2 * 7, "each of two layers has seven"


@pytest.mark.parametrize(
    ("text_changes", "size", "told"),
    [
        ({}, 3, "4 attention heads can't be shared out to 3 processes. Use .*-size 2."),
        (
            {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
            3,
            "2 key/value heads can't be shared out to 3 processes. Use .*-size 2.",
        ),
        (
            {"intermediate_size": 97},
            2,
            "97 rows of the MLP can't be shared out to 2 processes. Use .*-size 1.",
        ),
    ],
    ids=["heads", "key-value-heads", "mlp"],
)
def test_what_cannot_be_shared_out_evenly_is_refused(
    tmp_path: Path, text_changes: dict[str, Any], size: int, told: str
) -> None:
    checkpoint = make_llava(tmp_path, text_changes=text_changes)
    with pytest.raises(StartupError, match=told):
        start(checkpoint, tensor_parallel_size=size)


def test_a_rank_that_is_killed_ends_the_engine_at_once_with_one_error(
    llava: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = start(llava)
    answer(llm)
    (pid,) = ranks_of(llm).pids
    folder = ranks_of(llm).store.parent
    os.kill(pid, signal.SIGKILL)
    told = "tensor-parallel rank 1 ended: killed by SIGKILL. Start it again."
    with pytest.raises(EngineDead, match=told):
        answer(llm)
    with pytest.raises(EngineDead, match=told):
        answer(llm)
    assert caplog.text.count("rank 1 ended") == 1
    ranks_of(llm).close()
    assert not folder.exists()


def test_no_process_and_no_folder_is_left_behind(llava: Path) -> None:
    llm = start(llava, tensor_parallel_size=4)
    pids, folder = ranks_of(llm).pids, ranks_of(llm).store.parent
    assert len(pids) == 3 and folder.is_dir()
    ranks_of(llm).close()
    assert all(is_gone(pid) for pid in pids)
    assert not folder.exists()
    ranks_of(llm).close()  # a second time does nothing


def test_what_all_ranks_raise_costs_one_request(llava: Path, tmp_path: Path) -> None:
    """A model that can't take three sequences at once, say."""
    llm = with_plugin(llava, tmp_path, "assert len(metadata.query_lens) != 1 or len(ids) != 5, 'x'")
    expected = answer(llm, "there you are")
    for _ in range(2):
        outputs = llm.generate(["abcd", "there you are"], GREEDY, use_tqdm=False)
        assert [output.error is None for output in outputs] == [True, True], "beside another"
    failed, fine = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in ("abcd", "abc"))
    assert failed.error is not None and "AssertionError: x" in failed.error.message
    assert fine.error is None
    assert answer(llm, "there you are") == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_alone_raises_ends_the_engine(
    llava: Path, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    code = f"assert self.rank != {rank} or len(ids) != 5, 'mine'"
    llm = with_plugin(llava, tmp_path, code)
    answer(llm, "there you are")

    def answer_until_it_is_known() -> None:
        for _ in range(200):  # rank 0 may be through with a step that fails in another
            answer(llm, "abcd")
            time.sleep(0.05)

    with pytest.raises(EngineDead, match=f"rank {rank} failed where others didn't"):
        answer_until_it_is_known()
    wait_until(lambda: all(map(is_gone, ranks_of(llm).pids)), "all ranks are gone")


def test_a_rank_that_computes_something_else_ends_the_engine(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both raise, but one has made a call of the group that the other hasn't."""
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 2.0)
    code = (
        "if len(ids) == 5:\n"
        "            self.language_model.vocab.shard.group.num_calls += self.rank\n"
        "            raise ValueError\n"
    )
    llm = with_plugin(llava, tmp_path, code)
    with pytest.raises(EngineDead, match="rank 1 failed where others didn't"):
        answer(llm, "abcd")


def test_an_interrupted_step_ends_the_engine_without_waiting(llava: Path, tmp_path: Path) -> None:
    code = "if self.rank == 0 and len(ids) == 5: raise KeyboardInterrupt"
    llm = with_plugin(llava, tmp_path, code)
    start_time = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        answer(llm, "abcd")
    assert time.monotonic() - start_time < ranks.GRACE_SECONDS
    with pytest.raises(EngineDead, match="interrupted in the middle of a tensor-parallel step"):
        answer(llm)


def test_nan_is_zeroed_in_every_ranks_cache(llava: Path) -> None:
    """Masked NaN would spread to whoever gets the blocks next."""
    llm = start(llava, block_size=4, kv_cache_memory=2**15, enable_prefix_caching=False)
    runner: Any = llm.engine.runner
    embeddings = runner._runner.model.language_model.embedding.weight.data
    prompts: list[Any] = [{"prompt_token_ids": [1, 20 + i, 30, 40, 50]} for i in range(8)]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    embeddings[POISON] = float("nan")  # rank 0 embeds
    sick: Any = {"prompt_token_ids": [1, POISON, 30, 40, 50]}
    for failed in llm.generate([sick] * 8, GREEDY, use_tqdm=False):
        assert failed.error is not None and "NaN" in failed.error.message
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * 8
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_a_rank_with_another_plugin_refuses_to_start(llava: Path) -> None:
    config = EngineConfig(model=str(llava), device="cpu", tensor_parallel_size=2)
    record = open_model(config).plugin.record
    started = Ranks(config, replace(record, version="9.9"))
    with pytest.raises((StartupError, PluginError), match="tensor-parallel rank 1: .*9.9"):
        started.wait(rank_wire.Opened)
    started.close()


def test_ranks_with_different_attention_backends_are_refused(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = rank_wire.Loaded(1, "triton", 16)
    monkeypatch.setattr(
        Ranks,
        "wait",
        lambda self, kind, wait=Ranks.wait: (
            [loaded] if kind is rank_wire.Loaded else wait(self, kind)
        ),
    )
    config = EngineConfig(model=str(llava), device="cpu", tensor_parallel_size=2, progress=False)
    with pytest.raises(
        StartupError, match="(cpu|torch) on rank 0, triton on rank 1. .* (cpu|torch)."
    ):
        ModelRunner(open_model(config), config)


def test_a_rank_that_dies_while_starting_is_a_refusal_to_start(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spawn(*_: object) -> Any:
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])

    monkeypatch.setattr(ranks, "spawn", spawn)
    with pytest.raises(StartupError, match="tensor-parallel rank 1 ended: exit status 7"):
        start(llava)


def test_a_rank_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """A real process: what it does first is to watch its parent."""
    folder = tmp_path / "folder"
    folder.mkdir()
    script = (
        "import os, sys, time\n"
        "from mm_engine.processes import spawn\n"
        "rank = [sys.argv[1], 1, os.getpid(), 30, 'text']\n"
        "print(spawn('mm_engine.worker.rank', *rank).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: is_gone(pid), "the rank to be gone")
    wait_until(lambda: not folder.exists(), "its folder to be gone")


def test_what_fails_between_two_steps_in_one_rank_is_not_forgotten(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers such a message, and steps that go well come after it."""
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    llm = start(llava)
    ranks_of(llm).send(rank_wire.Clean([10**9]))

    def answer_for_a_while() -> None:
        for _ in range(200):
            answer(llm)
            time.sleep(0.05)

    with pytest.raises(EngineDead, match=r"rank 1 failed where others didn't \(IndexError\)"):
        answer_for_a_while()


def test_a_step_whose_result_comes_after_a_rank_has_gone_is_no_result(llava: Path) -> None:
    """What the others summed up without it would pass for tokens."""
    llm = start(llava)
    runner: Any = llm.engine.runner
    sequence = make_sequence((1, 9, 20), temperature=0.0)
    sequence.block_table = [0]
    share = ScheduledSequence(sequence, 3)
    launched = runner._runner.launch(ScheduledBatch((share,)))
    assert launched.result().tokens[0].token_id is not None
    launched = runner._runner.launch(ScheduledBatch((share,)))
    os.kill(ranks_of(llm).pids[0], signal.SIGKILL)

    def is_noticed() -> bool:
        try:
            ranks_of(llm).check()
        except EngineDead:
            return True
        return False

    wait_until(is_noticed, "the rank's end to be noticed")
    with pytest.raises(EngineDead, match="rank 1 ended"):
        launched.result()


def test_a_rank_that_cannot_be_started_leaves_no_folder_and_no_other_rank(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    spawn = ranks.spawn

    def spawn_one(module: str, *arguments: object) -> Any:
        if started:
            raise OSError("no process is left")
        started.append(spawn(module, *arguments))
        return started[0]

    monkeypatch.setattr(ranks, "spawn", spawn_one)
    monkeypatch.setattr(processes.tempfile, "tempdir", str(tmp_path))
    config = EngineConfig(model=str(llava), device="cpu", tensor_parallel_size=4)
    with pytest.raises(OSError, match="no process is left") as raised:
        Ranks(config, open_model(config).plugin.record)
    assert started[0].poll() is not None
    assert list(tmp_path.iterdir()) == []
    assert raised.tb is not None, "whose frames hold it: nobody waits for them to be let go of"
