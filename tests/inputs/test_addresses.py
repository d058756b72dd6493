"""Which addresses are public: none of this machine's, of its networks, or of nobody's."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_engine.inputs.addresses import is_public

PRIVATE = (
    *("127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    *("0.0.0.0", "0.1.2.3", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1"),
)
PRIVATE_6 = (
    *(
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "fd00:ec2::254",
        "fd20:ce::254",
    ),
    *("ff02::1", "ff0e::1", "2001:db8::1", "2001::1", "2001:10::1", "2002:808:808::1", "3fff::1"),
    *("100::1", "4000::1", "2606:4700::1111%eth0", "64:ff9b:1::808:808", "5f00::1"),
)
PUBLIC = ("8.8.8.8", "93.184.216.34", "172.32.0.1", "100.128.0.1", "192.0.1.1")
PUBLIC_6 = ("2606:4700::1111", "2a00:1450:4001:830::200e", "2001:4860:4860::8888")


def inside(address: str) -> list[str]:
    """The IPv6 addresses that lead to an IPv4 address: mapped, by NAT64, compatible, 6to4."""
    number = int(ipaddress.IPv4Address(address))
    low, high = number & 0xFFFF, number >> 16
    return [
        f"::ffff:{address}",
        f"64:ff9b::{address}",
        f"::{high:x}:{low:x}",
        f"2002:{high:x}:{low:x}::1",
    ]


@pytest.mark.parametrize("address", [*PRIVATE, *PRIVATE_6])
def test_what_is_not_public_is_not_taken(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PRIVATE)
def test_nor_is_it_inside_of_an_ipv6_address(address: str) -> None:
    assert [spelt for spelt in inside(address) if is_public(spelt)] == []


@pytest.mark.parametrize("address", [*PUBLIC, *PUBLIC_6])
def test_what_is_public_is_taken(address: str) -> None:
    assert is_public(address)


def test_public_addresses_inside_of_ipv6_are_those_of_mapping_and_nat64() -> None:
    assert [is_public(spelt) for spelt in inside("8.8.8.8")] == [True, True, False, False]


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "8.8.8.8 ", "[::1]"],
)
def test_what_is_no_address_is_not_taken(text: str) -> None:
    assert not is_public(text)


@given(st.ip_addresses())
def test_nothing_is_taken_that_python_knows_not_to_be_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if is_public(str(address)):
        inner = getattr(address, "ipv4_mapped", None) or address
        assert inner.is_global
        assert not (inner.is_multicast or inner.is_loopback or inner.is_link_local)
