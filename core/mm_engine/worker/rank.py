"""A rank's process: `python -m mm_engine.worker.rank FOLDER RANK PARENT_PID LEVEL FORMAT`.

Started by `Ranks`; level and format are the log's. It holds a part of the model, computes what
rank 0 tells it, and lives as long as its parent wants.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mm_engine.log import adopt_libraries, configure_child, told_of
from mm_engine.processes import end_with_parent, leave_signals_to_parent

if TYPE_CHECKING:
    from mm_engine.worker import rank_wire
    from mm_engine.worker.model_shard import ModelShard
    from mm_engine.worker.rank_group import RankGroup

logger = logging.getLogger("mm_engine.worker.rank")  # `__name__` is that of a program


def main(folder: Path, rank: int, parent_pid: int, log_level: int, log_format: str) -> int:
    """Serve rank 0; returns the exit status."""
    leave_signals_to_parent()
    end_with_parent(parent_pid, folder)
    # What it has to say, rank 0 says too, but for what is looked for at level debug.
    quiet = log_level if log_level <= logging.DEBUG else max(log_level, logging.WARNING)
    configure_child(quiet, log_format, "rank", rank)

    from mm_engine.plugins.tolerance import pass_over_damage

    pass_over_damage()
    from mm_engine.light_imports import import_transformers

    # Takes seconds: after all of the above.
    import_transformers("mm_engine.worker.model_shard")
    adopt_libraries()
    return Rank(folder, rank).serve()


class Rank:
    """One part of the model, and the line to rank 0."""

    def __init__(self, folder: Path, rank: int) -> None:
        import zmq

        self.rank = rank
        self._folder = folder
        context = zmq.Context()
        self._commands = context.socket(zmq.PAIR)
        self._commands.set_hwm(0)
        self._commands.connect(f"ipc://{folder / f'commands-{rank}'}")
        self._events = context.socket(zmq.PUSH)
        self._events.connect(f"ipc://{folder / 'events'}")
        self._group: RankGroup | None = None
        self._model: ModelShard | None = None

    def serve(self) -> int:
        """Do what rank 0 says until it says Quit; the exit status."""
        from mm_engine.worker import rank_wire

        begin = self._folder / "begin"
        message = rank_wire.decode_to_rank(begin.read_bytes())
        number, halted = 0, False
        while not isinstance(message, rank_wire.Quit):
            if isinstance(message, rank_wire.Resume):
                halted = False
            # What the others make of a step that this rank has failed is not known yet: the calls
            # of the next one would meet theirs.
            elif not (halted and isinstance(message, rank_wire.Run)):
                try:
                    self._do(message)
                except BaseException as error:  # SystemExit too: a plugin doesn't end a rank
                    halted = isinstance(message, rank_wire.Run)
                    self._tell(error, number)
            message = rank_wire.decode_to_rank(self._commands.recv())
            number += 1
        return 0

    def _tell(self, error: BaseException, number: int) -> None:
        """Log what a message led to, and say it to rank 0."""
        from mm_engine.errors import ERRORS_BY_NAME
        from mm_engine.plugins.blame import one_line
        from mm_engine.worker import rank_wire

        name, told = type(error).__name__, one_line(error)
        logger.warning("What rank 0 said last has failed: %s", told_of(error))
        logger.debug("Its traceback:", exc_info=error)
        if name in ERRORS_BY_NAME:  # rank 0 raises it again, as it is
            told = str(error)
        calls = self._group.num_calls if self._group is not None else 0
        self._send(rank_wire.Failed(self.rank, number, name, told, calls))

    def _do(self, message: rank_wire.ToRank) -> None:
        import torch

        from mm_engine.worker import rank_wire
        from mm_engine.worker.graphs import CaptureFailed

        if isinstance(message, rank_wire.Begin):
            self._begin(message)
            return
        model = self._model
        assert model is not None and self._group is not None
        if isinstance(message, rank_wire.InitCache):
            model.init_cache(message.num_blocks)
        elif isinstance(message, rank_wire.Measure):
            if not message.ends:
                model.memory.begin()
                return
            model.memory.end()
            model.kv_caches = []
        elif isinstance(message, rank_wire.Report):
            self._send(rank_wire.Available(self.rank, model.memory.available()))
        elif isinstance(message, rank_wire.Capture):
            try:
                model.capture_graph(message.size, getattr(torch, message.dtype))
            except CaptureFailed as error:
                self._send(rank_wire.Captured(self.rank, str(error), error.no_memory))
            else:
                self._send(rank_wire.Captured(self.rank))
        elif isinstance(message, rank_wire.EndTrial):
            model.end_trial()
        elif isinstance(message, rank_wire.DropGraphs):
            model.drop_graphs()
            self._group.num_calls = message.num_calls
        elif isinstance(message, rank_wire.Clean):
            model.clean(torch.tensor(message.slots, device=model.device))
        elif isinstance(message, rank_wire.Run):
            with torch.inference_mode():
                num_tokens = len(message.layout.positions)
                ids = torch.empty(num_tokens, dtype=torch.int64, device=model.device)
                shape = (num_tokens, model.hidden_size)
                dtype = getattr(torch, message.dtype)
                embeds = torch.empty(shape, dtype=dtype, device=model.device)
                self._group.broadcast(ids)
                self._group.broadcast(embeds)
                model.compute(ids, embeds, message.layout, message.graph)

    def _begin(self, message: rank_wire.Begin) -> None:
        from dataclasses import replace

        from mm_engine.config import Shard
        from mm_engine.worker import rank_wire
        from mm_engine.worker.loader import open_model, pick_device
        from mm_engine.worker.model_shard import ModelShard, share_threads
        from mm_engine.worker.rank_group import RankGroup

        config = replace(message.config, progress=False)  # rank 0 shows it
        size = config.tensor_parallel_size
        share_threads(size)
        opened = open_model(config, message.plugin, Shard(self.rank, size))
        device = pick_device(config, self.rank)
        self._send(rank_wire.Opened(self.rank))
        store = Path(message.store)
        self._group = RankGroup(device, self.rank, size, store, config.step_timeout)
        opened.ctx.shard.join(self._group)
        self._model = ModelShard(opened, config)
        model = self._model
        self._send(rank_wire.Loaded(self.rank, model.backend.name, model.block_size))

    def _send(self, event: rank_wire.FromRank) -> None:
        from mm_engine.worker import rank_wire

        self._events.send(rank_wire.encode(event))


if __name__ == "__main__":
    number, parent, level = map(int, sys.argv[2:5])
    status = main(Path(sys.argv[1]), number, parent, level, sys.argv[5])
    logging.shutdown()
    os._exit(status)  # taking NCCL down in order would wait for the others
