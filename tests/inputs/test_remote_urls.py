"""Which http and https URLs are taken: those that lead to a host that was named, and no other."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mm_engine.errors import StartupError
from mm_engine.inputs.remote_urls import BadURL, Target, parse_allowed_hosts, parse_url


def is_taken(url: str, *allowed: str) -> bool:
    try:
        target = parse_url(url)
    except BadURL:
        return False
    return any(host.admits(target) for host in parse_allowed_hosts(allowed))


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("example.com", "https://example.com/a.png"),
        ("example.com", "http://example.com/a.png?b=c#d"),
        ("example.com", "HTTPS://EXAMPLE.COM"),
        ("example.com", "https://example.com./a.png"),
        ("example.com.", "https://example.com:443/a.png"),
        ("EXAMPLE.com", "http://example.com:80/a.png"),
        ("example.com:8443", "https://example.com:8443/a.png"),
        ("example.com:443", "https://example.com/a.png"),
        ("*.example.com", "https://a.example.com/a.png"),
        ("*.example.com", "https://a.b.example.com/a.png"),
        ("*.example.com:8443", "https://a.example.com:8443/a.png"),
        ("bücher.example", "https://xn--bcher-kva.example/a.png"),
        ("xn--bcher-kva.example", "https://BÜCHER.example/a.png"),
        ("a.com, example.com", "https://example.com/a.png"),
        ("8.8.8.8", "https://8.8.8.8/a.png"),
        ("[2001:4860::8888]", "https://[2001:4860:0:0::8888]/a.png"),
    ],
)
def test_named_hosts_are_taken_in_any_spelling(allowed: str, url: str) -> None:
    assert is_taken(url, allowed)


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("example.com", "https://a.example.com/"),
        ("example.com", "https://example.com.evil.com/"),
        ("example.com", "https://evilexample.com/"),
        ("example.com", "https://evil.com/example.com"),
        ("example.com", "https://evil.com?example.com"),
        ("example.com", "https://evil.com#example.com"),
        ("example.com", "https://example.com@evil.com/"),
        ("example.com", "https://example.com:443@evil.com/"),
        ("example.com", "https://user@example.com/"),
        ("example.com", "https://:password@example.com/"),
        ("example.com", "https://evil.com\\@example.com/"),
        ("example.com", "https://example.com\\@evil.com/"),
        ("example.com", "https://example.com\\.evil.com/"),
        ("example.com", "https://example.com%2eevil.com/"),
        ("example.com", "https://%65xample.com/"),
        ("example.com", "https://example.com../"),
        ("example.com", "https://example.com:8443/"),
        ("example.com", "https://example.com:80/"),
        ("example.com", "http://example.com:443/"),
        ("example.com", "http://example.com:0/"),
        ("example.com", "http://example.com:65616/"),
        ("example.com", "http://example.com:-80/"),
        ("example.com", " http://example.com/"),
        ("example.com", "http://exam\tple.com/"),
        ("example.com", "http://example.com/\n"),
        ("example.com", "http://example.com\0/"),
        ("example.com", "http:example.com/"),
        ("example.com", "http:/example.com/"),
        ("example.com", "http:///example.com/"),
        ("example.com", "//example.com/"),
        ("example.com", "ftp://example.com/"),
        ("example.com", "file://example.com/"),
        ("example.com", "https://example.com/" + "a" * 8192),
        ("example.com:8443", "https://example.com/"),
        ("*.example.com", "https://example.com/"),
        ("*.example.com", "https://evilexample.com/"),
        ("*.example.com", "https://.example.com/"),
        ("*.example.com", "https://evil.com\\.example.com/"),
        ("*.example.com", "https://evil.com%2f.example.com/"),
        ("*.example.com", "https://evil.com%00.example.com/"),
        ("*.example.com", "https://evil.com,.example.com/"),
        ("127.0.0.1", "http://2130706433/"),
        ("127.0.0.1", "http://0177.0.0.1/"),
        ("127.0.0.1", "http://[::ffff:127.0.0.1]/"),
    ],
)
def test_other_hosts_ports_and_schemes_are_not(allowed: str, url: str) -> None:
    assert is_taken(f"https://{allowed.replace('*', 'a')}/", allowed)
    assert not is_taken(url, allowed)


@pytest.mark.parametrize(
    "entry",
    ["*", "*.", "*.com", "*.127.0.0.1", "a.*.com", "https://example.com", "example.com/a",
     "user@example.com", "example.com:0", "example.com:x", "exa mple.com", "::1", "[::1", "..",
     "-a.com", "a?b", "[fe80::1%eth0]:x"],
)  # fmt: skip
def test_hosts_that_cannot_be_meant_are_refused_at_startup(entry: str) -> None:
    fact = "^--allowed-media-domains (can't be read|names too much)"
    with pytest.raises(StartupError, match=fact):
        parse_allowed_hosts([entry])


def test_no_hosts_are_no_hosts() -> None:
    assert parse_allowed_hosts(["", " , "]) == ()


@pytest.mark.parametrize(
    ("location", "leads"),
    [
        ("b.png", "https example.com 443 /a/b.png"),
        ("/b.png?c", "https example.com 443 /b.png?c"),
        ("//other.com/b.png", "https other.com 443 /b.png"),
        ("http://other.com:81", "http other.com 81 /"),
        ("file:///etc/passwd", ""),
        ("data:image/png;base64,", ""),
        ("https://user:password@example.com", ""),
        ("https://[", ""),
        ("\\\\evil.com/b.png", "https example.com 443 /a/\\\\evil.com/b.png"),
    ],
)
def test_redirects_lead_where_their_text_says_or_nowhere(location: str, leads: str) -> None:
    try:
        target = Target("https", "example.com", 443, "/a/a.png").redirected(location)
    except BadURL:
        assert leads == ""
    else:
        assert f"{target.scheme} {target.host} {target.port} {target.path}" == leads


@settings(max_examples=500)
@given(
    st.sampled_from(["", "http://", "https://", "http://example.com", "http://[", "http://a@"]),
    st.text(max_size=60),
)
@example("http://", "xn--a")
@example("http://", "\ud800")
@example("http://", "ｅｘａｍｐｌｅ．com")
def test_any_text_is_a_plain_target_or_refused(start: str, text: str) -> None:
    try:
        target = parse_url(start + text)
    except BadURL:
        return
    assert target.scheme in ("http", "https")
    assert target.path.isascii() and target.path.isprintable() and target.path.startswith("/")
    assert target.host == target.host.lower().strip(".") and target.host.isascii()
    assert not set(target.host) & set("@/\\?#%[] ")
    assert parse_url(f"{target.scheme}://{target.authority}{target.path}") == target
