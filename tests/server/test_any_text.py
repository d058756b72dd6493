"""Text of every kind, on every route that answers, streamed and whole. Rows 15, 18, 20 and 21."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from bystanders import check_error, undisturbed
from mm_engine.plugins.discovery import demos
from serving import ServerProcess

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ROUTES = (CHAT, COMPLETIONS, RESPONSES)
every_route = pytest.mark.parametrize("route", ROUTES)


def body(route: str, text: str, num_tokens: int = 12, **fields: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"temperature": 0, "ignore_eos": True, **fields}
    if route == CHAT:
        return {"messages": [{"role": "user", "content": text}], "max_tokens": num_tokens, **own}
    if route == COMPLETIONS:
        return {"prompt": text, "max_tokens": num_tokens, **own}
    return {"input": text, "max_output_tokens": num_tokens, **own}


def whole_text(server: ServerProcess, route: str, asked: dict[str, Any]) -> str:
    reply = server.http.post(route, json=asked)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    if route == CHAT:
        return str(told["choices"][0]["message"]["content"])
    if route == COMPLETIONS:
        return str(told["choices"][0]["text"])
    return "".join(part["text"] for item in told["output"] for part in item["content"])


def pieces(server: ServerProcess, route: str, asked: dict[str, Any]) -> list[str]:
    """What a stream brings, event by event."""
    reply = server.http.post(route, json={**asked, "stream": True})
    assert reply.status_code == 200, reply.text
    found = []
    for line in reply.content.decode("utf-8").split("\n"):
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if route == RESPONSES:
            if event["type"] == "response.output_text.delta":
                found.append(event["delta"])
        elif event["choices"]:
            choice = event["choices"][0]
            text = choice["text"] if route == COMPLETIONS else choice["delta"].get("content")
            found.append(text or "")
    return [piece for piece in found if piece]


TEXTS = {
    "NUL": "a\0b\0",
    "controls": "\x01\x02\x1b[31m\x7f\x85\ufeff\u200b\u2028\u2029",
    "Latin": "naïve Ærøskøbing ﬁ ﬀ",
    "Greek, Cyrillic, Armenian, Georgian": "Ελλάδα Привет Բարեւ გამარჯობა",
    "right to left": "שלום مرحبا ܫܠܡܐ ދިވެހި \u202eabc\u202c",
    "Indic": "नमस्ते বাংলা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം සිංහල ਪੰਜਾਬੀ",
    "South-East Asian": "ภาษาไทย ລາວ မြန်မာ ខ្មែរ",
    "CJK": "你好 世界 こんにちは 안녕하세요 𠮷 𠀀",
    "others": "ᚠᚢᚦ አማርኛ ᏣᎳᎩ ᠮᠣᠩᠭᠣᠯ ⵜⵉⴼⵉⵏⴰⵖ 𐎀𐎁 𓀀",
    "emoji": "🙂 👩‍👩‍👧‍👦 🇳🇴 👋🏽 ❤️",
    "combining": "Z͑ͫ̓a̴l̷g̸o e\u0301 \u1112\u1161\u11ab",
    "end of planes": "\ufdd0\uffff\U0010ffff\U000e0001",
    "spaces": " \t\r\n\u00a0\u3000  x  ",
}


@every_route
@pytest.mark.parametrize("name", TEXTS)
def test_every_script_is_answered_alike_streamed_and_whole(
    server: ServerProcess, route: str, name: str
) -> None:
    """Row 15. The ids are those that transformers has: so it is the text that was sent."""
    asked = body(route, TEXTS[name])
    whole = whole_text(server, route, asked)
    assert "".join(pieces(server, route, asked)) == whole
    if route == COMPLETIONS:
        counted = server.http.post("/tokenize", json={"prompt": TEXTS[name]}).json()
        tokenizer = AutoTokenizer.from_pretrained(min(demos().items())[1])
        assert counted["tokens"] == tokenizer(TEXTS[name])["input_ids"]


LONE = ("\\ud800", "\\udfff", "a\\udc00b", "\\ud83d", "\\ude42\\ud83d")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", [*ROUTES, "/tokenize"])
def test_half_of_a_surrogate_pair_is_400_anywhere(
    server: ServerProcess, route: str, stream: bool
) -> None:
    """Row 15: in the prompt, in other fields, as a field's name; a whole pair is a character."""
    made = {"prompt": "MARK"} if route == "/tokenize" else body(route, "MARK", stream=stream)
    text = json.dumps(made)
    pair = text.replace("MARK", "\\ud83d\\ude42")
    assert server.http.post(route, content=pair).status_code == 200
    with undisturbed(server):
        for lone in LONE:
            check_error(server.http.post(route, content=text.replace("MARK", lone)), 400)
            for field in ("model", "cache_salt", "stop"):
                bad = f'{{"{field}": "{lone}", {text[1:]}'
                check_error(server.http.post(route, content=bad), (400, 404))
            check_error(server.http.post(route, content=f'{{"{lone}": 1, {text[1:]}'), 400)


