"""Training prose from Debian documentation packages: download, unpack, keep paragraphs of English."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from durable_files import write_json
from examples.teacher_small.prose import (
    ParagraphFilter,
    as_documents,
    clean_paragraphs,
    html_text,
    is_prose,
    manual_page_text,
    write_documents,
)

PACKAGE_LIST = Path(__file__).with_name("debian_docs.txt")
MANIFEST = "debian_docs.json"
LARGEST_FILE = 60_000_000  # bytes; larger files are data, not documentation

_LANGUAGES = """
    ar as bg ca cs da de el eo es et eu fa fi fr gl gu he hi hr hu id is it ja kn ko lt lv mk ml mr nb nl nn or
    pa pl pt ro ru sk sl sq sr sv ta te th tr uk vi zh
"""
_OTHER_LANGUAGE = re.compile(rf"({'|'.join(_LANGUAGES.split())})([_-][A-Za-z]{{2,4}})?(@\w+)?")
_SKIPPED_FILES = re.compile(rf"(copyright|changelog.*|NEWS.*|.*\.{_OTHER_LANGUAGE.pattern}\.html)(\.gz)?")
# Some packages ship page sources too: the same prose again, with markup.
_SKIPPED_FOLDERS = re.compile(rf"_sources|_static|markdown|translations|off|{_OTHER_LANGUAGE.pattern}")
_MARKUP_SUFFIXES = frozenset(("html", "htm", "xhtml", "page", "docbook", "xml"))
_TEXT_SUFFIXES = frozenset(("txt", "rst", "md", "adoc", "pod"))
_INFO_FILE = re.compile(r"\.info(-\d+)?$")
_LICENCE_PHRASES = (
    "GNU Free Documentation License",
    "GNU General Public License",
    "GNU Lesser General Public License",
    "GPL",
    "Apache License",
    "Creative Commons",
    "Mozilla Public License",
    "Python Software Foundation License",
    "public domain",
    "BSD",
    "MIT",
    "Artistic",
    "verbatim copies",
)


@dataclass(frozen=True)
class PackageText:
    """The text extracted from one package, and the licences that its copyright file names."""

    package: str
    version: str
    licence: str
    characters: int
    documents: int


def listed_packages() -> list[str]:
    return PACKAGE_LIST.read_text().split()


def download_package(package: str, folder: Path) -> Path:
    """Path of the package's .deb in `folder`; downloads it when it is missing. Raises RuntimeError on failure."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(f"{package}_*.deb"))):
        done = subprocess.run(
            ["apt-get", "download", "--quiet", package],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        found = sorted(folder.glob(f"{package}_*.deb"))
        if done.returncode != 0 or not found:
            reason = done.stderr.strip().splitlines()[-1:] or ["apt-get wrote no .deb file"]
            raise RuntimeError(f"package {package} could not be downloaded: {reason[0]}")
    return found[-1]


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="ignore")


def _read(path: Path) -> str:
    content = path.read_bytes()
    return _decode(gzip.decompress(content) if path.suffix in {".gz", ".dz"} else content)


def _sword_module_text(index_file: Path) -> str:
    """Text of a SWORD zText module: .bzs lists (offset, size, unpacked size) of the zlib blocks in .bzz."""
    blocks = index_file.with_suffix(".bzz").read_bytes()
    records = struct.iter_unpack("<III", index_file.read_bytes())
    return html_text(
        "\n".join(_decode(zlib.decompress(blocks[at : at + size])) for at, size, _ in records if size)
    )


def _dictionary_text(source: str) -> str:
    """Text of a dictd database. An unindented line after an indented one starts an entry; braces mark references."""
    source = re.sub(r"\[(?:1913 Webster|PJC|WordNet)[^\]]*\]|[{}]", "", source)
    return re.sub(r"^([ \t]+\S.*\n)(?=\S)", r"\1\n", source, flags=re.MULTILINE)


