"""Our OpenAPI document is what the server does: schemathesis makes requests of it. Row 17."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from bystanders import UNSPEAKABLE, undisturbed
from serving import FLAGS, ServerProcess

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.failures import FailureGroup
    from schemathesis.generation import GenerationMode
    from schemathesis.openapi.checks import UndefinedStatusCode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
NUM_EXAMPLES = 24  # of each operation that does something, and kind
SAID = [{"role": "user", "content": "x"}]
#: What makes a body an answerable one, beside one or two fields that schemathesis makes.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAID, "max_tokens": 3},
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/responses": {"input": "x", "max_output_tokens": 16},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1, 2]},
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose answers end soon, whatever is asked for."""
    folder = tmp_path_factory.mktemp("short")
    with ServerProcess(folder, *FLAGS, "--max-model-len", "256") as started:
        yield started


@pytest.fixture(scope="module")
def document(short: ServerProcess) -> Any:
    return schemathesis.openapi.from_dict(short.http.get("/openapi.json").json())


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_server_keeps_to_its_document(
    short: ServerProcess, document: Any, mode: GenerationMode
) -> None:
    """No 5xx, no status, type or shape of a body that isn't in it; whatever is sent."""
    statuses: dict[str, set[int]] = {}
    asked = GOOD["/v1/completions"] | {"guided_choice": ["a"]}  # starts a process that stays
    assert short.http.post("/v1/completions", json=asked).status_code == 200
    with undisturbed(short, new_rows=True):
        for found in document.get_all_operations():
            operation = found.ok()
            seen = statuses.setdefault(operation.label, set())
            _try(short, operation, mode, seen)
    if mode is GenerationMode.POSITIVE:
        for path in GOOD:
            assert {200, 400} <= statuses[f"POST {path}"], f"some are answered: {path}"
        assert {200} == statuses["GET /health"]


def is_too_short(body: Any, seconds: float) -> bool:
    """Whether a body allows itself less time than its answer took."""
    asked = body.get("timeout") if isinstance(body, dict) else None
    return isinstance(asked, int | float) and asked <= seconds


def _try(short: ServerProcess, operation: Any, mode: GenerationMode, seen: set[int]) -> None:
    does_something = operation.path in GOOD or "{name}" in operation.path
    turns = itertools.count()

    @settings(
        max_examples=NUM_EXAMPLES if does_something else 3,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        turn = next(turns)
        if operation.path in GOOD and turn % 2 and isinstance(case.body, dict):
            fields = list(case.body.items())
            start = turn % max(1, len(fields))
            case.body = GOOD[operation.path] | dict(fields[start : start + 1 + turn // 2 % 2])
        begin = time.monotonic()
        response = case.call(base_url=short.url, timeout=60)
        seconds = time.monotonic() - begin
        seen.add(response.status_code)
        asked_for = response.status_code == 504 and is_too_short(case.body, seconds)
        excused = [not_a_server_error] if asked_for else []
        checks = [check for check in CHECKS if check not in excused]
        case.validate_response(response, checks=checks)
        assert not [part for part in UNSPEAKABLE[1:] if part in response.text]

    try:
        run()
    except Exception as error:
        if type(error).__name__ != "Unsatisfiable":  # a negative of what takes nothing
            raise


def test_a_document_that_lacks_a_status_is_found_out(short: ServerProcess) -> None:
    """The positive control of the checks."""
    raw = short.http.get("/openapi.json").json()
    del raw["paths"]["/v1/completions"]["post"]["responses"]["400"]
    operation = schemathesis.openapi.from_dict(raw)["/v1/completions"]["POST"]
    with pytest.raises(FailureGroup) as raised:
        _try(short, operation, GenerationMode.NEGATIVE, set())
    (failure,) = raised.value.exceptions
    assert isinstance(failure, UndefinedStatusCode)
