"""The help's corpus, from two small packages."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep import debian, generated
from data_prep.cleaning import Pair, Rules, words
from data_prep.corpus import STATISTICS
from data_prep.libreoffice_help import clean, package_of, pages_of, sentence_pairs, sentences
from data_prep.segmentation import BINARIZED, MODEL, VOCABULARY, text_files
from tests.commands import ROOT
from tests.data_prep.commands import assert_refused, command, contents, lines, run

SMALL = ("--vocab-size", "150", "--held-out", "3", "5", "--workers", "1")
GERMAN = ("de", "en")
TEXTS = text_files(GERMAN)
PARTS = {*TEXTS, MODEL, VOCABULARY, BINARIZED, STATISTICS}
PAGE_COUNT, PARAGRAPHS = 12, 5
LATIN_LETTERS = "abcdefghijklmnoprstuvwzäöüßABDEFGHIJKLMNOPRSTUVWZÄÖÜ"
CYRILLIC_LETTERS = "абцдефгхийклмнопрстувшзэёюяАБДЕФГХИЙКЛМНОПРСТУВШЗЭЁЮ"

Packages = dict[str, Path]
Spelling = Callable[[str], str]


def page(paragraphs: dict[str, str], release: str) -> str:
    texts = "\n".join(f'<p id="{name}" class="paragraph">{text}</p>' for name, text in paragraphs.items())
    return (
        f'<html><body><a class="logo" href="x"><p dir="auto">LibreOffice {release} Help</p></a>'
        f'<div id="DisplayArea">{texts}</div><div id="SearchFrame"></div></body></html>'
    )


def cyrillic(text: str) -> str:
    """Return Latin text in Cyrillic letters, if not in Russian."""
    return text.translate(str.maketrans(LATIN_LETTERS, CYRILLIC_LETTERS))


def write_packages(
    folder: Path, release: str = "7.4", prefix: str = "", source: str = "de", spell: Spelling = str
) -> Packages:
    """Write both packages, unpacked. The first page has but a heading; each paragraph has two sentences."""
    pairs = iter(generated.pairs(2 * PAGE_COUNT * PARAGRAPHS, seed=1))
    roots = {language: folder / package_of(language) for language in (source, "en")}
    for number in range(PAGE_COUNT + 1):
        paragraphs: dict[str, dict[str, str]] = {
            source: {"hd_1": spell(f"Über die Seite {'i' * number}")},
            "en": {"hd_1": f"About the page {'i' * number}"},
        }
        for name in range(PARAGRAPHS if number else 0):
            first, second = next(pairs), next(pairs)
            paragraphs[source][f"{prefix}par_{name}"] = spell(f"{first.source} {second.source}")
            paragraphs["en"][f"par_{name}"] = f"{first.target} <b>{second.target}</b>"
        for language, texts in paragraphs.items():
            file = roots[language] / pages_of(language) / "swriter" / f"{number}.html"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(page(texts, release), encoding="utf-8")
    return roots


def options(packages: Packages) -> tuple[object, ...]:
    return ("--source-package", packages["de"], "--target-package", packages["en"], *SMALL)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Packages:
    return write_packages(tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="module")
def packages(unpacked, tmp_path_factory) -> Packages:
    """The same, as real Debian packages."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    folder = tmp_path_factory.mktemp("debian")
    files = {}
    for language in GERMAN:
        name = package_of(language)
        tree = folder / name
        shutil.copytree(unpacked[language], tree)
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: 0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
            "Description: a small help\n"
        )
        files[language] = folder / f"{name}.deb"
        build = ["dpkg-deb", "--build", "--root-owner-group", tree, files[language]]
        subprocess.run(build, check=True, capture_output=True)
    return files


@pytest.fixture(scope="module")
def prepared(packages, tmp_path_factory) -> tuple[Path, str]:
    """The corpus made from the packages, and what the command printed."""
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    result = run("libreoffice_help", folder, *options(packages))
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_folder_is_whole(prepared):
    folder, _ = prepared
    assert {file.name for file in folder.iterdir()} == PARTS
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    for name, least in (("valid", 3), ("test", 5), ("train", 50)):
        assert len(lines(folder, f"{name}.de")) == len(lines(folder, f"{name}.en")) >= least
    assert (folder / BINARIZED / "dict.de.txt").read_bytes() == (
        folder / BINARIZED / "dict.en.txt"
    ).read_bytes()


