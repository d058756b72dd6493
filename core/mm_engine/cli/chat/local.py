"""A model that is loaded for the conversation, in an engine process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from mm_engine.cli.chat.messages import Message, Piece
from mm_engine.cli.model_choice import example_picture
from mm_engine.config import EngineConfig
from mm_engine.engine.launch import launched
from mm_engine.light_imports import import_transformers
from mm_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mm_engine.engine.client import EngineClient
    from mm_engine.inputs.pipeline import InputPipeline
    from mm_engine.outputs import RequestOutput
    from mm_engine.request import Request


class LocalModel:
    """Answers with the engine behind `client`, whose event loop runs in the portal's thread.

    So the engine is heard while the user thinks, and this thread is free for Ctrl-C.
    """

    def __init__(
        self, client: EngineClient, pipeline: InputPipeline, portal: BlockingPortal
    ) -> None:
        info = client.info
        self.description = (
            f"{pipeline.opened.config.model} · {info.plugin} · {info.dtype} on {info.device} · "
            f"up to {pipeline.max_len:,} tokens"
        )
        self.example = example_picture(pipeline.ctx.checkpoint)
        self._client = client
        self._pipeline = pipeline
        self._portal = portal

    def answer(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[Piece, None, None]:
        """See `Model.answer`."""
        prepared = self._pipeline.prepare_chat([_spelled(message) for message in messages])
        request = self._pipeline.request(prepared, params)
        news: SimpleQueue[RequestOutput | None] = SimpleQueue()
        task = self._portal.start_task_soon(self._listen, request, news.put)
        num_tokens, num_prompt_tokens = 0, len(request.prompt_token_ids)
        try:
            while (output := news.get()) is not None:
                for new in output.outputs:
                    num_tokens += len(new.token_ids)
                    yield Piece(new.text, num_tokens, num_prompt_tokens, new.finish_reason)
            task.result()  # or the error that ended it
        finally:
            task.cancel()

    async def _listen(self, request: Request, put: Callable[[RequestOutput | None], None]) -> None:
        try:
            async with contextlib.aclosing(self._client.generate(request)) as outputs:
                async for output in outputs:
                    put(output)
        finally:
            put(None)


@contextlib.contextmanager
def loaded(config: EngineConfig, chat_template: str | None) -> Iterator[LocalModel]:
    """Load a model; its process has ended when this is left.

    Raises:
        StartupError, PluginError: it can't be loaded.
    """
    with launched() as launch:
        import_transformers("mm_engine.inputs.pipeline", "mm_engine.engine.client")
        from mm_engine.engine.client import EngineClient
        from mm_engine.inputs.pipeline import InputPipeline
        from mm_engine.worker.loader import open_model

        pipeline = InputPipeline(open_model(config), chat_template=chat_template)
        profile, plugin = pipeline.dummy_request(), pipeline.plugin.record
        with start_blocking_portal() as portal:
            client = portal.call(EngineClient.start, config, profile, plugin, launch)
            try:
                pipeline.limit_length(client.info.kv_cache_tokens)
                yield LocalModel(client, pipeline, portal)
            finally:
                portal.call(client.close)


def _spelled(message: Message) -> dict[str, Any]:
    pictures = [{"type": "image", "image": picture.image} for picture in message.pictures]
    return {"role": message.role, "content": message.content(pictures)}
