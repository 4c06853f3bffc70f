"""A reader of WordNet 3.0 databases (see wndb(5WN)), equivalent to the parts of NLTK's reader that METEOR needs."""

from __future__ import annotations

import mmap
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError

FOLDERS = ("/usr/share/wordnet", "/usr/share/nltk_data/corpora/wordnet", "/usr/local/WordNet-3.0/dict")
_PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_FILES = tuple(name for pos in _PARTS_OF_SPEECH.values() for name in (f"index.{pos}", f"data.{pos}", f"{pos}.exc"))
_MARKER = re.compile(r"\(.*\)$")


def find_wordnet(given: str | None = None) -> Path:
    """Find the folder of the WordNet database.

    Args:
        given: The folder; None means the environment variable WNSEARCHDIR or, if it is not set, the usual folders.

    Raises:
        UserError: If no database is found, or the named folder lacks a file.
    """
    named = given or os.environ.get("WNSEARCHDIR")
    for folder in [Path(named)] if named else map(Path, FOLDERS):
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if not missing:
            return folder
        if named:
            raise UserError(f"WordNet folder {folder}: {missing[0]} is missing; name the folder that contains it")
    raise UserError(
        f"METEOR needs WordNet, which is not in {' or '.join(FOLDERS)}; run `apt-get install wordnet-base`, or set "
        "WNSEARCHDIR to its folder"
    )


def wordnet_if_any(given: str | None, what: str) -> Path | None:
    """Return the folder of the WordNet database. If none is given or installed, print a note and return None.

    Args:
        given: The folder; None as in `find_wordnet`.
        what: A description of the work that is done without METEOR, for the note.

    Raises:
        UserError: If a folder is given that does not contain WordNet.
    """
    try:
        return find_wordnet(given)
    except UserError as error:
        if given or os.environ.get("WNSEARCHDIR"):
            raise
        print(f"note: {what} without METEOR; {error}", file=sys.stderr, flush=True)
        return None


@dataclass(frozen=True)
class Lemma:
    """One word in a synset. The words of a multi-word term are joined by underscores."""

    text: str

    def name(self) -> str:
        return self.text


@dataclass(frozen=True)
class Synset:
    """A set of words with one meaning."""

    words: tuple[Lemma, ...]

    def lemmas(self) -> tuple[Lemma, ...]:
        return self.words


class WordNet:
    """A replacement for NLTK's `WordNetCorpusReader`, with only the parts that `nltk.translate.meteor_score` uses.

    NLTK's reader needs two additional files, lexnames (which Debian's package lacks) and index.sense. It also reads
    only from NLTK's data folders.

    Args:
        folder: The folder returned by `find_wordnet`.
    """

    def __init__(self, folder: Path) -> None:
        from nltk.corpus.reader.wordnet import WordNetCorpusReader

        self._suffixes = WordNetCorpusReader.MORPHOLOGICAL_SUBSTITUTIONS
        self._index: dict[str, dict[str, str]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        self._data: dict[str, mmap.mmap] = {}
        for pos, name in _PARTS_OF_SPEECH.items():
            # Lines of the license text begin with a space.
            lines = (folder / f"index.{name}").read_text(encoding="utf-8").splitlines()
            self._index[pos] = dict(line.split(" ", 1) for line in lines if not line.startswith(" "))
            words = [line.split() for line in (folder / f"{name}.exc").read_text(encoding="utf-8").splitlines()]
            self._exceptions[pos] = {first: rest for first, *rest in words}
            with (folder / f"data.{name}").open("rb") as file:
                self._data[pos] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def synsets(self, word: str) -> list[Synset]:
        """Return the synsets, for every part of speech, of `word` and of words of which it may be an inflection.

        Inflections are resolved as in morphy(7WN).
        """
        word = word.lower()
        return [
            self._synset(pos, int(offset))
            for pos in _PARTS_OF_SPEECH
            for form in self._forms(word, pos)
            for offset in _offsets(self._index[pos][form])
        ]

    def _forms(self, word: str, pos: str) -> list[str]:
        forms = self._exceptions[pos].get(word)
        if forms is None:
            forms = [word[: -len(old)] + new for old, new in self._suffixes[pos] if word.endswith(old)]
        return [form for form in dict.fromkeys([word, *forms]) if form in self._index[pos]]

    def _synset(self, pos: str, offset: int) -> Synset:
        data = self._data[pos]
        fields = data[offset : data.find(b"\n", offset)].decode("utf-8").split(" ")
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        # Adjectives may have a marker of their position in the sentence, as in "galore(ip)".
        return Synset(tuple(Lemma(_MARKER.sub("", word)) for word in words))


def _offsets(line: str) -> list[str]:
    """Return the synset offsets in a line of an index whose word has been removed.

    The line contains the part of speech, the number of synsets, pointers, sense counts and, at the end, the offsets.
    """
    fields = line.split()
    return fields[-int(fields[1]) :]
