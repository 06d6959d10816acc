"""What operators may call an adapter and say of where it lies."""

from __future__ import annotations

import pytest

from common.adapters import MAX_ADAPTERS, MAX_NAME, MAX_SOURCE, check_name, check_source, read_sources


def test_sources_are_read_as_tgi_reads_them() -> None:
    items = ["fr=/adapters/fr", "sql = owner/sql@v2", "org/Legal-7B.v1", "org/poems@0f0f", "a.b/c=./here"]
    assert read_sources(items) == {
        "fr": "/adapters/fr",
        "sql": "owner/sql@v2",
        "org/Legal-7B.v1": "org/Legal-7B.v1",
        "org/poems": "org/poems@0f0f",
        "a.b/c": "./here",
    }


@pytest.mark.parametrize(
    "name", ["", "a b", "é", ".", "a/..", "a/../b", "/a", "a//b", "a/", "{a}", "x" * (MAX_NAME + 1)]
)
def test_names_that_do_not_fit_into_a_path_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="an adapter's name is 1 to 96 of"):
        check_name(name)
    check_name("x" * MAX_NAME)


@pytest.mark.parametrize(
    "source", ["", "/a\0b", "a\nb", "\ud800", "x" * (MAX_SOURCE + 1), "https://hub/a", "file:///a"]
)
def test_sources_that_are_no_place_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="an adapter's source is"):
        check_source(source)
    check_source("/adapters/Ünïcode and spaces")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["/adapters/fr"], "'/adapters/fr' is neither name=folder nor owner/name"),
        (["word"], "'word' is neither name=folder nor"),
        (["a=/x", "a=/y"], "'a' is given twice"),
        (["=/x"], "an adapter's name is"),
        (["tgi=/x"], "'tgi' means any model that is served; give the adapter another name"),
        (["a="], "an adapter's source is"),
        ([f"n{i}=/x" for i in range(MAX_ADAPTERS + 1)], "at most 1024 adapters"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(items: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sources(items)
