"""Tests of METEOR, compared with NLTK and its WordNet reader, and of CIDEr-D, compared with coco-caption."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from trainer.scoring.cider import cider_d
from trainer.scoring.meteor import Meteor
from trainer.scoring.wordnet import WordNet, find_wordnet

KIT = Path(os.environ.get("KIT_DIR", Path(__file__).parents[2] / ".." / "shared" / "kit"))


@pytest.fixture(scope="module")
def wordnet() -> Path:
    try:
        return find_wordnet()
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def nltk_reader(wordnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return NLTK's reader of the same WordNet database, with an additional file that it needs."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    folder = tmp_path_factory.mktemp("nltk") / "wordnet"
    folder.mkdir()
    for path in filter(Path.is_file, wordnet.iterdir()):  # some distributions add folders
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "lexnames").write_text("".join(f"{i:02}\tname.{i}\t1\n" for i in range(45)))

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def map_wn(self, version: str = "wordnet") -> None:
            """Do nothing. The original needs index.sense, and only wordnets of other languages use its result."""

    paths = list(nltk.data.path)
    nltk.data.path.append(str(folder))  # NLTK reads only from its own path
    yield Reader(str(folder), None)
    nltk.data.path[:] = paths


def captions_by_clip(num_clips: int) -> list[list[str]]:
    if not KIT.is_dir():
        pytest.skip(f"there are no real captions in {KIT}; set KIT_DIR")
    clips: dict[str, list[str]] = {}
    with (KIT / "text" / "audiocaps_test.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            clips.setdefault(row["youtube_id"], []).append(row["caption"])
    return [captions for captions in clips.values() if len(captions) > 1][:num_clips]


@pytest.mark.slow
def test_meteor_equals_that_of_nltk_on_human_captions(wordnet: Path, nltk_reader: Any) -> None:
    from nltk import word_tokenize
    from nltk.translate.meteor_score import meteor_score

    ours = Meteor(wordnet)
    num = 0
    for captions in captions_by_clip(60):
        for skipped, hypothesis in enumerate(captions):
            others = captions[:skipped] + captions[skipped + 1 :]
            tokens = [word_tokenize(text, preserve_line=True) for text in others]
            said = word_tokenize(hypothesis, preserve_line=True)
            theirs = meteor_score(tokens, said, wordnet=nltk_reader)
            assert ours(hypothesis, others) == pytest.approx(theirs, abs=1e-6)
            num += 1
    assert num == 300


@pytest.mark.slow
def test_synonyms_equal_those_of_nltk(wordnet: Path, nltk_reader: Any) -> None:
    words = {
        word.lower().strip(".,") for captions in captions_by_clip(60) for text in captions for word in text.split()
    }
    words |= {"men", "geese", "ran", "better", "best", "galore", "xyzzy", "", "its"}
    mine = WordNet(wordnet)
    for word in sorted(words):
        ours = {lemma.name() for synset in mine.synsets(word) for lemma in synset.lemmas()}
        assert ours == {lemma.name() for synset in nltk_reader.synsets(word) for lemma in synset.lemmas()}, word


def test_meteor_of_the_published_examples(wordnet: Path) -> None:
    """Compare with the values in the documentation of NLTK and of Hugging Face's package `evaluate`."""
    meteor = Meteor(wordnet)
    said = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert meteor(said, [reference]) == pytest.approx(0.6944, abs=5e-5)
    assert meteor("non matching hypothesis", ["this is a cat"]) == 0.0
    assert meteor("", ["this is a cat"]) == 0.0
    assert meteor("a dog", ["rain", "a dog"]) == meteor("a dog", ["a dog"]) > 0.9


def test_cider_d_equals_that_of_coco_caption() -> None:
    """Compare with `CiderScorer(n=4, sigma=6.0)` of pycocoevalcap 1.2 on the same samples."""
    samples = [
        ("A dog barks loudly.", ["a dog is barking", "a loud dog barks"]),
        ("rain falls", ["rain is falling on a roof", "heavy rain"]),
        ("music", ["Someone plays music!", "music"]),
        ("a man talks and a dog barks", ["a man is talking while a dog barks", "a dog barks at a man"]),
    ]
    expected = [1.0352574052097623, 0.9751298546301941, 1.9326874425197453, 2.554533662711855]
    assert cider_d([h for h, _ in samples], [r for _, r in samples]) == pytest.approx(expected, abs=1e-6)
    assert cider_d([], []) == [] and cider_d(["rain"], [["rain"]]) == [0.0]


def test_a_missing_wordnet_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setattr("trainer.scoring.wordnet.FOLDERS", (str(tmp_path),))
    with pytest.raises(UserError, match="apt-get install wordnet-base") as caught:
        find_wordnet()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"index\.noun"):
        find_wordnet(str(tmp_path))