def file_text(path: Path) -> str | None:
    """Text of one unpacked file, paragraphs separated by blank lines; None if the file is not documentation."""
    name = path.name.removesuffix(".gz").lower()
    suffix = name.rpartition(".")[2] if "." in name else ""
    if suffix in _MARKUP_SUFFIXES:
        return html_text(_read(path))
    if re.fullmatch(r"man[1-9]\w*", path.parent.name):
        return manual_page_text(_read(path))
    if name.endswith(".dict.dz"):
        return _dictionary_text(_read(path))
    if suffix == "bzs":
        return _sword_module_text(path)
    if "fortunes" in path.parts and not suffix:
        return re.sub(r"^%$", "\n", _read(path), flags=re.MULTILINE)
    if suffix in _TEXT_SUFFIXES or _INFO_FILE.search(name) or (not suffix and "doc" in path.parts):
        return _read(path)
    return None


def documentation_files(root: Path) -> Iterator[Path]:
    """Regular files below `root` in a fixed order, without translations, changelogs and page sources."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not _SKIPPED_FOLDERS.fullmatch(name))
        if {"html", "Documentation"} <= set(subfolders):  # the kernel ships pages and their sources
            subfolders.remove("Documentation")
        for name in sorted(names):
            path = Path(folder) / name
            if (
                not _SKIPPED_FILES.fullmatch(name)
                and not path.is_symlink()
                and path.stat().st_size <= LARGEST_FILE
            ):
                yield path


def package_documents(root: Path) -> Iterator[str]:
    """The prose of an unpacked package: one document per file, repeated paragraphs dropped."""
    unseen = ParagraphFilter()
    for path in documentation_files(root):
        try:
            text = file_text(path)
        except (OSError, EOFError, zlib.error):  # not gzip despite its name
            continue
        if text is not None:
            yield from as_documents(unseen.unseen(filter(is_prose, clean_paragraphs(text))))


def licence_summary(root: Path, package: str) -> str:
    """Licences named in the copyright file, in order; "as package X" when it is a link to another package's."""
    folder = root / "usr/share/doc" / package
    if folder.is_symlink():
        return f"as package {folder.readlink().name}"
    if not (folder / "copyright").is_file():
        return ""
    text = _decode((folder / "copyright").read_bytes())
    # Machine-readable files give a short name after "License:"; in other files the licence text starts there.
    named = [
        name for name in re.findall(r"^License: *(\S.*)$", text, flags=re.MULTILINE) if name.count(" ") < 8
    ]
    if not named:
        text = " ".join(text.split()).lower()
        named = [phrase for phrase in _LICENCE_PHRASES if re.search(rf"\b{phrase.lower()}\b", text)]
    return ", ".join(dict.fromkeys(name.strip() for name in named))


def extract_package(archive: Path, package: str, out_file: Path) -> PackageText:
    """Unpack a .deb into a temporary folder and write its prose to `out_file`."""
    version = subprocess.run(
        ["dpkg-deb", "--field", str(archive), "Version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory(dir=out_file.parent) as unpacked:
        subprocess.run(["dpkg", "-x", str(archive), unpacked], check=True)
        documents = list(package_documents(Path(unpacked)))
        licence = licence_summary(Path(unpacked), package)
    write_documents(out_file, documents)
    return PackageText(package, version, licence, sum(map(len, documents)), len(documents))


def build_debian_docs(
    out_folder: Path, packages: Sequence[str], progress: Callable[[str], None] = print
) -> list[PackageText]:
    """Write <package>.txt for each package and debian_docs.json for all. Packages that fail to download are skipped.

    Archives are kept in `out_folder`/archives; a second run does not download them again.
    """
    results: list[PackageText] = []
    skipped: dict[str, str] = {}
    for package in packages:
        try:
            archive = download_package(package, out_folder / "archives")
        except RuntimeError as error:
            skipped[package] = str(error)
            progress(f"skipped: {error}")
            continue
        result = extract_package(archive, package, out_folder / f"{package}.txt")
        results.append(result)
        progress(
            f"{package} {result.version}: {result.characters:,} characters, {result.documents:,} documents"
        )
    write_json(
        out_folder / MANIFEST,
        {"packages": [asdict(result) for result in results], "skipped": skipped},
    )
    return results
