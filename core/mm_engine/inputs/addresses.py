"""Which network addresses a picture may be fetched from: public ones only, however they are spelt.

`ipaddress` knows most of what isn't public, but not all of it in every version of Python, and an
IPv4 address can hide in an IPv6 one. So what is left unsaid there is said here.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

_UNICAST = IPv6Network("2000::/3")  # the part of IPv6 in which public addresses are given out
_NAT64 = IPv6Network("64:ff9b::/96")  # the last four bytes are an IPv4 address
_NEVER = tuple(
    map(
        ip_network,
        (
            "100.64.0.0/10",  # carriers' NAT; some clouds tell their secrets there
            "168.63.129.16/32",  # a cloud's metadata, at an address that looks public
            "192.0.0.0/24",  # protocol assignments; again a cloud's metadata
            "192.88.99.0/24",  # relays of 6to4
            "198.18.0.0/15",  # benchmarks
            "240.0.0.0/4",
            "2001::/23",  # Teredo and its like
            "2002::/16",  # 6to4: leads to the IPv4 address within
            "3fff::/20",  # documentation
        ),
    )
)


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet; what is no address doesn't."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed.scope_id is not None:  # on one of this machine's own links
            return False
        inner = parsed.ipv4_mapped
        if parsed in _NAT64:
            inner = IPv4Address(int(parsed) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
        if parsed not in _UNICAST:
            return False
    if parsed.is_multicast or not parsed.is_global:
        return False
    return not any(parsed in network for network in _NEVER)
