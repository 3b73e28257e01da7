"""Is the text around an equation understood well enough to call the equation false?

An equation that does not hold as read is often right: "twice 5 + 2 = 12", "11 + 3 = 2 o'clock", "= 24" with a line
break before "- 4 = 20". So every character and word next to it must be known to leave its meaning alone. The lists hold
what is harmless, not what is harmful: an unknown word costs a label, a missed word would teach a wrong one.
"""

from __future__ import annotations

import re
from functools import cached_property

from megatron_stepkto.judging.equation_sides import NUMBER

# Words before an equation that leave it alone: links, and verbs that take an amount ("she paid 3 + 4 = 7"). Verbs in
# "-ed" are allowed by rule. Most are those that precede equations in GSM8K's solutions.
_LINK_WORDS = """
also altogether am are as be because become becomes been being but calculate calculates compute computing contains
currently determine did do does equal equaling equals evaluate finally find finds first get gets getting give gives
giving had has have having hence i.e implies is it it's just know knows leaves leaving let's makes making meaning
means namely next note notice now observe obtain obtaining obtains only recall say see show showing shows simplify
simplifying since so that that's then there therefore this thus totaling totalling totals was we were where which
yielding yields
"""
_AMOUNT_WORDS = """
answer ate bake bakes became bought bring brings brought build built burns buy buying buys came carries carry catch
catches caught charge charges climb climbs collect collects combined compute computes consume consumes contain cost
costing costs cover covers deliver delivers did donates drank drew drink drinks drive drives drove earn earning earns
eat eaten eats exactly expenses fed fill fills fit for found gain gains gave given go goes got grew grow grown grows
hold holds income keep keeps kept knit lasts leave left lose loses lost made make need needs orders owe owes own owns
paid pay paying pays perform performs perimeter pick picks plant plants play plays price produce produces profit put
puts ran read reads receive receives remain remains represent represents require requires revenue rode run runs sale
sales save saves saving saw score scores sell selling sells send sends sent shot sleeps slept sold spend spending
spends spent take taken takes taking threw took total travel travels tuition use uses using walk walks want wants
watch weigh weighs went win wins won work works worth write writes written wrote
"""
_LINKS, _AMOUNTS = frozenset(_LINK_WORDS.split()), frozenset(_AMOUNT_WORDS.split())
_OPERATORS_OF_WORDS = (
    (re.compile(r"add(?:s|ed|ing)?|sum(?:s|ming)?"), "+"),
    (re.compile(r"subtract(?:s|ed|ing)?|difference"), "-"),
    (re.compile(r"multipl(?:y|ies|ied|ying)|product"), "*"),
    (re.compile(r"divid(?:e|es|ed|ing)|quotient"), "/"),
)
_OPERATION_IN_ED = re.compile(
    r"(?:hund|add|sub|minus|mult|div|doub|trip|treb|quad|quin|halv|squar|cub|root|increas|decreas|reduc|deduct|rais|round"
    r"|averag|negat|invert|scal|shift|compound|power|complement|truncat|estimat|approximat|dozen|unlimit|number|label"
    r"|indexed|revers|concatenat|append|shar|split|remain|discount|exceed|lower|exponent|bas|numb|inde|ne[eg]d)\w*"
)
# "a total of 3 + 4 = 7"; the sum, difference, product and quotient take their own operator alone
_OF_AMOUNT = re.compile(
    r"\b(?:(total)|(?P<own>sum|difference|product|quotient)|amount|cost|price|profit|income|revenue|distance|area"
    r"|perimeter|volume|weight|salary|bill|speed|balance)\s+of\s*$",
    re.IGNORECASE,
)
_TO = re.compile(
    r"\b(?:equal|equals|adds? up|sums? up|comes?(?: out)?|came(?: out)?|amounts?|leads?|leading|simplifies|evaluates)"
    r"\s+to$"
)
_WITH = re.compile(r"\b(?:left|ends? up|ended up|comes? up|begins?|starts?)\s+with$")
_WORD_BEFORE = re.compile(r"(?<![\w’'-])([A-Za-z]+(?:[’'][A-Za-z]+)?)$")
# LaTeX that takes no argument from what follows
NEUTRAL_COMMANDS = "quad|qquad|implies|Rightarrow|Longrightarrow|rightarrow|to|therefore|because|displaystyle|item|iff"
_COMMAND_BEFORE = re.compile(rf"\\(?:{NEUTRAL_COMMANDS})$")
_HEADING = re.compile(r"(?:^|\n)[\s*#]*[A-Z][a-z]+ \d+$")
_MULTIPLE = re.compile(
    r"\b(?:half|twice|thrice|double|triple|quadruple|times|thirds?|quarters?)\b[^.;:!?\n]*$", re.IGNORECASE
)
_NUMBER_IN_CLAUSE = re.compile(
    r"(?:\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty|hundred|thousand|million|dozen"
    r"|half|third|quarter|twice|double|triple|both|between)\b)[^.;:!?\n]*$",
    re.IGNORECASE,
)
# An equation that ends here: "... = 4,", "= 24 apples, and"
_EQUATION_BEFORE = re.compile(r"=[-+*/()%.,\d \t]*(?:[ \t]+[A-Za-z]+){0,2}\s*,?$")
_LABEL_BEFORE = re.compile(
    r"(?:^|[\n.;!?*#>])[\s*#(]*(?!(?i:ratio|odds|scale|proportion)\b)[A-Z][a-z]+\s+\d{1,3}\s*\**\s*:$"
)
_REFERENCE_BEFORE = re.compile(r"\b(?:no|nos|fig|figs|eq|eqs|vs|approx|ch|sec|p|pp|vol|ex|prob)\.$", re.IGNORECASE)

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|emph)\s*\{([^{}]{0,80})\}")
_BULLET = re.compile(r"[ \t]*(?:[-*•+]|\d{1,3}[.)]|\([a-z]\))[ \t]")
# "(since there are more)", not the factor of "3 (m - 1)" and "2 (sin x)"
REMARK = re.compile(r"\((?!(?:sin|cos|tan|log|ln|exp|sqrt)\b)[A-Za-z]{2,},?[ \t]+(?:[A-Za-z]{2}|[\d$])")
_CLOSERS = re.compile(
    rf"\A(?:[ \t]*>>[ \t]*-?(?:{NUMBER})?%?)?"  # GSM8K's "<<48/2=24>>24"
    r"(?:[ \t]|\\[\])]|[})](?![\^_!\d])|[”’»`\]])*"
)
_NOUN = re.compile(r"(?:\n[ \t]*(?![A-Z])|\()?([A-Za-z]+)")
_WORD_AFTER = re.compile(r"[A-Za-z]+(?:[’'.][A-Za-z]+)*")
_COMMAND_AFTER = re.compile(
    r"\\(?:\\|\[|\(|(?:quad|qquad|approx|sim|implies|Rightarrow|Longrightarrow|rightarrow|to|therefore|because|iff|leq?|geq?|neq?"
    r"|end|begin|item|boxed)(?![a-zA-Z]))"
)
_OPERATION_AFTER = re.compile(
    r"(?:times|plus|minus|over|of|squared|cubed|factorial|mod|modulo|choose|percent\w*|per[ \t]+cent|pct"
    r"|divided|multiplied|raised|to|by|out|in[ \t]+(?:base|\d)|base|remainder|rem|r|with|hundreds?|thousands?|millions?"
    r"|billions?|trillions?|mil|half|halves|thirds?|fourths?|quarters?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?"
    r"|hundredths?|thousandths?|twelfths?|o['’]?clock|[ap]\.?m\b|noon|midnight|per[ \t]+\d"
    r"|and[ \t]+(?:(?:a|an|one|two|three)\b|\d+/)"
    r"|(?:more|less|fewer|greater|larger|smaller|higher|lower|bigger)[ \t]+than[ \t]+\d)(?![A-Za-z])",
    re.IGNORECASE,
)
# 2 hours 35 minutes, 5 feet and 7 inches
_COMPOUND = re.compile(r"[A-Za-z.]+(?:[ \t]+[A-Za-z.]+)?,?(?:[ \t]+(?:and|&))?[ \t]+(?:\d|an?[ \t]+(?:half|quarter))")

