"""JSON is read as data, or refused in one sentence."""

from __future__ import annotations

import pytest

from tl_vpd.files.json_files import parse_json, read_json, write_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('{"a": -Infinity}', "-Infinity is not a number of JSON"),
        ('{"a": 1e999}', "1e999 is not a number of JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5_000, "is not JSON: Exceeds the limit"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 text"),
        (b"\x00", "is not JSON"),
    ],
)
def test_what_is_not_json_is_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_json(text, "x.json")
    assert str(error.value).startswith("x.json ")
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_numbers_that_json_lacks_are_not_written(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert read_json(tmp_path / "x.json") == {"a": 1.5}


def test_what_is_not_data_is_not_written(tmp_path):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    for content, error, message in (
        ({"a": {1, 2}}, TypeError, r"must be strings, numbers, lists and dicts \(Object of type set is not JSON"),
        ([nested], ValueError, "must be finite numbers, without endless nesting"),
        ([10**5_000], ValueError, "Exceeds the limit"),
    ):
        with pytest.raises(error, match=message):
            write_json(tmp_path / "x.json", content)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="is not an ordinary file"):
        read_json(tmp_path)
