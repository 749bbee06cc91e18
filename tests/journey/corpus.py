"""A small corpus as a person would bring one: JSON lines and plain text, one file compressed."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

SUBJECTS = "the miller|a heron|our neighbour|the small engine|Zoë|a patient reader|the tide"
VERBS = "carries|repairs|measures|follows|remembers|paints|counts"
OBJECTS = "the old bridge|two letters|a map of the coast|bread|the long river|every window|a lamp"
PLACES = "before dawn|in the harbour|near the mill|after the rain|without a word|on the hill"
SEED = 7
DOCUMENTS = 240


def write_corpus(folder: Path) -> None:
    """Writes three files of documents into a new folder: about 250 kB of text."""
    folder.mkdir()
    source = random.Random(SEED)
    texts = [_document(source) for _ in range(DOCUMENTS)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "stories.jsonl").write_text("".join(lines[: DOCUMENTS // 2]))
    with gzip.open(folder / "more.jsonl.gz", "wt") as file:
        file.writelines(lines[DOCUMENTS // 2 :])
    (folder / "letter.txt").write_text(_document(source))


def _document(source: random.Random) -> str:
    sentences = []
    for _ in range(source.randint(8, 40)):
        words = [source.choice(part.split("|")) for part in (SUBJECTS, VERBS, OBJECTS, PLACES)]
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)
