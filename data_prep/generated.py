"""Prepares a corpus of German-English sentences from a small grammar: no network, no file, one second.

    python -m data_prep.generated DEST [--pairs N] [--vocab-size N] [--held-out VALID TEST] [--seed N]

The grammar has what makes German-English more than word for word: gender, case and number agreement,
inversion, verbs at the end of subordinate clauses, separable verbs, perfect and modal brackets.
DEST gets the same files as from data_prep.libreoffice_help.
"""

from __future__ import annotations

import argparse
import random
from typing import NamedTuple

from data_prep import PreparationError, corpus
from data_prep.cleaning import Pair, Rules
from data_prep.held_out import Splits

LANGUAGES = ("de", "en")
MOST_PAIRS = 100_000


class Noun(NamedTuple):
    german: str
    gender: str
    plural: str
    english: str
    english_plural: str


class Verb(NamedTuple):
    """A transitive verb. German: separable particle (or ""), 3rd person, infinitive, participle without
    the particle. English: base form, 3rd person, past participle, and what follows them (or "")."""

    particle: str
    third: str
    infinitive: str
    participle: str
    english: str
    english_third: str
    english_participle: str
    english_rest: str


class Phrase(NamedTuple):
    german: str
    english: str
    plural: bool


PEOPLE = [
    Noun("Lehrer", "m", "Lehrer", "teacher", "teachers"),
    Noun("Bruder", "m", "Brüder", "brother", "brothers"),
    Noun("Arzt", "m", "Ärzte", "doctor", "doctors"),
    Noun("Mann", "m", "Männer", "man", "men"),
    Noun("Frau", "f", "Frauen", "woman", "women"),
    Noun("Schwester", "f", "Schwestern", "sister", "sisters"),
    Noun("Sängerin", "f", "Sängerinnen", "singer", "singers"),
    Noun("Kind", "n", "Kinder", "child", "children"),
    Noun("Mädchen", "n", "Mädchen", "girl", "girls"),
]
THINGS = [
    Noun("Brief", "m", "Briefe", "letter", "letters"),
    Noun("Koffer", "m", "Koffer", "suitcase", "suitcases"),
    Noun("Schlüssel", "m", "Schlüssel", "key", "keys"),
    Noun("Tisch", "m", "Tische", "table", "tables"),
    Noun("Lampe", "f", "Lampen", "lamp", "lamps"),
    Noun("Zeitung", "f", "Zeitungen", "newspaper", "newspapers"),
    Noun("Tasche", "f", "Taschen", "bag", "bags"),
    Noun("Bild", "n", "Bilder", "picture", "pictures"),
    Noun("Buch", "n", "Bücher", "book", "books"),
    Noun("Paket", "n", "Pakete", "parcel", "parcels"),
]
VERBS = [
    Verb("", "kauft", "kaufen", "gekauft", "buy", "buys", "bought", ""),
    Verb("", "verkauft", "verkaufen", "verkauft", "sell", "sells", "sold", ""),
    Verb("", "sucht", "suchen", "gesucht", "look", "looks", "looked", " for"),
    Verb("", "findet", "finden", "gefunden", "find", "finds", "found", ""),
    Verb("", "trägt", "tragen", "getragen", "carry", "carries", "carried", ""),
    Verb("auf", "macht", "machen", "gemacht", "open", "opens", "opened", ""),
    Verb("ab", "holt", "holen", "geholt", "pick", "picks", "picked", " up"),
    Verb("mit", "bringt", "bringen", "gebracht", "bring", "brings", "brought", " along"),
    Verb("weg", "wirft", "werfen", "geworfen", "throw", "throws", "thrown", " away"),
    Verb("an", "sieht", "sehen", "gesehen", "look", "looks", "looked", " at"),
]
ADJECTIVES = {"alt": "old", "neu": "new", "klein": "small", "schön": "beautiful", "groß": "big"}
NUMBERS = {"zwei": "two", "drei": "three", "vier": "four", "fünf": "five", "zwölf": "twelve"}
TIMES = {"heute": "today", "jeden Tag": "every day", "am Abend": "in the evening", "wieder": "again"}
CONJUNCTIONS = {"weil": "because", "wenn": "when", "obwohl": "although"}
OPINIONS = {"weiß": "knows", "glaubt": "believes", "sagt": "says"}
# By gender: article and adjective ending, nominative and accusative.
DEFINITE = {
    "nominative": {"m": ("der", "e"), "f": ("die", "e"), "n": ("das", "e")},
    "accusative": {"m": ("den", "en"), "f": ("die", "e"), "n": ("das", "e")},
}
INDEFINITE = {
    "nominative": {"m": ("ein", "er"), "f": ("eine", "e"), "n": ("ein", "es")},
    "accusative": {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es")},
}


def noun_phrase(rng: random.Random, nouns: list[Noun], case: str) -> Phrase:
    """Return a definite, indefinite or counted noun, with or without an adjective: "drei alte Bücher"."""
    noun = rng.choice(nouns)
    kind = rng.choice(("definite", "definite", "indefinite", "definite plural", "number"))
    plural = kind in ("definite plural", "number")
    if kind == "definite":
        (article, ending), english_article = DEFINITE[case][noun.gender], "the"
    elif kind == "indefinite":
        (article, ending), english_article = INDEFINITE[case][noun.gender], "a"
    elif kind == "definite plural":
        (article, ending), english_article = ("die", "en"), "the"
    else:
        article, english_article = rng.choice(list(NUMBERS.items()))
        ending = "e"
    german, english = [article], [english_article]
    if rng.random() < 0.4:
        adjective, english_adjective = rng.choice(list(ADJECTIVES.items()))
        german.append(adjective + ending)
        english.append(english_adjective)
        if english == ["a", "old"]:
            english[0] = "an"
    german.append(noun.plural if plural else noun.german)
    english.append(noun.english_plural if plural else noun.english)
    return Phrase(" ".join(german), " ".join(english), plural)


class Clause(NamedTuple):
    """German in the parts whose order depends on the kind of clause, and English in one piece.

    `bracket` is what ends a main clause (particle, participle or infinitive, or ""); `final` is the whole
    verb as it ends a subordinate clause.
    """

    subject: str
    finite: str
    objekt: str
    bracket: str
    final: str
    english: str

    def main(self, time: str = "") -> str:
        """Return a main clause: verb second, after the subject or, where `time` is given, before it."""
        opening = [time, self.finite, self.subject] if time else [self.subject, self.finite]
        return " ".join(filter(None, [*opening, self.objekt, self.bracket]))

    def subordinate(self) -> str:
        return f"{self.subject} {self.objekt} {self.final}"


def clause(rng: random.Random) -> Clause:
    """Return a clause in which someone does, has done or must do something to some thing."""
    verb = rng.choice(VERBS)
    subject, objekt = noun_phrase(rng, PEOPLE, "nominative"), noun_phrase(rng, THINGS, "accusative")
    tense = rng.choice(("present", "present", "perfect", "modal"))
    if tense == "present":
        finite, bracket = verb.infinitive if subject.plural else verb.third, verb.particle
        final = bracket + finite
        english = verb.english if subject.plural else verb.english_third
    elif tense == "perfect":
        finite, bracket = "haben" if subject.plural else "hat", verb.particle + verb.participle
        final = f"{bracket} {finite}"
        english = f"{'have' if subject.plural else 'has'} {verb.english_participle}"
    else:
        finite, bracket = "müssen" if subject.plural else "muss", verb.particle + verb.infinitive
        final = f"{bracket} {finite}"
        english = f"must {verb.english}"
    english = f"{subject.english} {english}{verb.english_rest} {objekt.english}"
    return Clause(subject.german, finite, objekt.german, bracket, final, english)


def sentence(rng: random.Random) -> tuple[str, str]:
    """Return a German sentence and its English translation."""
    kind = rng.choice(("plain", "time first", "reason", "opinion"))
    first = clause(rng)
    if kind == "plain":
        german, english = first.main(), first.english
    elif kind == "time first":
        time, english_time = rng.choice(list(TIMES.items()))
        german, english = first.main(time), f"{first.english} {english_time}"
    elif kind == "reason":
        conjunction, english_conjunction = rng.choice(list(CONJUNCTIONS.items()))
        second = clause(rng)
        german = f"{first.main()}, {conjunction} {second.subordinate()}"
        english = f"{first.english} {english_conjunction} {second.english}"
    else:
        noun = rng.choice(PEOPLE)
        opinion, english_opinion = rng.choice(list(OPINIONS.items()))
        german = (
            f"{DEFINITE['nominative'][noun.gender][0]} {noun.german} {opinion}, dass {first.subordinate()}"
        )
        english = f"the {noun.english} {english_opinion} that {first.english}"
    return german[0].upper() + german[1:] + ".", english[0].upper() + english[1:] + "."


def pairs(count: int, seed: int) -> list[Pair]:
    """Return `count` distinct pairs, the same for the same seed."""
    rng = random.Random(seed)
    distinct: dict[tuple[str, str], None] = {}
    while len(distinct) < count:
        distinct[sentence(rng)] = None
    return [Pair(german, english, number) for number, (german, english) in enumerate(distinct)]


def held_out(pairs: list[Pair], valid: int, test: int, seed: int) -> Splits:
    """Return the pairs in three sets, of which "valid" and "test" are drawn by `seed`."""
    drawn = list(pairs)
    random.Random(seed).shuffle(drawn)
    drawn.reverse()
    training = set(drawn[test + valid :])
    return {
        "train": [pair for pair in pairs if pair in training],
        "valid": drawn[test : test + valid],
        "test": drawn[:test],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.generated", description=__doc__.split("\n")[0])
    corpus.add_arguments(parser, vocabulary=300)
    corpus.add_held_out(parser, (100, 100))
    parser.add_argument(
        "--pairs",
        type=int,
        default=2000,
        metavar="N",
        help=f"distinct pairs to make, held-out ones included, up to {MOST_PAIRS} (default: %(default)s)",
    )
    arguments = parser.parse_args()

    def source(_: Rules) -> tuple[Splits, corpus.Statistics]:
        made = pairs(arguments.pairs, arguments.seed)
        return held_out(made, *arguments.held_out, arguments.seed), {"corpus": "generated"}

    if not 1 <= arguments.pairs <= MOST_PAIRS:
        raise PreparationError(f"--pairs {arguments.pairs}: must be from 1 to {MOST_PAIRS}.")
    corpus.prepare(arguments, LANGUAGES, source)


if __name__ == "__main__":
    corpus.run(main)
