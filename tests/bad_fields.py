"""Fields that the newer routes refuse: the field, its value, and the `param` of the answer."""

from __future__ import annotations

from typing import Any

TEXT = {"type": "text", "text": "x"}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def items(*parts: Any) -> list[dict[str, Any]]:
    """A message of these parts of a chat, as input of a response."""
    own = {"text": "input_text", "image_url": "input_image"}
    return [
        {
            "role": "user",
            "content": [
                {**part, "type": own[part["type"]], "image_url": part["image_url"]["url"]}
                if "image_url" in part
                else {**part, "type": own[part["type"]]}
                for part in parts
            ],
        }
    ]


RESPONSE_FIELDS: list[tuple[str, Any, str]] = [
    ("max_output_tokens", 0, "max_output_tokens"),
    ("max_output_tokens", -1, "max_output_tokens"),
    ("max_output_tokens", 10**9, "max_output_tokens"),
    ("max_output_tokens", 10**40, "max_output_tokens"),
    ("max_output_tokens", "5", "max_output_tokens"),
    ("max_output_tokens", True, "max_output_tokens"),
    ("max_tokens", 2, "max_tokens"),
    ("top_logprobs", 3, "top_logprobs"),
    ("top_logprobs", 21, "top_logprobs"),
    ("include", ["no_such"], "include.0"),
    ("include", "x", "include"),
    ("logprobs", True, "logprobs"),
    ("metadata", {str(i): "x" for i in range(17)}, "metadata"),
    ("metadata", {"k": 5}, "metadata.k"),
    ("metadata", {"k": "x" * 513}, "metadata.k"),
    ("metadata", {"k" * 65: "x"}, "metadata." + "k" * 40),
    ("stream_options", {"include_obfuscation": True}, "stream_options.include_obfuscation"),
    ("previous_response_id", "resp_1", "previous_response_id"),
    ("conversation", "conv_1", "conversation"),
    ("background", True, "background"),
    ("prompt", {"id": "x"}, "prompt"),
    ("tools", [{"type": "web_search"}], "tools"),
    ("tool_choice", "required", "tool_choice"),
    ("truncation", "auto", "truncation"),
    ("reasoning", {"effort": "high"}, "reasoning"),
    ("text", {"format": {"type": "yaml"}}, "text.format"),
    ("text", {"format": {"type": "json_schema", "name": "x"}}, "text.format.schema"),
    (
        "text",
        {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}},
        "text.format",
    ),
    ("text", {"verbosity": "low"}, "text.verbosity"),
    ("text", "x", "text"),
    ("user", 5, "user"),
    ("instructions", 5, "instructions"),
    ("instructions", "x \ue000", "instructions"),
    ("instructions", "x " * 20_000, "input"),
    ("input", [], "input"),
    ("input", "", "input"),
    ("input", None, "input"),
    ("input", 5, "input"),
    ("input", "x \ue000", "input"),
    ("input", "x " * 20_000, "input"),
    ("input", [{"content": "x"}], "input.0.role"),
    ("input", [{"role": "tool", "content": "x"}], "input.0.role"),
    ("input", [{"role": "user"}], "input.0.content"),
    ("input", [{"role": "user", "content": 5}], "input.0.content"),
    ("input", [{"role": "user", "content": "x \ue000"}], "input.0"),
    ("input", [{"type": "function_call", "name": "f", "call_id": "c"}], "input.0.type"),
    ("input", [{"type": "item_reference", "id": "msg_1"}], "input.0.type"),
    ("input", [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "input.0.content.0"),
    ("input", [{"role": "user", "content": [{"type": "input_file"}]}], "input.0.content.0"),
    ("input", items({"type": "text"}), "input.0.content.0.text"),
    ("input", items(TEXT, image(5)), "input.0.content.1.image_url"),
    ("input", items(TEXT, image({"url": "x"})), "input.0.content.1.image_url"),
    (
        "input",
        items({**image("data:image/png;base64,x"), "file_id": "file-1"}),
        "input.0.content.0.file_id",
    ),
]
TOKENIZE_FIELDS: list[tuple[str, Any, str]] = [
    ("prompt", "x", "prompt"),  # besides messages
    ("messages", None, "prompt"),
    ("messages", [], "messages"),
    ("messages", [{"role": "user", "content": [{"text": "x"}]}], "messages.0.content.0"),
    ("messages", [{"role": "user", "content": "x" * (2**20 + 1)}], "messages"),
    ("add_special_tokens", True, "add_special_tokens"),
    ("add_generation_prompt", "x", "add_generation_prompt"),
    ("return_token_strs", 1, "return_token_strs"),
    ("chat_template", "{{ x }}", "chat_template"),
    ("tools", [{"type": "function"}], "tools"),
]
DETOKENIZE_FIELDS: list[tuple[str, Any, str]] = [
    ("tokens", None, "tokens"),
    ("tokens", "x", "tokens"),
    ("tokens", [1.5], "tokens.0"),
    ("tokens", [True], "tokens.0"),
    ("tokens", [1, -1], "tokens.1"),
    ("tokens", [2**31], "tokens.0"),
    ("tokens", [10**6], "tokens"),
    ("tokens", [1] * (2**19 + 1), "tokens"),
]
