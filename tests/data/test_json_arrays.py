import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_jax.data import json_arrays
from dsnet_jax.data.json_arrays import read_arrays
from dsnet_jax.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=5), st.integers(1, 40), st.sampled_from([None, 0, 3]))
def test_the_elements_are_those_of_the_json_module_however_the_file_is_cut(tmp_path_factory, content, chunk, indent):
    file = tmp_path_factory.getbasetemp() / "content.json"
    file.write_text(json.dumps(content, indent=indent))
    wanted = [(key, e) for key, value in content.items() for e in (value if isinstance(value, list) else [value])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "_CHUNK_CHARACTERS", chunk)
        assert list(read_arrays(file)) == wanted


@pytest.mark.parametrize(
    "text", ["", "[1]", "3", '{"a": [1, 2', '{"a": [1 2]}', '{"a" 1}', '{"a": 1', '{"a": nope}', "{1: 2}x", "[" * 9999]
)
def test_another_file_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json: damaged or no JSON file"):
        list(read_arrays(tmp_path / "a.json"))


def test_a_file_that_is_not_utf_8_or_not_there_is_an_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(InputError, match=r"a\.json: damaged"):
        list(read_arrays(tmp_path / "a.json"))
    with pytest.raises(InputError, match=r"b\.json: cannot be read: No such file"):
        list(read_arrays(tmp_path / "b.json"))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_arrays, "_CHUNK_CHARACTERS", 2**16)
    element = json.dumps({"counts": "x" * 500})
    with open(tmp_path / "a.json", "w") as file:
        file.write('{"a": [' + ", ".join([element] * 10_000) + "]}")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_arrays(tmp_path / "a.json")) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000, "of 5 MB"
    finally:
        tracemalloc.stop()