def test_each_sentence_stands_beside_its_translation(prepared):
    expected = {pair.source: pair.target for pair in generated.pairs(2 * PAGE_COUNT * PARAGRAPHS, seed=1)}
    expected |= {
        f"Über die Seite {'i' * n}".strip(): f"About the page {'i' * n}".strip()
        for n in range(PAGE_COUNT + 1)
    }
    for name in ("train", "valid", "test"):
        for german, english in zip(lines(prepared[0], f"{name}.de"), lines(prepared[0], f"{name}.en")):
            assert expected[german] == english


def test_what_is_held_out_is_not_in_training(prepared):
    for language in ("de", "en"):
        texts = [
            {words(line) for line in lines(prepared[0], f"{name}.{language}")}
            for name in ("train", "valid", "test")
        ]
        assert sum(map(len, texts)) == len(set().union(*texts))


def test_the_binarized_text_is_the_raw_text(prepared):
    from fairseq.data import Dictionary, indexed_dataset

    folder, _ = prepared
    for language in ("de", "en"):
        pieces = Dictionary.load(str(folder / BINARIZED / f"dict.{language}.txt"))
        prefix = str(folder / BINARIZED / f"train.de-en.{language}")
        dataset = indexed_dataset.make_dataset(prefix, impl="mmap")
        texts = [pieces.string(dataset[i], bpe_symbol="sentencepiece") for i in range(len(dataset))]
        assert texts == lines(folder, f"train.{language}")


def test_what_is_printed_counts_every_pair_and_word(prepared):
    folder, output = prepared
    table = [line.split() for line in output.splitlines()]
    statistics = json.loads((folder / STATISTICS).read_text())
    for before, after in zip(statistics["rules"], statistics["rules"][1:]):
        if not after["rule"].startswith("to train: not from"):
            assert after["kept"] + after["dropped"] == before["kept"]
    for row in statistics["rules"]:
        assert [*row["rule"].split(), str(row["kept"]), str(row["dropped"])] in table
    for name in ("train", "valid", "test"):
        counts = [len(lines(folder, f"{name}.de"))]
        for language in ("de", "en"):
            found = [word for line in lines(folder, f"{name}.{language}") for word in words(line)]
            counts += [len(found), len(set(found))]
        assert [name, *map(str, counts)] in table
    for name in ("valid", "test"):
        known = statistics["share of runs of words that stand in training"][name]["english"]
        assert [f"{name},", "English", *(f"{share:.1%}" for share in known)] in table
    assert "corpus: help of LibreOffice 7.4" in output
    assert set(statistics["pieces"]) == set(TEXTS)


def test_unpacked_packages_make_the_same_corpus(prepared, unpacked, tmp_path):
    folder = tmp_path / "corpus"
    assert run("libreoffice_help", folder, *options(unpacked)).returncode == 0
    expected = contents(prepared[0])
    made = contents(folder)
    assert made.pop(STATISTICS) != expected.pop(STATISTICS)  # they name the packages
    assert made == expected


def test_another_language_is_prepared_by_its_code(tmp_path):
    packages = write_packages(tmp_path, source="ru", spell=cyrillic)
    folder = tmp_path / "corpus"
    arguments = ("--source-package", packages["ru"], "--target-package", packages["en"], *SMALL)
    result = run("libreoffice_help", folder, "--source-language", "ru", *arguments)
    assert result.returncode == 0, result.stderr
    expected = {
        cyrillic(pair.source): pair.target for pair in generated.pairs(2 * PAGE_COUNT * PARAGRAPHS, seed=1)
    }
    for name in ("valid", "test"):
        assert len(lines(folder, f"{name}.ru")) >= 3
        for russian, english in zip(lines(folder, f"{name}.ru"), lines(folder, f"{name}.en")):
            assert expected[russian] == english
    assert (folder / BINARIZED / "train.ru-en.ru.idx").exists()
    assert list(json.loads((folder / STATISTICS).read_text())["words"]["train"]) == ["russian", "english"]
    german = run("libreoffice_help", folder, *SMALL)
    assert_refused(german, folder, "was prepared with source_language ru, not de")