@pytest.fixture(scope="module")
def specials() -> dict[str, int]:
    """The special tokens of the demo, which a user may type."""
    tokenizer = AutoTokenizer.from_pretrained(min(demos().items())[1])
    found = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert {"<image>", "</s>"} <= set(found)
    return found


def conversation(place: str, text: str) -> list[dict[str, Any]]:
    """A conversation of all roles, with this text in one of them."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    texts = dict.fromkeys(("system", "developer", "user", "assistant", "tool", "parts"), "x")
    texts[place] = text
    return [
        {"role": "system", "content": texts["system"]},
        {"role": "developer", "content": texts["developer"]},
        {"role": "user", "content": texts["user"]},
        {"role": "assistant", "content": texts["assistant"], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": texts["tool"]},
        {"role": "user", "content": [{"type": "text", "text": texts["parts"]}]},
    ]


@pytest.mark.parametrize("place", ["system", "developer", "user", "assistant", "tool", "parts"])
def test_typed_special_tokens_are_text_in_every_message(
    server: ServerProcess, specials: dict[str, int], place: str
) -> None:
    """Row 18. Those of the template stay; in a raw prompt they are what they say (the control)."""

    def ids(text: str) -> list[int]:
        reply = server.http.post("/tokenize", json={"messages": conversation(place, text)})
        assert reply.status_code == 200, reply.text
        return list(reply.json()["tokens"])

    plain = ids("x")
    for token, number in specials.items():
        assert ids(f"x {token} x").count(number) == plain.count(number), token
        raw = server.http.post("/tokenize", json={"prompt": f"x {token} x"}).json()["tokens"]
        assert number in raw, token
    typed = " ".join([*specials, "<|im_start|>", "<|image_pad|>", "[INST]"])
    asked = {"messages": conversation(place, typed), "max_tokens": 3, "temperature": 0}
    encodes = server.metric("mm_engine_encodes_total")
    reply = server.http.post(CHAT, json=asked)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["prompt_tokens"] == len(ids(typed))
    assert server.metric("mm_engine_encodes_total") == encodes, "no image is bound to it"


@every_route
@pytest.mark.parametrize("character", ["é", "你", "🙂"])
def test_bytes_of_a_character_come_whole(server: ServerProcess, route: str, character: str) -> None:
    """Row 20. The model is made to say the character's bytes, each of which is a token."""
    asked = {"prompt": character, "add_special_tokens": False}
    tokens = server.http.post("/tokenize", json=asked).json()["tokens"]
    num_bytes = len(character.encode())
    bias = dict.fromkeys(map(str, tokens[-num_bytes:]), 100)
    shown: dict[str, Any] = {"logit_bias": bias, "temperature": 1.5, "seed": 3}
    request = body(route, "x", 60, **shown)
    whole = whole_text(server, route, request)
    found = pieces(server, route, request)
    assert "".join(found) == whole
    assert len(found) > 1
    assert any(c > "\x7f" and c != "\ufffd" for c in whole), "characters of several tokens"


@every_route
def test_emoji_and_cjk_in_pieces_hold_no_replacement_character(
    server: ServerProcess, route: str
) -> None:
    """Row 20: a grammar makes the model say them, a byte a token."""
    said = "é你🙂👩‍👩‍👧‍👦世🇳🇴ش"
    fields = {"guided_choice": [said], "ignore_eos": False}
    request = body(route, "x", 200, **fields)
    found = pieces(server, route, request)
    assert whole_text(server, route, request) == "".join(found) == said
    assert len(found) > 5
    asked = {"prompt": said, "add_special_tokens": False}
    assert server.http.post("/tokenize", json=asked).json()["count"] > len(said)


@every_route
def test_stop_strings_are_never_sent_streamed_or_whole(server: ServerProcess, route: str) -> None:
    """Row 21: across tokens, inside of one, overlapping, several; cut where the first one ends."""
    asked = body(route, "a red circle and a", 60)
    free = whole_text(server, route, asked)
    assert len(free) > 60
    told = server.http.post(COMPLETIONS, json=body(COMPLETIONS, "a", 60, logprobs=0)).json()
    assert max(map(len, told["choices"][0]["logprobs"]["tokens"])) > 2, "tokens of several letters"

    def cut(stops: list[str]) -> str:
        """By the definition: letter by letter until a stop string is complete."""
        for end in range(1, len(free) + 1):
            hit = [stop for stop in stops if free[:end].endswith(stop)]
            if hit:
                return free[: end - max(map(len, hit))]
        return free

    cases = [[free[at : at + length]] for at in (20, 33, 47) for length in (1, 2, 3, 5, 9, 17)]
    cases += [[free[30:40], free[35:50]], [free[35:50], free[30:52]], [free[40:44], free[40:49]]]
    cases += [[free[30:34] + "\x00", free[36:39]], ["not in there"]]
    for stops in cases:
        request = {**asked, "stop": stops}
        whole = whole_text(server, route, request)
        assert whole == cut(stops), stops
        found = pieces(server, route, request)
        assert "".join(found) == whole, stops
        assert not any(stop in "".join(found) for stop in stops)
    kept = {**asked, "stop": [free[30:36]], "include_stop_str_in_output": True}
    assert whole_text(server, route, kept) == cut([free[30:36]]) + free[30:36]
