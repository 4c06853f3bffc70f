"""Language codes, and their lookup from the various forms in which datasets write languages."""

from __future__ import annotations

import re
from functools import cache

UNSPACED_LANGUAGES = {"zh", "yue", "ja", "th", "lo", "my"}
"""The languages that are scored by character, because they do not write spaces between words."""

# An entry has the ISO 639-1 code, which this program uses, the ISO 639-2 codes, and names with underscores.
_LANGUAGES = """
aa/aar/afar ab/abk/abkhazian ae/ave/avestan af/afr/afrikaans ak/aka/akan am/amh/amharic an/arg/aragonese
ar/ara/arabic as/asm/assamese av/ava/avaric ay/aym/aymara az/aze/azerbaijani ba/bak/bashkir be/bel/belarusian
bg/bul/bulgarian bh/bih/bihari_languages bi/bis/bislama bm/bam/bambara bn/ben/bangla bo/bod/tib/tibetan
br/bre/breton bs/bos/bosnian ca/cat/catalan/valencian ce/che/chechen ch/cha/chamorro co/cos/corsican cr/cre/cree
cs/ces/cze/czech cu/chu/church_slavic/old_slavonic/church_slavonic/old_bulgarian/old_church_slavonic cv/chv/chuvash
cy/cym/wel/welsh da/dan/danish de/deu/ger/german dv/div/divehi/dhivehi/maldivian dz/dzo/dzongkha ee/ewe/ewe
el/ell/gre/greek en/eng/english eo/epo/esperanto es/spa/spanish/castilian et/est/estonian eu/eus/baq/basque
fa/fas/per/persian ff/ful/fulah fi/fin/finnish fj/fij/fijian fo/fao/faroese fr/fra/fre/french fy/fry/western_frisian
ga/gle/irish gd/gla/gaelic/scottish_gaelic gl/glg/galician gn/grn/guarani gu/guj/gujarati gv/glv/manx ha/hau/hausa
he/heb/hebrew hi/hin/hindi ho/hmo/hiri_motu hr/hrv/croatian ht/hat/haitian/haitian_creole hu/hun/hungarian
hy/hye/arm/armenian hz/her/herero ia/ina/interlingua id/ind/indonesian ie/ile/interlingue/occidental ig/ibo/igbo
ii/iii/sichuan_yi/nuosu ik/ipk/inupiaq io/ido/ido is/isl/ice/icelandic it/ita/italian iu/iku/inuktitut
ja/jpn/japanese jv/jav/javanese ka/kat/geo/georgian kg/kon/kongo ki/kik/kikuyu/gikuyu kj/kua/kuanyama/kwanyama
kk/kaz/kazakh kl/kal/kalaallisut/greenlandic km/khm/central_khmer kn/kan/kannada ko/kor/korean kr/kau/kanuri
ks/kas/kashmiri ku/kur/kurdish kv/kom/komi kw/cor/cornish ky/kir/kirghiz/kyrgyz la/lat/latin
lb/ltz/luxembourgish/letzeburgesch lg/lug/ganda li/lim/limburgan/limburger/limburgish ln/lin/lingala lo/lao/lao
lt/lit/lithuanian lu/lub/luba-katanga lv/lav/latvian mg/mlg/malagasy mh/mah/marshallese mi/mri/mao/maori
mk/mkd/mac/macedonian ml/mal/malayalam mn/mon/mongolian mr/mar/marathi ms/msa/may/malay mt/mlt/maltese
my/mya/bur/burmese na/nau/nauru nb/nob nd/nde/ndebele/north_ndebele ne/nep/nepali ng/ndo/ndonga
nl/nld/dut/dutch/flemish nn/nno/norwegian_nynorsk/nynorsk no/nor/norwegian nr/nbl/ndebele/south_ndebele
nv/nav/navajo/navaho ny/nya/chichewa/chewa/nyanja oc/oci/occitan oj/oji/ojibwa om/orm/oromo or/ori/oriya
os/oss/ossetian/ossetic pa/pan/panjabi/punjabi pi/pli/pali pl/pol/polish ps/pus/pushto/pashto pt/por/portuguese
qu/que/quechua rm/roh/romansh rn/run/rundi ro/ron/rum/romanian/moldavian/moldovan ru/rus/russian rw/kin/kinyarwanda
sa/san/sanskrit sc/srd/sardinian sd/snd/sindhi se/sme/northern_sami sg/sag/sango si/sin/sinhala/sinhalese
sk/slk/slo/slovak sl/slv/slovenian sm/smo/samoan sn/sna/shona so/som/somali sq/sqi/alb/albanian sr/srp/serbian
ss/ssw/swati st/sot/sotho su/sun/sundanese sv/swe/swedish sw/swa/swahili ta/tam/tamil te/tel/telugu tg/tgk/tajik
th/tha/thai ti/tir/tigrinya tk/tuk/turkmen tl/tgl/tagalog tn/tsn/tswana to/ton/tonga tr/tur/turkish ts/tso/tsonga
tt/tat/tatar tw/twi/twi ty/tah/tahitian ug/uig/uighur/uyghur uk/ukr/ukrainian ur/urd/urdu uz/uzb/uzbek ve/ven/venda
vi/vie/vietnamese vo/vol wa/wln/walloon wo/wol/wolof xh/xho/xhosa yi/yid/yiddish yo/yor/yoruba za/zha/zhuang/chuang
zh/zho/chi/chinese zu/zul/zulu
"""
_MORE = """
zh/cmn/mandarin/mandarin_chinese/lzh yue/cantonese bn/bengali my/myanmar km/khmer nb/bokmal/norwegian_bokmal
tl/fil/filipino he/iw id/in yi/ji/ydd ro/mo jv/jw ar/arb sw/swh ms/zlm/zsm fa/pes/prs/farsi az/azj uz/uzn lv/lvs et/ekk
ne/npi or/ory/odia ku/kmr ps/pbt/pbu sq/als mn/khk om/gaz sl/slovene no/norwegian
"""


@cache
def language_code(language: str) -> str:
    """Return the code of a language, which is the ISO 639-1 code if there is one.

    Args:
        language: A BCP 47 tag such as `zh-Hans-CN` or `en_US`, an ISO 639 code, or an English name. The code of an
            unknown language is the first part of its name in lower case.
    """
    codes = _codes()
    plain = re.sub(r"\s+", "_", language.strip().lower())
    first = re.split(r"[-_(,;]", plain)[0]
    return codes.get(plain) or codes.get(plain.split("_(")[0]) or codes.get(first) or first


@cache
def _codes() -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in f"{_LANGUAGES} {_MORE}".split():
        code, *others = entry.split("/")
        found |= dict.fromkeys((code, *others), code)
    # Deprecated ISO 639-1 codes must not map to themselves.
    return found | {"iw": "he", "in": "id", "ji": "yi", "mo": "ro", "jw": "jv"}
