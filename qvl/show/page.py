"""The one HTML shell of every page we write: sections, tables, figures; self-contained, light and dark, narrow and wide."""

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image


class Html(str):
    """Markup that is meant as such. Every other string is text and is escaped."""

    __slots__ = ()


STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--paper:#fff;--faint:#62666d;--line:#dcdfe4;--panel:#f5f6f8;--mark:#0b57d0;--note:#fff4d6}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#16181c;--faint:#9aa0a8;--line:#33373d;--panel:#1f2228;--mark:#8ab4f8;--note:#3a3218}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.2rem 1rem 4rem}
h1{font-size:1.5rem;margin:.2rem 0 .3rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem;padding-top:.7rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .4rem}h1,h2,h3,figcaption{overflow-wrap:anywhere}td{overflow-wrap:break-word}
p{margin:.4rem 0}.faint,figcaption{color:var(--faint);font-size:.9rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem}
th,td{padding:.28rem .7rem .28rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{color:var(--faint);font-weight:500}td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:1rem 0}img{max-width:100%;height:auto;border-radius:4px}svg.plot{width:100%;min-width:34rem;max-width:60rem;height:auto}
pre,code{font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
pre{background:var(--panel);padding:.8rem;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;margin:.6rem 0}
"""


def page(title: str, body: Iterable[str], *, lead: str = "", style: str = "", script: str = "") -> str:
    """A whole document. It asks nobody for anything: a content policy forbids every request and any script but `script`."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{style}</style></head>",
        f"<body><main><h1>{escape(title)}</h1>",
        f'<p class="faint">{safe(lead)}</p>' if lead else "",
        *(safe(part) for part in body),
        "</main>",
        f"<script>{script}</script>" if script else "",
        "</body></html>",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def safe(part: str) -> Html:
    """Text escaped, markup as it is."""
    return part if isinstance(part, Html) else Html(escape(part))


def tag(name: str, *inside: str, **attributes: str) -> Html:
    """`tag("p", "a < b", class_="faint")`; `data_x` becomes data-x."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(safe(part) for part in inside)}</{name}>")


def section(title: str, *parts: str) -> Html:
    return tag("section", tag("h2", title), *parts)


def text(words: str) -> Html:
    return tag("p", words)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Numbers stand to the right; wide tables scroll by themselves on a phone."""
    rows = [list(row) for row in rows]
    is_number = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]

    def cells(name: str, values: Sequence[object]) -> str:
        return "".join(
            tag(name, _cell(value), **({"class_": "number"} if number else {}))
            for value, number in zip(values, is_number, strict=True)
        )

    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if any(header) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return Html(f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>')


def figure(picture: Image.Image | Html, caption: str = "", *, alt: str = "") -> Html:
    """A picture (inlined), or markup such as a plot's SVG, over its caption."""
    # Markup may be wider than a phone (a plot must not shrink until it cannot be read): it scrolls by itself.
    inside = tag("div", picture, class_="wide") if isinstance(picture, Html) else image(picture, alt=alt or caption)
    return tag("figure", inside, *([tag("figcaption", caption)] if caption else []))


def image(picture: Image.Image, *, alt: str = "", **attributes: str) -> Html:
    size = {"width": str(picture.width), "height": str(picture.height)}
    written = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in (size | attributes).items())
    return Html(f'<img src="{data_uri(picture)}" alt="{escape(alt)}"{written}>')


def data_uri(picture: Image.Image) -> str:
    """PNG for what has transparency or few pixels, JPEG for the rest: a contact sheet is ten times smaller so."""
    is_jpeg = picture.mode == "RGB" and picture.width * picture.height > 4096
    buffer = io.BytesIO()
    if is_jpeg:
        picture.save(buffer, "JPEG", quality=88)
    else:
        picture.save(buffer, "PNG", optimize=True)
    return f"data:image/{'jpeg' if is_jpeg else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else str(value)