# Words behind a result that are not a unit
_NO_NOUNS = """
a about after ago all already also altogether and are as at away back because before but by cheaper combined each
earlier else every extra faster for from he hence her his however i if in is it its later left less longer more my now
off older on or our overall per remaining she since so still taller than that the their then therefore these they this
thus to together too total until was we when where which while who with younger your
"""
NOT_A_NOUN = frozenset(_NO_NOUNS.split())

# Another kind of arithmetic, anywhere in the problem or its solution
_OTHER_SUBJECT = re.compile(
    r"\b(?:xor|boolean|binary|octal|hex|hexadecimal|ternary"
    r"|(?:in|to|from)[ \t]+base|base[- _](?:\d+|two|three|four|five|six|seven|eight|nine|twelve|sixteen)|number bases?"
    r"|clock arithmetic)\b|\bbases?[ \t]+\$|\boperations?[ \t]+\$?\\?[^\w\s$.,;:]"
    r"|\\(?:oplus|otimes|star|ast|circ[ \t]*\d)(?![a-zA-Z])|[⊕★☆◇]|\\mathbb\{?[ZF]\}?[_/]"
    r"|_\{?(?:two|three|five|eight|ten)\b"
    # "define a * b = a + 2b", "let a * b = a + 2b for all a and b"
    r"|\b(?:defin(?:e[ds]?|ing)|operation)\b[^.]{0,80}\b[a-z][ \t]*(?:[*@#]|\\(?:times|cdot))[ \t]*[a-z]\b"
    r"|\b[a-z][ \t]*[*@#][ \t]*[a-z]\b[^.]{0,80}\b(?:for (?:all|any|every)|operation|defin\w+)\b",
    re.IGNORECASE,
)
_MODULAR = re.compile(
    r"\b(?:mod|modulo|modulus|modular|congruences?|residues?|congruent[ \t]+to[ \t]+\$?-?\d)\b"
    r"|\\(?:equiv|[pb]?mod)(?![a-zA-Z])|≡",
    re.IGNORECASE,
)
_MODULUS = re.compile(r"(?:\bmod|\bmodulo|\bmodulus(?: is| of)?|\\[pb]?mod)\W{0,4}(\d{1,9})", re.IGNORECASE)
_OTHER_IN_STEP = re.compile(
    r"\b(?:bits?|(?:units?|ones|last|final|tens|hundreds|leading)[- ]digits?|digital root"
    r"|carry(?:ing)? the|log|ln)\b|\\(?:log|ln)(?![a-zA-Z])",
    re.IGNORECASE,
)
# An equation that is not asserted: by its step, by its own sentence
_REFUTED = re.compile(
    r"\b(?:wrong|incorrect(?:ly)?|false|impossible|contradict\w*|mistake\w*|errors?|erroneous\w*|untrue|invalid|supposing"
    r"|suppose|pretend|guess(?:es|ed|ing)?|try|trying|tried)\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\b(?:no|not|never|neither|nor|cannot|instead of|rather than|unless)\b|n[’']t\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?;](?=\s)|\n")


