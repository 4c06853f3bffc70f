"""Synonyms from a WordNet 3.0 database (wndb(5WN)), read as NLTK reads it: all that METEOR asks of it."""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError

FOLDERS = ("/usr/share/wordnet", "/usr/share/nltk_data/corpora/wordnet", "/usr/local/WordNet-3.0/dict")
_PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_FILES = tuple(name for pos in _PARTS_OF_SPEECH.values() for name in (f"index.{pos}", f"data.{pos}", f"{pos}.exc"))
_MARKER = re.compile(r"\(.*\)$")


def find_wordnet(given: str | None = None) -> Path:
    """The folder of the database: `given`, else WNSEARCHDIR, else where packages put it.

    Raises:
        UserError: there is none, or files are missing from it.
    """
    named = given or os.environ.get("WNSEARCHDIR")
    for folder in [Path(named)] if named else map(Path, FOLDERS):
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if not missing:
            return folder
        if named:
            raise UserError(f"WordNet folder {folder}: it has no {missing[0]}; name the folder that has it")
    raise UserError(
        f"METEOR needs WordNet, which is not in {' or '.join(FOLDERS)}: `apt-get install wordnet-base`, or set "
        "WNSEARCHDIR to its folder"
    )


@dataclass(frozen=True)
class Lemma:
    """One word of a synset; words of several parts have underscores."""

    text: str

    def name(self) -> str:
        return self.text


@dataclass(frozen=True)
class Synset:
    """Words of one meaning."""

    words: tuple[Lemma, ...]

    def lemmas(self) -> tuple[Lemma, ...]:
        return self.words


class WordNet:
    """What `nltk.translate.meteor_score` needs of NLTK's `WordNetCorpusReader`, and equal to it.

    NLTK's own reader wants a file that Debian's package lacks (lexnames), another that it maps versions with
    (index.sense), and reads only below its own data folders.

    Args:
        folder: from `find_wordnet`.
    """

    def __init__(self, folder: Path) -> None:
        from nltk.corpus.reader.wordnet import WordNetCorpusReader

        self._suffixes = WordNetCorpusReader.MORPHOLOGICAL_SUBSTITUTIONS
        self._index: dict[str, dict[str, str]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        self._data: dict[str, mmap.mmap] = {}
        for pos, name in _PARTS_OF_SPEECH.items():
            # Lines of the licence begin with a space.
            lines = (folder / f"index.{name}").read_text(encoding="utf-8").splitlines()
            self._index[pos] = dict(line.split(" ", 1) for line in lines if not line.startswith(" "))
            words = [line.split() for line in (folder / f"{name}.exc").read_text(encoding="utf-8").splitlines()]
            self._exceptions[pos] = {first: rest for first, *rest in words}
            with (folder / f"data.{name}").open("rb") as file:
                self._data[pos] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def synsets(self, word: str) -> list[Synset]:
        """Meanings of `word` and of the forms that it may be an inflection of (morphy(7WN)), as any part of speech."""
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
        # Adjectives may carry a marker of their place in the sentence: "galore(ip)".
        return Synset(tuple(Lemma(_MARKER.sub("", word)) for word in words))


def _offsets(line: str) -> list[str]:
    """Of an index line without its word: pos, number of synsets, pointers, senses, and last the synsets' offsets."""
    fields = line.split()
    return fields[-int(fields[1]) :]
