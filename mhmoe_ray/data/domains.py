"""Names of domains, <source>/<subfolder>, and codes of languages (ISO 639-1 where there is one)."""

import re
from functools import lru_cache


def source_of(domain: str) -> str:
    """Return the source in the name of a domain, such as `redpajama` in `redpajama/book`."""
    return domain.partition("/")[0]


def subfolder_of(domain: str) -> str:
    """Return the subfolder in the name of a domain, such as `book` in `redpajama/book`."""
    return domain.partition("/")[2]


# Each entry is an ISO 639-1 code, an ISO 639-3 code and an English name.
_LANGUAGE_TABLE = """
aa aar afar|ab abk abkhazian|ae ave avestan|af afr afrikaans|ak aka akan|am amh amharic|an arg aragonese|ar ara arabic
as asm assamese|av ava avaric|ay aym aymara|az aze azerbaijani|ba bak bashkir|be bel belarusian|bg bul bulgarian
bi bis bislama|bm bam bambara|bn ben bengali|bo bod tibetan|br bre breton|bs bos bosnian|ca cat catalan|ce che chechen
ch cha chamorro|co cos corsican|cr cre cree|cs ces czech|cu chu slavonic|cv chv chuvash|cy cym welsh|da dan danish
de deu german|dv div divehi|dz dzo dzongkha|ee ewe ewe|el ell greek|en eng english|eo epo esperanto|es spa spanish
et est estonian|eu eus basque|fa fas persian|ff ful fulah|fi fin finnish|fj fij fijian|fo fao faroese|fr fra french
fy fry frisian|ga gle irish|gd gla gaelic|gl glg galician|gn grn guarani|gu guj gujarati|gv glv manx|ha hau hausa
he heb hebrew|hi hin hindi|ho hmo motu|hr hrv croatian|ht hat haitian|hu hun hungarian|hy hye armenian|hz her herero
ia ina interlingua|id ind indonesian|ie ile interlingue|ig ibo igbo|ii iii nuosu|ik ipk inupiaq|io ido ido
is isl icelandic|it ita italian|iu iku inuktitut|ja jpn japanese|jv jav javanese|ka kat georgian|kg kon kongo
ki kik kikuyu|kj kua kuanyama|kk kaz kazakh|kl kal greenlandic|km khm khmer|kn kan kannada|ko kor korean|kr kau kanuri
ks kas kashmiri|ku kur kurdish|kv kom komi|kw cor cornish|ky kir kyrgyz|la lat latin|lb ltz luxembourgish|lg lug ganda
li lim limburgish|ln lin lingala|lo lao lao|lt lit lithuanian|lu lub luba|lv lav latvian|mg mlg malagasy
mh mah marshallese|mi mri maori|mk mkd macedonian|ml mal malayalam|mn mon mongolian|mr mar marathi|ms msa malay
mt mlt maltese|my mya burmese|na nau nauru|nd nde ndebele|ne nep nepali|ng ndo ndonga|nl nld dutch|no nor norwegian
nr nbl|nv nav navajo|ny nya chichewa|oc oci occitan|oj oji ojibwe|om orm oromo|or ori odia|os oss ossetian
pa pan punjabi|pi pli pali|pl pol polish|ps pus pashto|pt por portuguese|qu que quechua|rm roh romansh|rn run rundi
ro ron romanian|ru rus russian|rw kin kinyarwanda|sa san sanskrit|sc srd sardinian|sd snd sindhi|se sme sami
sg sag sango|si sin sinhala|sk slk slovak|sl slv slovenian|sm smo samoan|sn sna shona|so som somali|sq sqi albanian
sr srp serbian|ss ssw swati|st sot sotho|su sun sundanese|sv swe swedish|sw swa swahili|ta tam tamil|te tel telugu
tg tgk tajik|th tha thai|ti tir tigrinya|tk tuk turkmen|tl tgl tagalog|tn tsn tswana|to ton tongan|tr tur turkish
ts tso tsonga|tt tat tatar|tw twi twi|ty tah tahitian|ug uig uyghur|uk ukr ukrainian|ur urd urdu|uz uzb uzbek
ve ven venda|vi vie vietnamese|vo vol volapük|wa wln walloon|wo wol wolof|xh xho xhosa|yi yid yiddish|yo yor yoruba
za zha zhuang|zh zho chinese|zu zul zulu
"""
LANGUAGE_CODES = {
    name: row.split()[0] for line in _LANGUAGE_TABLE.split("\n") for row in line.split("|") for name in row.split()
}
LANGUAGE_CODES |= {"nb": "no", "nn": "no", "nob": "no", "nno": "no", "cmn": "zh", "arb": "ar", "swh": "sw", "zsm": "ms"}
LANGUAGE_CODES |= {"farsi": "fa", "flemish": "nl", "mandarin": "zh", "oriya": "or", "valencian": "ca"}
"""Language code by ISO 639 code or English name; written forms (nb) and standard varieties map to their language."""

NO_LANGUAGE = ""
"""Language of a document without a language in its record or folder."""
OTHER_LANGUAGE = "other"
"""Language of a document whose record names it in an unknown form."""

# Corpora write a tag with hyphens, as BCP 47 does (`pt-BR`), or with underscores, as locales do (`pt_BR`). Only the
# first part, the language, is used.
_LANGUAGE_TAG = re.compile(r"([a-z]{2,16})([-_][a-z0-9]{1,8})*", re.ASCII)


@lru_cache(maxsize=4096)
def language_of_folder(name: str) -> str:
    """Return the language code of a subfolder's name (`de` for `german`, `pt` for `pt_BR`), or NO_LANGUAGE."""
    tag = _LANGUAGE_TAG.fullmatch(name.lower())
    return LANGUAGE_CODES.get(tag[1], NO_LANGUAGE) if tag else NO_LANGUAGE


@lru_cache(maxsize=4096)
def language_of_record(name: str | None) -> str:
    """Return the language code of the name in a document's record, without region and script.

    An unknown tag stays in lower case (`XYZ-AB` gives `xyz`); text that is no tag gives OTHER_LANGUAGE.
    """
    if not name:
        return NO_LANGUAGE
    tag = _LANGUAGE_TAG.fullmatch(name.strip().lower())
    return LANGUAGE_CODES.get(tag[1], tag[1]) if tag else OTHER_LANGUAGE
