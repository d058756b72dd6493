"""`POST /v1/completions`: prompts as text or token ids in, their continuations out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from mm_engine.errors import RequestError
from mm_engine.outputs import CompletionOutput, RequestOutput
from mm_engine.request import PromptInputs, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.server.exchange import Job, parsed
from mm_engine.server.logprobs import completion_logprobs
from mm_engine.server.protocol import CompletionRequest
from mm_engine.server.responses import Completion, CompletionChoice
from mm_engine.server.service import Service, Slots
from mm_engine.server.tally import Tally


async def open_completion(service: Service, body: bytes, slots: Slots) -> Job:
    """Validate a body and make each of its prompts a request for the engine.

    Raises:
        RequestError: it, one of its prompts or their number is at fault.
        Overloaded: the queue has no room for so many prompts.
    """
    asked = await parsed(service, CompletionRequest, body)
    service.check_model(asked.model)
    service.check_priority(asked.priority)
    params = asked.sampling_params()
    prompts = asked.prompts()
    slots.take(len(prompts))
    reply = CompletionReply(
        model=service.model_name,
        include_usage=asked.include_usage,
        num_choices=params.n,
        num_top=params.logprobs or 0,
    )
    grammar = await service.compile_grammar(asked)
    requests = await service.in_thread(lambda: _prepare(service, asked, params, reply.id, grammar))
    if asked.echo:
        decode = service.pipeline.ctx.tokenizer.decode
        reply.echoes = [p if isinstance(p, str) else str(decode(p)) for p in prompts]
    return Job(requests, reply, bool(asked.stream), asked.timeout)


def _prepare(
    service: Service,
    asked: CompletionRequest,
    params: SamplingParams,
    reply_id: str,
    grammar: bytes | None,
) -> list[Request]:
    salt = service.cache_salt(asked.cache_salt)
    requests = []
    for index, prompt in enumerate(asked.prompts()):
        if isinstance(prompt, str):
            inputs = PromptInputs(prompt=prompt)
        else:
            inputs = PromptInputs(prompt_token_ids=tuple(prompt))
        try:
            prepared = service.pipeline.prepare(inputs, cache_salt=salt)
            request = service.pipeline.request(
                prepared,
                params,
                f"{reply_id}-{index}",
                priority=asked.priority or 0,
                grammar=grammar,
            )
            requests.append(request)
        except RequestError as error:
            if error.param == "messages":  # the pipeline's word for what holds the prompt
                error.param = "prompt"
            raise
    return requests


@dataclass(slots=True, kw_only=True)
class CompletionReply:
    """Tells answers in the shape of OpenAI's completions; choices of one prompt come together."""

    model: str
    include_usage: bool
    num_choices: int  # for each prompt
    num_top: int
    echoes: list[str] | None = None  # each prompt's text, which goes before its completions
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)  # characters sent, by choice

    def opening(self) -> Iterator[Completion]:
        """Nothing."""
        return iter(())

    def events(self, prompt: int, output: RequestOutput) -> Iterator[Completion]:
        """New text of each choice, with the reason why it ended if it has."""
        for new in output.outputs:
            choice = self._choice(prompt, new)
            ended = choice["finish_reason"] is not None
            if choice["text"] or choice["logprobs"] is not None or ended:
                yield self._completion([choice])

    def closing(self, tally: Tally) -> Iterator[Completion]:
        """The usage, if it was asked for."""
        if self.include_usage:
            completion = self._completion([])
            completion["usage"] = tally.usage
            yield completion

    def whole(self, outputs: list[RequestOutput], tally: Tally) -> Completion:
        """All choices of all prompts."""
        completion = self._completion(
            [self._choice(p, done) for p, output in enumerate(outputs) for done in output.outputs]
        )
        completion["usage"] = tally.usage
        return completion

    def _choice(self, prompt: int, new: CompletionOutput) -> CompletionChoice:
        index = prompt * self.num_choices + new.index
        text = new.text
        if self.echoes is not None and index not in self._offsets:
            text = self.echoes[prompt] + text
        offset = self._offsets.get(index, 0)
        logprobs = completion_logprobs(new, self.num_top, offset)
        if logprobs is not None:
            offset += sum(map(len, logprobs["tokens"]))
        self._offsets[index] = offset
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=new.finish_reason,
            stop_reason=new.stop_reason,
        )

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        completion = Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
        )
        if self.include_usage:
            completion["usage"] = None
        return completion
