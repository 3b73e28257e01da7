"""Where an answer ends in the text that follows "the answer is", and whether a whole text is nothing but an answer."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_stepkto.answers.boxes import is_placeholder

MAX_LINE = 10_000  # a longer line is not a sentence that states an answer
MAX_WORDS = 10  # of a text that is nothing but an answer
_FILLERS = re.compile(
    r"(?:(?:therefore|thus|then|hence|simply|just|indeed|actually|exactly|clearly|now|still|precisely|approximately|"
    r"about|roughly|for sure|definitely|probably|equal to|given by|as follows|letter)\b"
    r"|(?:option|choice)(?![a-z])(?:\\?_)?|[:,])[ \t]*",
    re.IGNORECASE,
)
# How an unambiguous value begins: a number, a formula, a choice, "x =". Words may also be prose.
_FIRM = re.compile(
    r"[-+±−<>≤≥~≈]?\s*[$€£¥]?\s*[-+−]?[\d.０-９]|\\|\$|\[|\{|[√π∞∅]|\((?![a-z]{2,})|\|"
    r"|[A-Z](?:[.):,;]|\s*$|\s+(?:or|and)\b)|[A-Za-z](?:['_^(]\S*)?\s*[-=<>≤≥+*/^]|[a-z]\s*[.]?\s*$|[A-Za-z]+\s*=\s"
)
_TOKEN = re.compile(
    r"(?P<formula>\$\$.*?\$\$|(?<!\\)\$(?P<inner>(?:\\.|[^$\\])*)\$|\\\(.*?\\\)|\\\[.*?\\\])"
    r"|(?P<aside>(?<!\s)\s+\((?=(?!mod\b)[a-z]{2,}))"
    r"|(?P<open>[(\[{（])|(?P<close>[)\]}）])"
    r"|(?P<stop>[.!?](?=[*_\"'”)\]`]*(?:\s|$|</?[a-z]|<\|))|[。！？])"
    r"|(?P<comma>[,;，；、])"
    r"|(?P<clause>(?<!\s)\s+(?:--?|—|–)\s+(?=[A-Za-z]{2,})|—(?=[A-Za-z]{2,})"
    r"|(?<!\s)\s+(?:because|since|so|which|but|however|hence|thus|therefore|rather than|instead of|not(?=\s+[$\\\d*])"
    r"|as (?:required|desired|we|the|it|shown|claimed|expected|above)|in (?:total|all|change|profit|sum)|altogether"
    r"|overall|and (?:not|so|thus|hence|we|he|she|it|they|this|that))\b|因为|所以)"
    r"|\\.",
    re.DOTALL,
)
# what continues a list after a comma: "2, 3", "x = 2, y = 3", "A, B and C", not "72, in total"
_NEXT_ITEM = re.compile(
    r"\s*(?:(?:and|or|且|或)\s*)?(?:[-+±−]?\s*[$€£]?[\d.]|\\|\$|\(|\[|\{|\*\*\d|[A-HJ-Zb-z](?![A-Za-z'])|[A-Za-z]+\s*=\s)"
)
_PROSE = re.compile(r"(?<![\\a-zA-Z{])[A-Za-z]{3,}(?![a-zA-Z}{])")
_ABBREVIATION = re.compile(
    r"\b(?:[ap]\.m|[A-Z](?:\.[A-Z])+|[ie]\.[eg]|approx|vs|no|st|mt|mr|mrs|ms|dr|ft|in|sq|hr|hrs|min|mins|sec|secs|lb|"
    r"lbs|oz|yd|mi)$",
    re.IGNORECASE,
)
_TITLE = re.compile(r"\b(?:St|Mt|Mr|Mrs|Ms|Dr|No|vs|approx)$")
_WEEKDAY = re.compile(r"\s+(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b")
_FACTORIAL = re.compile(r"\s*[-=/\\*+^$)×·]")
_BOLD = re.compile(r"(?<![\w*])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?!\w)")
_NUMBER = re.compile(r"(?<![\w.,])[-+]?[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
_CJK = re.compile(r"[\u3400-\u9fff]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z][A-Za-z'’]+")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{[^{}]*\}")
# Words that occur in reasoning, not in answers: "There are 73 people" is a sentence, "73 people" is an answer.
_REASONING_WORDS = (
    "is are was were be been isn't aren't has have had we he she they it i'm it's that's you his her their our my so "
    "thus hence therefore then because let let's first next step answer answers how what get gets got find "
    "found need needs gives give means makes know think this these there here box boxed"
)
_REASONING = frozenset(_REASONING_WORDS.split())
_NOT_PROSE = "and or mod sin cos tan cot sec csc log ln exp arcsin arccos arctan sqrt max min gcd"
_CONNECTIVES = frozenset(_NOT_PROSE.split())
_ARITHMETIC = re.compile(r"[\w)}]\s*[-+*/×÷·]\s*[^=]*=")
_SENTENCE = re.compile(r"[A-Z][a-z]+\s+[a-z]{3,}\b.*\d|\w{2,}[)}\"]?[.!?]\s+[A-Z]|[。！？].", re.DOTALL)
_ONE_FORMULA = re.compile(
    r"\$\$[^$]*\$\$|\$[^$]*\$|\\\[.*\\\]|\\\(.*\\\)|\\begin\{(?P<kind>[a-z*]+)\}.*\\end\{(?P=kind)\}", re.DOTALL
)


class Value(NamedTuple):
    """An answer as written; ``firm``: it begins as a value does, so it is not the rest of a sentence."""

    text: str
    firm: bool


def value_of(text: str) -> Value | None:
    """The answer at the beginning of a text of one line or one formula: up to the end of its sentence or clause.

    Trailing clauses are cut ("72, in total, so ..." -> "72"); lists, tuples, thousands commas and decimals stay whole
    ("1,234", "(3, 4)", "x=2, y=3"). None where there is no answer, or it is negated ("not 20"), a question ("20?"), a
    placeholder, or a box, which is found separately.
    """
    text = text.strip()
    if len(text) > MAX_LINE:
        return Value(text, _FIRM.match(text) is not None)
    bold = text.startswith(("**", "\\textbf", "__"))
    text = _BOLD.sub(r"\2", text).lstrip("*_`\"“”'># \t")
    while filler := _FILLERS.match(text):
        text = text[filler.end() :].lstrip("*_`\"“”' \t")
    if re.match(r"not\b", text, re.IGNORECASE):
        return None
    firm = bold or _FIRM.match(text) is not None
    end = _end(text, firm)
    if text[end : end + 1] in ("?", "？"):
        return None
    answer = text[:end].strip().strip('*`"“”').rstrip(",;:").strip()
    if "\\boxed" in answer or is_placeholder(answer):
        return None
    return Value(answer, firm)


def reduced(value: Value) -> Value:
    """A marked answer in a sentence, "There are 73 people": its only number with what follows; else unchanged."""
    if value.firm or is_answer(value.text):
        return value
    formulas = [m for m in _TOKEN.finditer(value.text) if m["formula"] and any(c.isdigit() for c in m["formula"])]
    outside = _TOKEN.sub(lambda m: " " * len(m[0]) if m["formula"] else m[0], value.text)
    numbers = [*_NUMBER.finditer(outside), *formulas]
    return Value(value.text[numbers[0].start() :], True) if len(numbers) == 1 else value


def _end(text: str, firm: bool) -> int:
    """Where the value at the beginning of ``text`` ends; only a firm one ends at a comma before prose."""
    depth, position = 0, 0
    while token := _TOKEN.search(text, position):
        position = token.end()
        if token["inner"] is not None and _PROSE.search(_TEXT_COMMAND.sub("", token["inner"])):
            position = token.start() + 1  # "$72, in total, so $5": money, not a formula
        elif token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(0, depth - 1)
        elif depth == 0 and _ends(text, token, firm):
            return token.start()
    return len(text)


def _ends(text: str, token: re.Match[str], firm: bool) -> bool:
    if token.start() == 0:
        return False
    if token["stop"]:
        return _ends_sentence(text, token)
    if token["comma"]:
        if token[0] == "," and text[token.end() : token.end() + 1].isdigit():
            return False
        return firm and not _NEXT_ITEM.match(text, token.end())
    return bool(token["clause"] or token["aside"]) and (firm or "because" in token[0] or "since" in token[0])


def _ends_sentence(text: str, token: re.Match[str]) -> bool:
    stop, before, after = token["stop"], text[max(0, token.start() - 12) : token.start()], token.end()
    if stop == "!":  # "10! = 3628800"
        return not (before[-1:].isalnum() or before.endswith(")")) or _FACTORIAL.match(text, after) is None
    if stop != "." or not _ABBREVIATION.search(before):
        return True
    if _TITLE.search(before) or _WEEKDAY.match(text, after):
        return False
    following = text[after : after + 12].lstrip("*_\"' ")
    return following[:1].isupper()


def is_answer(text: str) -> bool:
    """Whether a text is nothing but an answer: one formula, or one line of a few words without a sentence in it.

    "107, 113", "18 dollars", "(D) Alina" and "x<-2 or x>1" are; "Therefore, 3 * 4 = 12." and "There are 73 people."
    are sentences of a solution.
    """
    text = text.strip()
    if not text or "\\boxed" in text or re.match("<answer>|solution:", text.lower()) or is_placeholder(text):
        return False
    if "\n" in text and not _ONE_FORMULA.fullmatch(text):
        return False
    if len(text) > 2000:  # a list, or hostile input: the comparison decides
        return not re.search(r"[A-Za-z]{2,} +[A-Za-z]{2,}", text[:2000])
    outside = _TEXT_COMMAND.sub(" ", text)
    words = [word.lower().replace("’", "'") for word in _WORD.findall(outside)]
    if re.match(r"\(?[A-J][).:]\)?(?!\S)", text) and len(words) <= MAX_WORDS:  # "D. it can't be A or B"
        return True
    if len(words) + len(_CJK.findall(text)) > MAX_WORDS or not _REASONING.isdisjoint(words):
        return False
    if _CONNECTIVES.issuperset(words):
        return True
    return not _SENTENCE.search(outside) and not _ARITHMETIC.search(outside)