class Subject:
    """The problem and its whole solution: what they tell of all equations, looked for once."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    @cached_property
    def usual(self) -> bool:
        """Is the arithmetic ordinary (not in another base, no operation of the problem's own, no unknown modulus)?"""
        modular = any(_MODULAR.search(text) for text in self._texts)
        return not (any(_OTHER_SUBJECT.search(text) for text in self._texts) or (modular and not self.moduli))

    @cached_property
    def moduli(self) -> frozenset[int]:
        return frozenset(int(found) for text in self._texts for found in _MODULUS.findall(text) if int(found))


def unrefuted(step: str) -> bool:
    """Do a step's words leave its equations as true as they look?"""
    return not any(pattern.search(step) for pattern in (_REFUTED, _OTHER_IN_STEP))


def asserted(before: str, after: str) -> bool:
    """Does the sentence assert the equation between ``before`` and ``after``?"""
    return not (_NEGATED.search(_SENTENCE_END.split(before)[-1]) or _NEGATED.search(_SENTENCE_END.split(after)[0]))


def understood_before(before: str, side: str, lone: bool) -> bool:
    """Does what stands before an equation leave its left side alone?

    Args:
        before: the text up to the equation (its last hundred characters do).
        side: the left side; ``lone``: it is a single number, which after a word may be a label ("Day 2 = 5 * 3").
    """
    text = _unwrapped(before).rstrip(" \t")
    spaced = not before or before[-1].isspace() or side[:1].isspace()
    if _BULLET.fullmatch(text.rpartition("\n")[2] + " "):
        return True
    if text.endswith("\n"):
        if not text.rstrip(" \t\n") or re.search(r"\n[ \t]*\n$", text):
            return True
        text = text.rstrip()
        if text[-1].isdigit():  # an equation per line, or a heading ("Step 2")
            whole = _EQUATION_BEFORE.search(text) or _HEADING.search(text)
            return bool(whole) and side.lstrip()[:1] not in "(-+*/"
    if not text or _COMMAND_BEFORE.search(text) or text.endswith((r"\\", r"\[", r"\(", r"\boxed{", "<<", ">>")):
        return True
    last = text[-1]
    if last.isalpha():
        return word_leaves_alone(text, side, lone)
    if last in ".,:'\"" and text[-2:-1].isdigit() and not spaced:
        return False  # 3:00, 2,5
    if last == ",":
        if _EQUATION_BEFORE.search(text):
            return True
        return not (re.search(r"\d[%)]*\s*,$", text) or _MULTIPLE.search(text))
    if last == "(":  # a remark, not an argument
        return not text[-2:-1].isalnum()
    if last == "*":
        return not re.search(r"[\w)%][ \t]*\*$", text)
    if last == ":":
        return not re.search(r"[\d%]\s*\**\s*:$", text) or bool(_LABEL_BEFORE.search(text))
    if last == ".":
        return not text.endswith("..") and not _REFERENCE_BEFORE.search(text)
    if last in "'\"":
        return not text[-2:-1].isdigit()  # 5'3
    return last in ";?!><`“‘«—•→⇒∴"


def word_leaves_alone(text: str, side: str, lone: bool) -> bool:
    """Does the word that ends ``text`` leave the side behind it alone ("is", "paid", not "twice")?"""
    match = _WORD_BEFORE.search(text)
    if not match:
        return False
    word = match[1].lower().replace("’", "'")
    rest = text[: match.start()].rstrip(" \t")
    if word in ("and", "or", "to", "with") and _EQUATION_BEFORE.search(rest):
        return True
    if lone:
        return word in _LINKS
    if word in ("and", "or"):
        return not _NUMBER_IN_CLAUSE.search(rest)
    if word == "of":
        return of_amount(text, side)
    if word in ("to", "with"):
        return bool((_TO if word == "to" else _WITH).search(text.lower()))
    for pattern, operator in _OPERATORS_OF_WORDS:
        if pattern.fullmatch(word):
            return set(re.findall(r"[-+*/]", side)) == {operator}
    return (
        word in _LINKS
        or word in _AMOUNTS
        or (len(word) > 4 and word.endswith("ed") and not _OPERATION_IN_ED.fullmatch(word))
    )


def of_amount(before: str, side: str) -> bool:
    """Is this the "of" of "a total of 3 + 4", which names the result, and not that of "half of"?"""
    match = _OF_AMOUNT.search(before)
    if not match or not match["own"]:
        return bool(match)
    operator = {"sum": "+", "difference": "-", "product": "*", "quotient": "/"}[match["own"].lower()]
    return set(re.findall(r"[-+*/]", side.partition("=")[0])) == {operator}


def understood_after(after: str, before: str) -> bool:
    """Does what stands behind an equation leave its right side alone?

    Args:
        after: the text from the end of the equation; ``before``: the text up to the equation, for open quotes and the
            list that it may stand in.
    """
    text = _past_closers(_unwrapped(after))
    if text.startswith("\n"):
        if re.match(r"\n[ \t]*(?:\n|$)", text):
            return True
        line = text[1:].lstrip(" \t")
        if _BULLET.match(line) and (
            _BULLET.match(before.rpartition("\n")[2]) or not re.match(r"[-*+•][ \t]*[\d(.$]", line)
        ):
            return True
        text = _past_closers(line)
        if text[:1].isdigit() or text[:1].isupper() or text.startswith("#"):  # the next line is one of its own
            return True
    if not text or _COMMAND_AFTER.match(text):
        return True
    first, second = text[0], text[1:2]
    if first in ".,":
        return not second.isdigit() and not text.startswith("..")
    if first == ":":
        return not re.match(r":[ \t]?\d", text)
    if first in "'\"":
        return before.count(first) % 2 == 1
    if first.isalpha():
        return _words_leave_alone(text)
    return first in ";<>≈≠≤≥→⇒—∴[•" or bool(REMARK.match(text))


def _words_leave_alone(text: str) -> bool:
    match = _WORD_AFTER.match(text)
    if not match or _OPERATION_AFTER.match(text):
        return False
    if match[0].lower() not in NOT_A_NOUN and _COMPOUND.match(text):
        return False
    if len(match[0]) == 1:  # a variable, or "a" and "I"
        return match[0] in "aAI" and bool(re.match(r".[ \t]+[A-Za-z]{2}", text))
    return not re.match(r"[_^({\d]", text[match.end() :])


def noun_after(after: str) -> str:
    """The first word behind an equation ("hours" of "= 1.5 hours"), in lower case; "" where none is next to it."""
    match = _NOUN.match(_past_closers(_unwrapped(after)))
    return match[1].lower() if match else ""


def _unwrapped(text: str) -> str:
    return _WRAPPED.sub(r" \1 ", text)


def _past_closers(text: str) -> str:
    return _CLOSERS.sub("", text, count=1)


def continues_line_before(before: str) -> bool:
    """Does the step before break off inside a formula, so that this one goes on with it ("= 26\\n- 6 = 20")?"""
    text = before.rstrip(" \t")
    text = text.removesuffix("\n").rstrip(" \t")
    if not text or text.endswith("\n") or _BULLET.match(text.rpartition("\n")[2]):
        return False
    return text[-1].isdigit() or text[-1] in "+-*/=(^\\"
