"""Build hook: mathematics marked by arithmatex becomes MathML, which browsers show by themselves."""

import html
import re

from latex2mathml.converter import convert

_MATH = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
    """Replace each marked formula."""

    def mathml(match: re.Match) -> str:
        return convert(html.unescape(match["tex"]).strip(), display="block" if match["tag"] == "div" else "inline")

    return _MATH.sub(mathml, content)
