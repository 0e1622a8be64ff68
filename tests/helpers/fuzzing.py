"""Hypothesis strategies for damaged files: JSON objects with one wrong value, and texts with wrong bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

DEEP = "@deep@"
"""Placeholder in a JSON value: replaced by 5,000 nested lists, more than `json.dumps` writes."""
VALUES = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**63, 10**12, 10**30, -(10**30), 10**400),
            *(0.0, 0.5, 1.5, -2.5, 1e-320, 1e38, 1e308, math.nan, math.inf, -math.inf),
            *(
                "",
                "x",
                "1",
                "null",
                "true",
                "a\nb",
                "\0",
                "\ud800",
                "\x1b[31m",
                "x" * 5000,
                "é" * 300,
                "../..",
                "{{ x",
                DEEP,
            ),
            *([], [[]], [None], ["x"], [-1], [10**30], [1.5], list(range(2000)), {}, {"a": 1}, {"a": {"b": {"c": []}}}),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=6
    ),
)
NOISE = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.sampled_from(
        [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\x85", b"{", b"[" * 2000, b'"', b",", b"\\ud800", b"\n" * 50]
    ),
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value within nested objects and lists, of which the first ten entries count."""
    if isinstance(value, dict | list):
        for key in list(value if isinstance(value, dict) else range(len(value)))[: 10 if path else None]:
            yield (*path, key)
            yield from paths_of(value[key], (*path, key))


def dump(table: Any) -> bytes:
    """JSON with NaN and lone surrogates, as other programs write it."""
    text = json.dumps(table).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut short, or with some bytes put in or in place of others; or other bytes altogether."""
    kind = draw(st.sampled_from(["cut", "insert", "replace", "other"]))
    if kind == "other":
        return draw(st.one_of(st.just(b""), NOISE))
    place = draw(st.integers(0, len(content)))
    if kind == "cut":
        return content[:place]
    noise = draw(NOISE)
    return content[:place] + noise + content[place + (len(noise) if kind == "replace" else 0) :]


@st.composite
def damaged_json(draw: st.DrawFn, table: Any) -> bytes:
    """A JSON file with one value changed, left out or added, somewhere in it; or damaged as bytes."""
    kind = draw(st.sampled_from(["value", "value", "value", "value", "remove", "add", "bytes"]))
    if kind == "bytes":
        return draw(damaged_bytes(dump(table)))
    changed = json.loads(json.dumps(table))
    if kind == "add":
        changed[draw(st.text(max_size=8))] = draw(VALUES)
        return dump(changed)
    path = draw(st.sampled_from(list(paths_of(table))))
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if kind == "remove":
        del holder[path[-1]]
    else:
        holder[path[-1]] = draw(VALUES)
    return dump(changed)
