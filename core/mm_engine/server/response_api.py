"""`POST /v1/responses`: input items in, a response object or its events out. Nothing is kept."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from mm_engine.errors import RequestError
from mm_engine.outputs import CompletionOutput, RequestOutput
from mm_engine.sampling_params import SamplingParams
from mm_engine.server.chat import with_prepared
from mm_engine.server.exchange import Job, event_lines, parsed
from mm_engine.server.logprobs import chat_logprobs
from mm_engine.server.response_objects import (
    ContentPartEvent,
    ErrorEvent,
    IncompleteDetails,
    InputTokensDetails,
    LifecycleEvent,
    Numbered,
    OutputItemEvent,
    OutputMessage,
    OutputTextPart,
    OutputTokensDetails,
    PartEvent,
    Reasoning,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    Status,
    TextConfigEcho,
    TextDeltaEvent,
    TextDoneEvent,
)
from mm_engine.server.response_protocol import ResponseRequest, TextConfig
from mm_engine.server.responses import TokenLogprob, Usage
from mm_engine.server.service import Service, Slots
from mm_engine.server.structure import TextFormat
from mm_engine.server.tally import Tally

_NONE_YET = CompletionOutput(0)


async def open_response(service: Service, body: bytes, slots: Slots) -> Job:
    """Validate a body and make it a request for the engine.

    Raises:
        RequestError: it, one of its images or its length is at fault.
        PluginError: a hook is.
    """
    asked = await parsed(service, ResponseRequest, body)
    service.check_model(asked.model)
    service.check_priority(asked.priority)
    params = asked.sampling_params()
    grammar = await service.compile_grammar(asked)
    reply = ResponseReply(service.model_name, asked, params)
    try:
        request = await with_prepared(
            service,
            asked.chat(),
            lambda prepared: service.pipeline.request(
                prepared, params, reply.id, priority=asked.priority or 0, grammar=grammar
            ),
        )
    except RequestError as error:
        raise asked.own_error(error) from error
    return Job([request], reply, bool(asked.stream), asked.timeout, reply.ending)


class ResponseReply:
    """Tells an answer as OpenAI's responses do: an object, or the events in which it grows."""

    def __init__(self, model: str, asked: ResponseRequest, params: SamplingParams) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._created = int(time.time())
        self._asked = asked
        self._params = params
        text = asked.text or TextConfig()
        self._format = text.format or TextFormat(type="text")
        self._numbers = itertools.count()
        self._so_far = CompletionOutput(0)
        self._told = False  # that there is a response

    def opening(self) -> Iterator[Numbered]:
        """The response, its message and the message's text, all of them empty."""
        response = self._response("in_progress")
        for kind in ("response.created", "response.in_progress"):
            yield self._lifecycle(kind, response)
        self._told = True
        yield OutputItemEvent(
            type="response.output_item.added",
            sequence_number=next(self._numbers),
            output_index=0,
            item=self._message("in_progress"),
        )
        yield ContentPartEvent(
            type="response.content_part.added", part=self._part(_NONE_YET), **self._place()
        )

    def events(self, prompt: int, output: RequestOutput) -> Iterator[Numbered]:
        """New text."""
        for new in output.outputs:
            self._so_far.extend(new)
            logprobs = self._logprobs(new)
            if new.text or logprobs:
                yield TextDeltaEvent(
                    type="response.output_text.delta",
                    delta=new.text,
                    logprobs=logprobs,
                    **self._place(),
                )

    def closing(self, tally: Tally) -> Iterator[Numbered]:
        """The text, the message and the response, all of them whole."""
        done = self._so_far
        part = self._part(done)
        yield TextDoneEvent(
            type="response.output_text.done",
            text=part["text"],
            logprobs=part["logprobs"],
            **self._place(),
        )
        yield ContentPartEvent(type="response.content_part.done", part=part, **self._place())
        response = self._whole(done, tally)
        yield OutputItemEvent(
            type="response.output_item.done",
            sequence_number=next(self._numbers),
            output_index=0,
            item=response["output"][0],
        )
        yield self._lifecycle(f"response.{response['status']}", response)

    def ending(self, error: dict[str, Any] | None) -> bytes:
        """Nothing behind a whole answer; else the event that tells why it isn't."""
        if error is None:
            return b""
        detail = error["error"]
        if not self._told:
            return event_lines(
                ErrorEvent(
                    type="error",
                    sequence_number=next(self._numbers),
                    code=detail["code"],
                    message=detail["message"],
                    param=detail["param"],
                )
            )
        response = self._response("failed")
        ours = detail["type"] != RequestError.kind
        response["error"] = ResponseError(
            code="server_error" if ours else "invalid_prompt", message=detail["message"]
        )
        return event_lines(self._lifecycle("response.failed", response))

    def whole(self, outputs: list[RequestOutput], tally: Tally) -> ResponseObject:
        """The response with its message."""
        return self._whole(outputs[0].outputs[0], tally)

    def _whole(self, done: CompletionOutput, tally: Tally) -> ResponseObject:
        if done.finish_reason == "length":
            response = self._response("incomplete")
            response["incomplete_details"] = IncompleteDetails(reason="max_output_tokens")
            response["output"] = [self._message("incomplete", self._part(done))]
        else:
            response = self._response("completed")
            response["completed_at"] = int(time.time())
            response["output"] = [self._message("completed", self._part(done))]
        response["usage"] = _usage(tally.usage)
        return response

    def _response(self, status: Status) -> ResponseObject:
        asked, params = self._asked, self._params
        return ResponseObject(
            id=self.id,
            object="response",
            created_at=self._created,
            status=status,
            background=False,
            error=None,
            incomplete_details=None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            max_tool_calls=None,
            metadata=asked.metadata or {},
            model=self._model,
            output=[],
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            previous_response_id=None,
            prompt_cache_key=asked.prompt_cache_key,
            reasoning=Reasoning(effort=None, summary=None),
            safety_identifier=asked.safety_identifier,
            service_tier="default",
            store=False,
            temperature=params.temperature,
            text=TextConfigEcho(format=self._format, verbosity="medium"),
            tool_choice=asked.tool_choice or "auto",
            tools=[],
            top_logprobs=asked.top_logprobs or 0,
            top_p=params.top_p,
            truncation="disabled",
            usage=None,
            user=asked.user,
        )

    def _message(
        self,
        status: Literal["in_progress", "completed", "incomplete"],
        *parts: OutputTextPart,
    ) -> OutputMessage:
        return OutputMessage(
            type="message", id=self._item_id, role="assistant", status=status, content=list(parts)
        )

    def _part(self, output: CompletionOutput) -> OutputTextPart:
        return OutputTextPart(
            type="output_text",
            text=output.text,
            annotations=[],
            logprobs=self._logprobs(output),
        )

    def _logprobs(self, output: CompletionOutput) -> list[TokenLogprob]:
        logprobs = chat_logprobs(output, self._params.logprobs or 0)
        return [] if logprobs is None else logprobs["content"]

    def _place(self) -> PartEvent:
        return PartEvent(
            sequence_number=next(self._numbers),
            item_id=self._item_id,
            output_index=0,
            content_index=0,
        )

    def _lifecycle(self, kind: Any, response: ResponseObject) -> LifecycleEvent:
        return LifecycleEvent(type=kind, sequence_number=next(self._numbers), response=response)


def _usage(usage: Usage) -> ResponseUsage:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return ResponseUsage(
        input_tokens=usage["prompt_tokens"],
        input_tokens_details=InputTokensDetails(cached_tokens=cached, cache_write_tokens=0),
        output_tokens=usage["completion_tokens"],
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage["total_tokens"],
    )
