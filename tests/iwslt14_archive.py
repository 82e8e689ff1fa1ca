"""An archive of the layout of IWSLT'14, made of the generated corpus, tags, XML and all."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from data_prep import generated

TEST_FILES = (
    "IWSLT14.TED.dev2010",
    "IWSLT14.TEDX.dev2012",
    "IWSLT14.TED.tst2010",
    "IWSLT14.TED.tst2011",
    "IWSLT14.TED.tst2012",
)
TRAINING_SENTENCES, TEST_SENTENCES = 500, 6


def training_file(sentences: list[str], language: str) -> str:
    """Talks of 100 sentences, each under its tags, and pairs that cleaning drops."""
    text = []
    for start in range(0, len(sentences), 100):
        text += [
            "<url>http://www.example.org/a_talk</url>",
            "<keywords>talks, science</keywords>",
            "<speaker>Somebody</speaker>",
            f"<talkid>{start}</talkid>",
            f'<title>Talk {start}: It\'s a "title"</title>',
            "<description>TED Talk Subtitles: [music] & more.</description>",
            '<reviewer href="http://www.example.org">Nobody</reviewer>',
            '<translator href="http://www.example.org">Nobody</translator>',
            *(f" {sentence} " for sentence in sentences[start : start + 100]),
        ]
    long_side, longer_side = ("kurz", "lang " * 2) if language == "de" else ("short " * 4, "long " * 3)
    rare = "quarzxylophon zu" if language == "de" else "quartz xylophones"
    return "\n".join([*text, "", long_side, longer_side, "word " * 176, "word " * 175, rare, ""])


def xml_file(sentences: list[str]) -> str:
    segments = (f'<seg id="{i}"> {sentence} </seg>' for i, sentence in enumerate(sentences, 1))
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            '<mteval><refset setid="a" srclang="any" trglang="de"><doc docid="1" genre="lectures">',
            "<title>Left out</title>",
            *segments,
            "</doc></refset></mteval>\n",
        ]
    )


def contents() -> dict[str, bytes]:
    pairs = generated.pairs(TRAINING_SENTENCES + len(TEST_FILES) * TEST_SENTENCES, seed=1)
    files = {"de-en/README": "about the corpus"}
    for language, side in (("de", "source"), ("en", "target")):
        texts = [getattr(pair, side) for pair in pairs]
        training, held_out = texts[:TRAINING_SENTENCES], texts[TRAINING_SENTENCES:]
        files[f"de-en/train.tags.de-en.{language}"] = training_file(training, language)
        for i, name in enumerate(TEST_FILES):
            segments = held_out[i * TEST_SENTENCES : (i + 1) * TEST_SENTENCES]
            segments[0] = f"Test set {i}: it\u2019s &amp; isn't so."
            files[f"de-en/{name}.de-en.{language}.xml"] = xml_file(segments)
    return {name: text.encode() for name, text in files.items()}


def archived(file: Path, members: dict[str, bytes], *special: tarfile.TarInfo) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in special:
            archive.addfile(member)
    return file
