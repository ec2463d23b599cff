"""Text extraction and the training corpus of the embedded teacher. No test needs a network."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import typer

from durable_files import read_json
from examples.teacher_small import packing
from examples.teacher_small.__main__ import app
from examples.teacher_small.debian_docs import build_debian_docs, file_text, licence_summary, listed_packages
from examples.teacher_small.packing import is_held_out, write_corpus
from examples.teacher_small.prose import (
    DOCUMENT_SEPARATOR,
    ParagraphFilter,
    as_documents,
    clean_paragraphs,
    html_text,
    is_prose,
    manual_page_text,
    read_documents,
)
from examples.teacher_small.public_domain import (
    build_jane_austen,
    build_moby_dick,
    build_state_of_the_union,
)
from halo_jobs.recipe import load_recipe

RECIPES = Path(packing.__file__).parent

SENTENCE = "The editor keeps a copy of the file that it was given, and you can go back to it at any time."
OTHER = (
    "When there is no more space on the disk, the server will stop and say so in the first line of its log."
)
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def make_archive(folder: Path, package: str, files: dict[str, bytes]) -> Path:
    """A .deb of version 1.5 in `folder`."""
    tree = folder / f"tree-{package}"
    control = f"Package: {package}\nVersion: 1.5\nArchitecture: all\nMaintainer: N <n@example.org>\nDescription: d\n"
    for name, content in {"DEBIAN/control": control.encode(), **files}.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    archive = folder / f"{package}_1.5_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(archive)], check=True, capture_output=True
    )
    shutil.rmtree(tree)
    return archive


# ---- prose


def test_html_text_leaves_out_code_and_separates_blocks() -> None:
    page = (
        "<html><head><title>T</title></head><body><nav>menu</nav><p>One &amp; <b>t</b>wo\n\nthree</p><pre>code</pre>"
        "<li>four<br>five</li><div>six<br/>\n<BR>seven</div><!-- gone <p> --></body></html>"
    )
    assert list(clean_paragraphs(html_text(page))) == ["One & two three", "four five", "six", "seven"]


def test_manual_page_text_joins_fonts_and_undoes_escapes() -> None:
    page = (
        '.\\" comment\n.TH OPEN 2\n.SH DESCRIPTION\nThe\n.BR open (2)\ncall \\fIreally\\fP opens a\n.I "long name"\n'
        "and never\n.in 4\nfails\\(em\\-1.\n.PP\nNext \\(aqone\\(aq \\e.\n"
    )
    assert list(clean_paragraphs(manual_page_text(page))) == [
        "The open(2) call really opens a long name and never fails - -1.",
        "Next 'one' \\.",
    ]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        (SENTENCE, True),
        ("Too short to be a sentence of its own.", False),
        (
            "int main(void) { return (a[0] << 3) ^ (b[1] | 0x7f); } /* 17 */ for (;;) { x += 1; y -= 2; } end",
            False,
        ),
        (
            "Der Server wird auf der Platte keinen Platz mehr haben und dann sofort anhalten und eine Zeile schreiben.",
            False,
        ),
        (
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda omicron sigma upsilon omega again",
            False,
        ),
    ],
)
def test_is_prose(paragraph: str, expected: bool) -> None:
    assert is_prose(paragraph) is expected


def test_clean_paragraphs_are_single_lines_in_nfc_without_control_characters() -> None:
    assert list(clean_paragraphs("Cafe\u0301\x00 \x08is\n open\n \t\n\n two\x1f")) == ["Café is open", "two"]


def test_paragraph_filter_compares_letters_only() -> None:
    unseen = ParagraphFilter()
    assert list(unseen.unseen(["See *the* 3 files.", "See the 4 files", "See a file"])) == [
        "See *the* 3 files.",
        "See a file",
    ]
    assert list(unseen.unseen(["SEE A FILE", "new"])) == ["new"]


def test_long_files_become_several_documents() -> None:
    paragraphs = [f"{number:05d}" * 2000 for number in range(50)]
    documents = list(as_documents(paragraphs))
    assert "\n\n".join(documents).split("\n\n") == paragraphs
    assert [len(document) <= 200_000 for document in documents] == [True] * 3


# ---- packages


@needs_dpkg
def test_build_debian_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = tmp_path / "archives"
    archives.mkdir()
    page = f"<p>{SENTENCE}</p><p>{OTHER}</p>".encode()
    make_archive(
        archives,
        "some-doc",
        {
            "usr/share/doc/some-doc/copyright": b"Files: *\nLicense: GPL-2+\n\nFiles: a\nLicense: Expat\n",
            "usr/share/doc/some-doc/html/b.html": page,
            "usr/share/doc/some-doc/html/a.html": f"<p>{SENTENCE}</p>".encode(),
            "usr/share/doc/some-doc/html/de/c.html": b"<p>" + OTHER.upper().encode() + b"</p>",
            "usr/share/doc/some-doc/html/_sources/b.txt": b"see **here** " + OTHER.encode(),
            "usr/share/man/man1/broken.1.gz": b"not gzip",
        },
    )
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate' >&2\nexit 100\n")
    (commands / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    lines: list[str] = []

    results = build_debian_docs(tmp_path, ["absent-doc", "some-doc"], lines.append)

    assert read_documents(tmp_path / "some-doc.txt") == [SENTENCE, OTHER]
    assert [(r.package, r.version, r.licence, r.documents) for r in results] == [
        ("some-doc", "1.5", "GPL-2+, Expat", 2)
    ]
    manifest = read_json(tmp_path / "debian_docs.json")
    assert manifest["packages"][0]["characters"] == len(SENTENCE) + len(OTHER)
    assert list(manifest["skipped"]) == ["absent-doc"] and "Unable to locate" in lines[0]
    first = (tmp_path / "some-doc.txt").read_bytes()
    build_debian_docs(tmp_path, ["some-doc"], lines.append)
    assert (tmp_path / "some-doc.txt").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "archives",
        "commands",
        "debian_docs.json",
        "some-doc.txt",
    ]


def test_licence_summary(tmp_path: Path) -> None:
    docs = tmp_path / "usr/share/doc"
    docs.mkdir(parents=True)
    (docs / "x-doc").symlink_to("x-common")
    assert licence_summary(tmp_path, "x-doc") == "as package x-common"
    assert licence_summary(tmp_path, "y-doc") == ""
    (docs / "y-doc").mkdir()
    (docs / "y-doc/copyright").write_text(
        "You may use it under the GNU\n Free Documentation License.\n"
        "License: Redistribution and use in source and binary forms, with or without change\n"
    )
    assert licence_summary(tmp_path, "y-doc") == "GNU Free Documentation License"


def test_sword_modules_and_dictionaries(tmp_path: Path) -> None:
    blocks = [zlib.compress(f"<p>{text}</p>".encode()) for text in ("In the beginning", "Let there be light")]
    (tmp_path / "ot.bzz").write_bytes(b"".join(blocks))
    index = [(0, len(blocks[0]), 20), (len(blocks[0]), len(blocks[1]), 20), (0, 0, 0)]
    (tmp_path / "ot.bzs").write_bytes(b"".join(struct.pack("<III", *record) for record in index))
    assert list(clean_paragraphs(file_text(tmp_path / "ot.bzs") or "")) == [
        "In the beginning",
        "Let there be light",
    ]

    (tmp_path / "x.dict.dz").write_bytes(
        gzip.compress(b"cat\n   n: see {feline} [1913 Webster]\ndog\n   n: barks\n")
    )
    assert list(clean_paragraphs(file_text(tmp_path / "x.dict.dz") or "")) == [
        "cat n: see feline",
        "dog n: barks",
    ]
    (tmp_path / "image.png").write_bytes(b"x")
    assert file_text(tmp_path / "image.png") is None


def test_package_list_is_sorted_names() -> None:
    names = listed_packages()
    assert names == sorted(set(names))
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name) for name in names)


# ---- public domain


def make_datasets_tarball(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_data_sets_from_a_tarball(tmp_path: Path) -> None:
    tarball = make_datasets_tarball(
        tmp_path / "datasets.tgz",
        {
            "sotu/data/1801_b.txt": "Second\naddress.",
            "sotu/data/1790_a.txt": "First.\n\nMore.",
            "sotu/data/1790_a.json": "{}",
            "moby-dick/data/chapter_10.txt": "Ten",
            "moby-dick/data/chapter_9.txt": "Nine",
            "moby-dick/data/extracts.txt": "Whales",
        },
    )
    assert build_state_of_the_union(tmp_path / "sotu.txt", tarball) == 2
    assert (tmp_path / "sotu.txt").read_text() == f"First.\n\nMore.{DOCUMENT_SEPARATOR}Second address.\n"
    assert build_moby_dick(tmp_path / "moby.txt", tarball) == 2
    assert read_documents(tmp_path / "moby.txt") == ["Nine", "Ten"]
    with pytest.raises(ValueError, match="sotu"):
        build_state_of_the_union(tmp_path / "x.txt", make_datasets_tarball(tmp_path / "empty.tgz", {}))


def r_serialised(strings: list[str], version: int) -> bytes:
    content = b"X\n" + struct.pack(">iii", version, 0x40202, 0x20300)
    if version == 3:
        content += struct.pack(">i", 5) + b"UTF-8"
    content += struct.pack(">ii", 16, len(strings))
    for text in strings:
        content += struct.pack(">ii", 0x40009, len(text.encode())) + text.encode()
    return content


@needs_dpkg
@pytest.mark.parametrize("version", [2, 3])
def test_jane_austen_from_an_r_database(tmp_path: Path, version: int) -> None:
    long = ["It is a truth universally acknowledged"] * 40
    lines = ["A NOVEL", "", "CHAPTER I", "", *long, "", "Chapter 2", "", *long]
    novel = r_serialised(lines, version)
    other = b"X\n" + struct.pack(">iii", 2, 1, 1) + struct.pack(">ii", 19, 0)
    database = b"".join(struct.pack(">i", len(item)) + zlib.compress(item) for item in (novel, other))
    make_archive(
        tmp_path, "r-cran-janeaustenr", {"usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": database}
    )
    assert build_jane_austen(tmp_path / "austen.txt", tmp_path) == 2
    first, second = read_documents(tmp_path / "austen.txt")
    assert first.startswith("CHAPTER I\n\nIt is") and second.startswith("Chapter 2\n\nIt is")


# ---- packing


def random_documents(count: int, seed: int) -> list[str]:
    chooser = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [" ".join("".join(chooser.choices(letters, k=6)) for _ in range(60)) for _ in range(count)]


def corpus(tmp_path: Path, out: str, characters: int = 10**9) -> dict:
    for name, seed in (("first", 1), ("second", 2)):
        (tmp_path / f"{name}.txt").write_text(DOCUMENT_SEPARATOR.join(random_documents(100, seed)))
    (tmp_path / "third.txt").write_text(random_documents(100, 1)[7])  # a page of "first" once more
    return write_corpus(
        [tmp_path / f"{name}.txt" for name in ("third", "first", "second")],
        tmp_path / out,
        characters=characters,
        caps={"second": 5000},
        provenance={"first": {"licence": "GPL-2+"}},
        held_out_share=0.2,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_corpus_is_shuffled_with_held_out_documents_apart(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, "corpus")
    train = read_documents(tmp_path / "corpus" / "prose" / "prose-00.txt")
    held_out = read_documents(tmp_path / "corpus" / "held_out" / "prose.txt")
    everything = random_documents(100, 1) + random_documents(100, 2)
    assert set(random_documents(100, 1)) <= set(train + held_out) <= set(everything)
    assert len(set(train + held_out)) == len(train) + len(held_out)
    assert held_out and all(is_held_out(text, 0.2) for text in held_out)
    assert not any(is_held_out(text, 0.2) for text in train)
    assert train != sorted(train, key=everything.index)
    second = manifest["sources"]["second"]
    assert 4000 < second["train"]["characters"] + second["held_out"].get("characters", 0) <= 5000
    assert manifest["sources"]["first"]["licence"] == "GPL-2+" and "third" not in manifest["sources"]
    assert manifest["documents"] == len(train) and manifest["characters"] == sum(map(len, train))
    assert read_json(tmp_path / "corpus" / "prose" / "corpus.json") == manifest
    corpus(tmp_path, "again")
    assert content(tmp_path / "again") == content(tmp_path / "corpus")


def test_corpus_is_cut_at_whole_documents(tmp_path: Path) -> None:
    whole, cut = corpus(tmp_path, "whole"), corpus(tmp_path, "cut", characters=20_000)
    assert 19_000 < cut["characters"] <= 20_000 < whole["characters"]
    assert content(tmp_path / "cut" / "held_out") == content(tmp_path / "whole" / "held_out")


def test_a_large_corpus_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path, "whole")
    monkeypatch.setattr(packing, "PART_CHARACTERS", 20_000)
    corpus(tmp_path, "parts")
    (whole,) = (tmp_path / "whole" / "prose").glob("*.txt")
    parts = sorted((tmp_path / "parts" / "prose").glob("*.txt"))
    assert len(parts) > 1
    assert [text for part in parts for text in read_documents(part)] == read_documents(whole)


# ---- the command


def run_example(*arguments: object, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.teacher_small", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PATH": path or os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_refuses_before_it_downloads(tmp_path: Path) -> None:
    refused = run_example("state-of-the-union", tmp_path / "sotu", path=str(tmp_path))
    assert (refused.returncode, refused.stderr) == (
        1,
        f"error: {tmp_path / 'sotu'} must end in .txt, or recipes will not find it\n",
    )


def test_commands_of_the_page_parse() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = re.findall(r"^python -m examples\.teacher_small (.+)$", page, re.MULTILINE)
    commands = typer.main.get_group(app).commands
    assert {line.split()[0] for line in lines} == set(commands), "the page shows every command"
    for line in lines:
        name, *arguments = line.split()
        commands[name].make_context(name, arguments)


def test_command_makes_a_corpus_that_the_recipes_name(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "abc-doc.txt").write_text(DOCUMENT_SEPARATOR.join(random_documents(300, 3)))
    package = {"package": "abc-doc", "version": "1.5", "licence": "GPL-2+", "characters": 1, "documents": 1}
    (text / "debian_docs.json").write_text(json.dumps({"packages": [package], "skipped": {}}))
    made = run_example("corpus", text, tmp_path / "corpus")
    assert made.returncode == 0, made.stderr
    facts = read_json(tmp_path / "corpus" / "prose" / "corpus.json")
    assert facts["sources"]["abc-doc"]["licence"] == "GPL-2+"
    for recipe in ("teacher-small", "halo-small"):
        sources = load_recipe(RECIPES / f"{recipe}.yaml").corpus
        for source in (*sources.train, *sources.held_out):
            assert list((tmp_path / source).glob("*.txt")), source
