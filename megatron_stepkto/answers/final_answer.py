r"""Finding the final answer in a solution. Nothing is ever evaluated. docs/answer_checking.md lists the rules.

The last statement of an answer wins, whatever its form: a box, ``<answer>5</answer>``, "#### 5", "Answer: 5", a
heading "Answer" with the value below, "the answer is 5", "5 is the answer", 答案是 5. A statement that begins as a
value does (``Value.firm``) takes precedence over one in words, which may be prose: "the answer is a common mistake".
"""

from __future__ import annotations

import re

from megatron_stepkto.answers.answer_span import Value, is_answer, reduced, value_of
from megatron_stepkto.answers.boxes import last_boxed

_NEXT_PROBLEM = re.compile(r"\n(?:Problem|Question|Q):\s")
_THOUGHTS_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_DECOR = r"[ \t#*_>]{0,12}(?:\d{1,2}[.)][ \t]*)?[*_]{0,3}(?:\\(?:textbf|text|mathbf|section\*?|subsection\*?)\{)?"
_MARKERS = re.compile(
    # GSM8K's marker; five signs are a heading
    r"(?<!\#)\#{4}(?![\#])(?![ \t*]*(?:(?:the|final|correct)[ \t]+)*(?:answer|最终答案|答案))[ \t]*(?P<hash>)"
    # marker of the published GSM8K model solutions; "A: B" may be a ratio
    r"|^[ \t]*A:[ \t]+(?P<a>)(?=[-+$\\(\d.])"
    r"|<answer>(?P<tag>)"
    # a line of its own, "### Final Answer"; a formula may follow on it
    rf"|^{_DECOR}(?:(?:the|final|correct)[ \t]+){{0,3}}(?:answer|最终答案|答案)[*_}}\#]*"
    r"(?:[ \t]*\n|[ \t]+(?=\$|\\[(\[]))(?P<heading>)"
    r"|(?<![A-Za-z])(?:answer|ans)\.?(?:[ \t]+(?:to|for)\b[^.:;\n]{1,60}?)?(?:[ \t]*\([^()\n]{0,40}\))?"
    r"[*_}\]]{0,4}[ \t]*[:：][*_}: \t]*(?P<colon>)"
    r"|(?<![A-Za-z])answer[*_]{0,3}(?:[ \t]+(?:to|for)\b[^.:;\n]{1,80}?)?,?(?:[ \t]+(?:then|thus|therefore|hence))?,?"
    r"(?:[ \t]*=|[ \t]+(?:is|equals|(?:must|should|will|would) be|comes? out to(?: be)?|comes to|becomes)\b(?!n't))"
    r"[*_]{0,3}[ \t]*:?(?P<is>)"
    r"|答案\**(?:应该|应当|就|也)?(?:等于|[是为：:=]|[ \t])+(?P<chinese>)"
    r"|(?<![\w.,$/])(?<![-+*/×÷] )(?P<before>\*\*[^*\n]{1,100}\*\*|\$[^$\n]{1,200}\$|\\\([^\n]{1,200}?\\\)"
    r"|[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?)"
    r"[ \t]+is[ \t]+(?:the|our|my)[ \t]+(?:(?:final|correct|required)[ \t]+)?answer\b",
    re.IGNORECASE | re.MULTILINE,
)
# Text before "answer is" that makes it not a statement: the wrong answer is, the digits of the answer is, if the answer
# is, one might think the answer is, I don't think that the answer is
_SUBJECT = r"(?:(?:the|our|my|your|an?|this)[ \t]+)?(?:(?:final|correct|right|actual|true|real)[ \t]+)*"
_THINK = r"(?:think|thought|say|guess|believe|assume|expect|conclude|argue|claim|suppose|tempted|mean|true)"
_NOT_STATED = re.compile(
    r"(?:\b(?:wrong|incorrect|false|common|other|another|previous|earlier|initial|naive|tempting|partial|intermediate|"
    r"possible|plausible|alternative|different|original)[ \t]+|错误的?|常见"
    rf"|\b(?:of|if|whether|suppos(?:e|ing)|assum(?:e|ing)|imagine|unless|thought|checks?|checking|verify|"
    rf"verifying|testing)(?:[ \t]+that)?[ \t]+{_SUBJECT}"
    r"|(?:\b(?:one|you|some|someone|somebody|people|many|students?|we|it)(?:[ \t]+(?:might|may|could|would)|'d)\b)"
    rf"[^.!?;\n]{{0,40}}\b{_THINK}\b[^.!?;\n]{{0,20}}"
    rf"|(?:\b(?:not|never|cannot|hardly|doubt)|n't)(?:[ \t]+(?:\w+[ \t]+){{0,2}}{_THINK})?"
    rf"(?:[ \t]+that)?[ \t]+{_SUBJECT}"
    r"|\b(?:mistakenly|wrongly|incorrectly|erroneously|tempted|naively)\b[^.!?;\n]{0,40})$",
    re.IGNORECASE,
)
_ENUMERATED = re.compile(r"\d+[.)]\s+\S")  # "#### 2. Check": the heading of a section
_FORMULA_BLOCK = re.compile(
    r"\$\$.*?\$\$|\\\[.*?\\\]|\$[^$]*\$|\\begin\{(?P<kind>[a-z*]+)\}.*?\\end\{(?P=kind)\}", re.DOTALL
)
_EMPTY_LINE = re.compile(r"(?:[ \t*_}:#>]|```\w*)*\n")
_LINE_BEGIN = re.compile(rf"(?:^|\n){_DECOR}(?:(?:the|my|final|correct)[ \t]+)*$", re.IGNORECASE)
_TURN_END = re.compile(r"</[A-Za-z]+>|<\|")  # of an <answer>, of a turn: "</s>", "<|im_end|>"
_TAG = re.compile(r"<(?P<end>/?)answer>", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    """The final answer that a solution states, as written; None where it states none.

    Thoughts (``<think>``) are ignored. A text that is nothing but an answer is the answer (``is_answer``).
    """
    text = _without_thoughts(text)
    # after a few-shot prompt a base model continues with problems of its own
    more = _NEXT_PROBLEM.search(text)
    if more and (answer := _stated(text[: more.start()])):
        return answer
    return _stated(text)


def _without_thoughts(text: str) -> str:
    ends = list(_THOUGHTS_END.finditer(text))
    if ends:
        return text[ends[-1].end() :]
    begin = _THOUGHTS_BEGIN.search(text)
    return text[: begin.start()] if begin else text


def _stated(text: str) -> str | None:
    """The last firm statement; else the last other one; else the text itself if it is an answer."""
    boxed = last_boxed(text)
    firm_box = boxed if boxed and not boxed.quoted else None
    in_words: str | None = None
    end = len(text)
    for marker in reversed(list(_MARKERS.finditer(text))):
        if firm_box and marker.start() < firm_box.start:
            break
        if in_words and marker.lastgroup == "a":  # never firm
            continue
        value = _value(text, marker, end)
        end = marker.start()
        if value and value.firm:
            return value.text
        in_words = in_words or (value.text if value else None)
    if boxed and (firm_box or not in_words):
        return boxed.content
    return in_words or (text.strip() if is_answer(text) else None)


def _value(text: str, marker: re.Match[str], end: int) -> Value | None:
    """The value that the statement at ``marker`` gives; ``end``: where the next statement begins."""
    kind = marker.lastgroup or ""
    before = text[max(0, marker.start() - 80) : marker.start()]
    if kind != "tag" and _NOT_STATED.search(before):
        return None
    if kind == "before":
        value = value_of(marker["before"])
        return value and Value(value.text, True)
    if kind == "tag":
        return _tagged(text, marker.end())
    start = marker.end()
    if kind != "hash" and kind != "a":
        while empty := _EMPTY_LINE.match(text, start, end):
            start = empty.end()
    block = _FORMULA_BLOCK.match(text, start, end)
    line_end = text.find("\n", block.end() if block else start, end)
    line = _TURN_END.split(text[start : end if line_end < 0 else line_end], maxsplit=1)[0]
    if kind == "hash" and _ENUMERATED.match(line):
        return None
    value = value_of(line)
    if value is None or kind == "hash":
        return value
    if kind == "a":  # "A: 30 degrees" may belong to a list
        return Value(value.text, False)
    if kind != "is" or value.text.startswith("that "):
        value = reduced(value)
    own_line = kind == "heading" or (kind == "colon" and _LINE_BEGIN.search(before) is not None)
    return Value(value.text, value.firm or (own_line and is_answer(value.text)))


def _tagged(text: str, start: int) -> Value | None:
    """Between ``<answer>`` and its end, which a stop string may have cut off."""
    closing = _TAG.search(text, start)
    if closing and not closing["end"]:  # the next tag is a statement of its own
        return None
    inner = text[start : closing.start() if closing else len(text)].strip()
    if answer := _stated(inner):
        return Value(answer, True)
    value = value_of(inner) if "\n" not in inner else None
    return value and Value(reduced(value).text, closing is not None)
