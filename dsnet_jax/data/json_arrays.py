"""The arrays of a JSON file too large to be held in memory, one element after the other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dsnet_jax.errors import InputError

_CHUNK_CHARACTERS = 2**20
_AFTER_VALUES = tuple(":,]} \t\r\n")  # Whatever else is there may belong to a number that is cut in two, as 1 and .5.


def read_arrays(path: Path) -> Iterator[tuple[str, Any]]:
    """Goes through a file that holds one object.

    Yields:
      (key, element) for every element of a value that is an array, (key, value) for another.

    Raises:
      InputError: it cannot be read, or is no JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            yield from _Reader(file).members()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged or no JSON file ({error}): download it again") from error


class _Reader:
    """Holds the part of the text that is being looked at."""

    def __init__(self, file: TextIO):
        self._file, self._text, self._position = file, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def members(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        while not self._skip("}"):
            key = self._value()
            if not isinstance(key, str):
                raise ValueError(f"{key!r:.50} in the place of a key")
            self._expect(":")
            if self._skip("["):
                while not self._skip("]"):
                    yield key, self._value()
                    if not self._skip(","):
                        self._expect("]")
                        break
            else:
                yield key, self._value()
            if not self._skip(","):
                self._expect("}")
                break
        self._expect("")

    def _value(self) -> Any:
        """The value that comes next, which is decoded again with more text as long as it may not be all there."""
        self._next()
        while True:
            try:
                value, end = self._decode(self._text, self._position)
                if self._text[end : end + 1] in _AFTER_VALUES or not self._read_on():
                    self._position = end
                    return value
            except ValueError:
                if not self._read_on():
                    raise

    def _next(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            rest = self._text[self._position : self._position + 64].lstrip(" \t\r\n")
            if rest:
                self._position = self._text.index(rest[0], self._position)
                return rest[0]
            self._position = min(self._position + 64, len(self._text))
            if self._position == len(self._text) and not self._read_on():
                return ""

    def _skip(self, character: str) -> bool:
        found = self._next() == character
        self._position += len(character) * found
        return found

    def _expect(self, character: str):
        if not self._skip(character):
            raise ValueError(f"{character!r} expected, {self._next()!r} found")

    def _read_on(self) -> bool:
        """Drops what was looked at and reads more, twice as much if a value needs it; False at the end."""
        more = self._file.read(max(_CHUNK_CHARACTERS, len(self._text) - self._position))
        self._text, self._position = self._text[self._position :] + more, 0
        return bool(more)