def test_a_corpus_made_before_there_were_other_languages_is_a_german_one(prepared, packages, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(prepared[0], folder)
    statistics = json.loads((folder / STATISTICS).read_text())
    del statistics["settings"]["source_language"]
    (folder / STATISTICS).write_text(json.dumps(statistics))
    assert "nothing to do" in run("libreoffice_help", folder, *options(packages)).stdout
    french = run("libreoffice_help", folder, *options(packages), "--source-language", "fr")
    assert_refused(french, folder, "was prepared with source_language de, not fr")


@pytest.mark.parametrize("compression", ["xz", "gzip", "none", "zstd"])
def test_a_package_is_unpacked_without_programs_of_debian(
    compression, packages, unpacked, tmp_path, monkeypatch
):
    if compression == "zstd" and sys.version_info < (3, 14):
        pytest.importorskip("backports.zstd")
    tree, package, root = tmp_path / "tree", tmp_path / "help.deb", tmp_path / "root"
    subprocess.run(["dpkg-deb", "--raw-extract", packages["de"], tree], check=True)
    (tree / "usr" / "other").write_text("no page")
    build = ["dpkg-deb", f"-Z{compression}", "--build", "--root-owner-group", tree, package]
    subprocess.run(build, check=True, capture_output=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    debian.unpack(package, pages_of("de"), root, package_of("de"))
    assert contents(root) == contents(unpacked["de"])


def test_run_again_it_does_only_what_is_missing(prepared, packages, tmp_path):
    """The packages are needed no more, a part that was lost is made again, and all stays the same."""
    before = contents(prepared[0])
    folder = tmp_path / "corpus"
    shutil.copytree(prepared[0], folder)
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    moved = packages["de"].rename(packages["de"].with_suffix(".moved"))
    try:
        assert "nothing to do" in run("libreoffice_help", folder, *options(packages)).stdout
        assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == times
        shutil.rmtree(folder / BINARIZED)
        assert run("libreoffice_help", folder, *options(packages)).returncode == 0
    finally:
        moved.rename(packages["de"])
    assert contents(folder) == before
    assert (folder / MODEL).stat().st_mtime_ns == times[folder / MODEL]


def test_killed_at_any_point_it_goes_on_to_the_same_corpus(prepared, packages, tmp_path):
    folder = tmp_path / "corpus"
    partial = tmp_path / ".corpus.partial"
    prepare = command("libreoffice_help", folder, *options(packages))
    for milestone in (TEXTS[0], STATISTICS, MODEL):
        process = subprocess.Popen(prepare, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (partial / milestone).exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not folder.exists()
    assert run("libreoffice_help", folder, *options(packages)).returncode == 0
    assert contents(folder) == contents(prepared[0])
    assert list(tmp_path.iterdir()) == [folder]


def test_interrupted_it_says_how_to_go_on(packages, tmp_path):
    process = subprocess.Popen(
        command("libreoffice_help", tmp_path / "corpus", *options(packages)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and what they start, ignore Ctrl-C unless told otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / ".corpus.partial" / MODEL).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode != 0
    assert error.splitlines()[-1] == "interrupted: run the same command again to go on."
    assert "Traceback" not in error


@pytest.fixture
def bad_package(unpacked, tmp_path) -> Iterator[Packages]:
    """Packages of which the German one is to be replaced by something bad."""
    yield {**unpacked, "de": tmp_path / "package"}
    assert not (tmp_path / "corpus").exists()


def refuse(packages: Packages, tmp_path: Path, *telling: object) -> None:
    assert_refused(run("libreoffice_help", tmp_path / "corpus", *options(packages)), *telling)


def test_a_missing_package_is_refused(bad_package, tmp_path):
    refuse(bad_package, tmp_path, bad_package["de"], "cannot be read", "libreoffice-help-de")


def test_packages_of_an_attempt_that_failed_are_not_taken(tmp_path, monkeypatch):
    """The machine's own lists name older versions, of which one is gone from the server."""
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        "case $* in\n"
        "*update) touch updated ;;\n"
        "*) if [ -e updated ]; then touch a_2.deb b_2.deb; else touch a_1.deb; exit 1; fi ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    folder = tmp_path / "packages"
    folder.mkdir()
    assert [file.name for file in debian.download(["a", "b"], folder)] == ["a_2.deb", "b_2.deb"]


def test_a_file_that_is_no_package_is_refused(bad_package, tmp_path):
    bad_package["de"].write_bytes(b"no package")
    refuse(
        bad_package, tmp_path, bad_package["de"], "no Debian package", "apt-get download libreoffice-help-de"
    )


def test_a_truncated_package_is_refused(bad_package, packages, tmp_path):
    bad_package["de"].write_bytes(packages["de"].read_bytes()[:-100])
    refuse(bad_package, tmp_path, bad_package["de"], "truncated")


def test_a_package_of_another_language_is_refused(bad_package, packages, tmp_path):
    shutil.copy(packages["en"], bad_package["de"])
    refuse(bad_package, tmp_path, bad_package["de"], f"holds no {pages_of('de')}", "libreoffice-help-de")


def test_a_package_without_pages_is_refused(bad_package, tmp_path):
    (bad_package["de"] / pages_of("de")).mkdir(parents=True)
    refuse(bad_package, tmp_path, bad_package["de"], "holds no page")


def test_packages_of_two_releases_are_refused(bad_package, tmp_path):
    write_packages(tmp_path / "other", release="25.2")["de"].rename(bad_package["de"])
    refuse(bad_package, tmp_path, "LibreOffice 25.2", "7.4", "both packages of one release")


def test_pages_whose_ids_do_not_match_are_refused(bad_package, tmp_path):
    write_packages(tmp_path / "other", prefix="other_")["de"].rename(bad_package["de"])
    refuse(bad_package, tmp_path, f"only {PAGE_COUNT + 1} of {PAGE_COUNT * (PARAGRAPHS + 1) + 1} paragraphs")


def test_one_package_without_the_other_is_refused(packages, tmp_path):
    result = run("libreoffice_help", tmp_path / "corpus", "--source-package", packages["de"])
    assert_refused(result, "--source-package and --target-package", "give both")


def test_a_part_of_the_training_set_leaves_the_held_out_sets_alone(prepared, packages, tmp_path):
    folder = tmp_path / "corpus"
    result = run("libreoffice_help", folder, *options(packages), "--training-pairs", "20")
    assert result.returncode == 0, result.stderr
    for name in ("valid.de", "valid.en", "test.de", "test.en"):
        assert lines(folder, name) == lines(prepared[0], name)
    whole, part = (list(zip(lines(f, "train.de"), lines(f, "train.en"))) for f in (prepared[0], folder))
    assert len(part) == 20 < len(whole)
    assert part == [pair for pair in whole if pair in part]


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["--vocab-size", "10"], "--vocab-size 10: must be at least 100"),
        (["--held-out", "0", "5"], "--held-out 0 5: must be at least 1"),
        (["--held-out", "100", "100"], "--held-out 100 100: there are not so many sentences"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--training-pairs", "0"], "--training-pairs 0: must be at least 1"),
        (["--training-pairs", "100000"], "--training-pairs 100000: only "),
    ],
)
def test_values_out_of_range_are_refused(arguments, telling, unpacked, tmp_path):
    result = run("libreoffice_help", tmp_path / "corpus", *options(unpacked), *arguments)
    assert_refused(result, telling)
    assert not (tmp_path / "corpus").exists()


def test_a_folder_that_cannot_be_written_is_refused(unpacked, tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "corpus"
    assert_refused(run("libreoffice_help", folder, *options(unpacked)), folder, "cannot be written")


def test_a_folder_with_something_else_is_left_alone(unpacked, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_refused(run("libreoffice_help", tmp_path, *options(unpacked)), tmp_path, "name a new folder")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_corpus_of_other_settings_is_left_alone(prepared, packages):
    before = contents(prepared[0])
    result = run("libreoffice_help", prepared[0], *options(packages), "--seed", "2")
    assert_refused(result, prepared[0], "seed 1, not 2")
    assert contents(prepared[0]) == before


@pytest.mark.skipif(Path("/", pages_of("de")).exists(), reason="the help is installed here")
def test_without_the_packages_the_generated_corpus_stands_in_and_says_so(tmp_path):
    folder = tmp_path / "corpus"
    result = run("libreoffice_help", folder, *SMALL, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    statistics = json.loads((folder / STATISTICS).read_text())
    note = "The generated corpus stands in for the help, which can't be had (there is no apt-get here)."
    assert statistics["corpus"] == "generated"
    assert statistics["note"] == note
    assert result.stdout.splitlines()[-1] == note
    assert len(lines(folder, "train.de")) > 9000


def test_without_the_packages_of_another_language_nothing_stands_in(tmp_path):
    folder = tmp_path / "corpus"
    result = run("libreoffice_help", folder, "--source-language", "om", *SMALL, PATH=str(tmp_path))
    assert_refused(result, "--source-language om", "there is no apt-get here", "--source-package")
    assert not folder.exists()


@pytest.mark.parametrize("language", ["en", "ja", "klingon"])
def test_a_language_without_help_is_refused_with_those_that_have_it(language, tmp_path):
    result = run("libreoffice_help", tmp_path / "corpus", "--source-language", language, *SMALL)
    assert_refused(result, f"--source-language {language}", "choose from ca, cs, da, de, el, es, ")


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Siehe z. B. Writer usw. Oder nicht.", ["Siehe z. B. Writer usw. Oder nicht."]),
        ("Am 1. Januar. Ende.", ["Am 1. Januar.", "Ende."]),
        ('He said "No." She did not.', ['He said "No."', "She did not."]),
        ("A line\nand another.", ["A line", "and another."]),
        ("\u201eJa\u201c \u2013 it\u2019s 0.5 cm .", ['"Ja" - it\'s 0.5 cm.']),
        ("Wählen Sie Ansicht \u2013 Zoom…, dann weiter… .", ["Wählen Sie Ansicht - Zoom, dann weiter."]),
        ("A1, A2, ..., A9", ["A1, A2, …, A9"]),
    ],
)
def test_sentences(paragraph, expected):
    assert list(sentences(paragraph, "de")) == expected


@pytest.mark.parametrize(
    ("language", "paragraph", "expected"),
    [
        (
            "fr",
            "Cliquez sur « OK ». Étape 2 : voir cf. Annexe.",
            ['Cliquez sur "OK".', "Étape 2: voir cf. Annexe."],
        ),
        (
            "es",
            "¿Desea guardar? ¡Sí! Vaya a Datos ▸ Filtros.",
            ["¿Desea guardar?", "¡Sí!", "Vaya a Datos - Filtros."],
        ),
        ("cs", "Zvolte např. Calc. Žádný text. Řez.", ["Zvolte např. Calc.", "Žádný text.", "Řez."]),
        ("ru", "См. Справку. Ещё текст. Щёлкните.", ["См. Справку.", "Ещё текст.", "Щёлкните."]),
        ("en", "See usw. This ends.", ["See usw.", "This ends."]),
    ],
)
def test_sentences_end_by_the_rules_of_their_language(language, paragraph, expected):
    assert list(sentences(paragraph, language)) == expected


def test_sentences_are_paired_where_both_sides_have_equally_many():
    assert list(sentence_pairs(("Eins. Zwei.", "One. Two."), GERMAN)) == [
        ("Eins.", "One."),
        ("Zwei.", "Two."),
    ]
    assert list(sentence_pairs(("Eins. Zwei.", "One and two."), GERMAN)) == [("Eins. Zwei.", "One and two.")]


@pytest.mark.parametrize(
    ("german", "english", "rule"),
    [
        ("Klicken Sie auf OK.", "Click OK.", None),
        ("Über die Zelle A1 (10 %)", "About the cell A1 (10%)", None),
        ("...", "Dots", "text on both sides"),
        ("Eins ist da. Zwei auch.", "One and two are there.", "as many sentences"),
        ("Ziehen Sie das Fenster.", "Drag the window, or", "ends alike"),
        ("=SUMME(A1) ergibt die Summe.", "=SUM(A1) returns the sum.", "no code or symbols"),
        ("Das Wort слово ist russisch.", "The word слово is Russian.", "no code or symbols"),
        ("am 1.2.2003, 4,5", "on 1.2.2003, 4.5", "mostly letters"),
        ("Wort " * 61, "word " * 61, "at most 60 words"),
        (
            "Die Leisten sind frei konfigurierbar wie in Writer und auch in Calc.",
            "Bars can be set.",
            "similar length",
        ),
        ("AutoText", "Autotext", "translated"),
    ],
)
def test_each_rule_drops_what_it_says(german, english, rule):
    rules = Rules()
    kept = clean([Pair(german, english, 0)], GERMAN, rules)
    assert [row["rule"] for row in rules.table if row["dropped"]] == ([rule] if rule else [])
    assert len(kept) == (rule is None)


@pytest.mark.parametrize(
    ("source", "english", "kept"),
    [
        ("Слово в Writer.", "A word in Writer.", True),
        ("Слово в Writer.", "The слово in Writer.", False),
        ("Λέξη στο Writer.", "A word in Writer.", False),
    ],
)
def test_letters_are_those_of_the_language_and_latin_ones(source, english, kept):
    assert bool(clean([Pair(source, english, 0)], ("ru", "en"), Rules())) == kept
