"""Makes web pages of the built notebooks, which need no network: `build.py --site FOLDER`.
README.md becomes `index.html`, and each notebook a page beside it."""

import html
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat import v4
from pygments.formatters import HtmlFormatter

import build


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<nav>{nav}</nav>
{contents}
<main>
{body}
</main>
<nav>{nav}</nav>
</body>
</html>
"""

STYLE = """
body { max-width: 52rem; margin: 0 auto; padding: 0 1rem 3rem; color: #1b1b1b;
       background: #fff; font: 1.05rem/1.6 Georgia, serif; overflow-wrap: break-word; }
nav, h1, h2, h3 { font-family: system-ui, sans-serif; line-height: 1.25; }
nav { display: flex; justify-content: space-between; gap: 1rem; padding: 1rem 0; }
a { color: #1f5f8b; }
pre, code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.85rem; }
pre { overflow-x: auto; line-height: 1.4; margin: 0; }
.input .highlight, .text_cell_render pre { background: #f5f5f2; padding: 0.6rem 0.8rem;
       margin: 0.8rem 0; border-left: 3px solid #31688e; }
.output { margin: 0.8rem 0; }
.output .highlight { background: #fafaf8; padding: 0.6rem 0.8rem; }
img { max-width: 100%; height: auto; } td img { min-width: 7rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.9rem;
       margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left;
       vertical-align: top; }
td.short { white-space: nowrap; } td.long { min-width: 14rem; }
@media (max-width: 40rem) {
       th, td { padding: 0.25rem 0.4rem; } td img { min-width: 4.5rem; } }
.contents { font: 0.95rem/1.5 system-ui, sans-serif; }
details { margin: 0.8rem 0; } summary { cursor: pointer; }
.anchor-link { display: none; }
"""


def make(folder: Path) -> Path:
    """Writes a page for README.md and for each built notebook, and gives back the first."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(build.NOTEBOOKS / "pictures", folder / "pictures", dirs_exist_ok=True)
    readme = v4.new_markdown_cell((build.NOTEBOOKS / "README.md").read_text())
    pages = {"index": v4.new_notebook(cells=[readme])}
    for source in build.SOURCES:
        path = build.NOTEBOOKS / f"{source.stem}.ipynb"
        if path.exists():
            pages[source.stem] = nbformat.read(path, as_version=4)
    names = list(pages)
    for i, (name, notebook) in enumerate(pages.items()):
        text = page(notebook, before=names[:i][-1:], after=names[i + 1 :][:1])
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder / "index.html"


def page(notebook: nbformat.NotebookNode, before: list[str], after: list[str]) -> str:
    """A notebook as a page. The template `basic` makes the body alone, without the scripts
    that other templates of nbconvert fetch from elsewhere."""
    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(notebook)
    body = body.replace('href="README.md', 'href="index.html')
    body = re.sub(r'(href="\w+)\.ipynb', r"\1.html", body)
    body = re.sub(r"<td([^>]*)>(.*?)</td>", _cell, body, flags=re.DOTALL)
    body = re.sub(_FIGURE, _described, body, flags=re.DOTALL)
    # What is left are the covers in the list of notebooks, beside the titles.
    body = body.replace('alt="No description has been provided for this image"', 'alt=""')
    title = re.match(r"# (.+)", notebook.cells[0].source)[1].replace("`", "")
    link = lambda name, text: f'<a href="{name}.html">{text}</a>'
    steps = [link(name, "← " + _short(name)) for name in before]
    steps += [link("index", "All notebooks")]
    steps += [link(name, _short(name) + " →") for name in after]
    style = HtmlFormatter(style="default").get_style_defs(".highlight") + STYLE
    return PAGE.format(
        title=html.escape(title),
        style=style,
        nav="\n".join(steps),
        contents=_contents(body),
        body=body,
    )


# A figure as nbconvert writes it, and the caption that follows.
_FIGURE = (
    r'alt="No description has been provided for this image"'
    r'( src="data:[^"]+"(?:(?!<img ).)*?<em>What to see: (.*?)</p>)'
)


def _described(match: re.Match) -> str:
    """A figure whose description is its caption, for those who do not see it."""
    caption = re.sub(r"<[^>]+>", "", match[2])
    return f'alt="{html.escape(html.unescape(caption))}"{match[1]}'


def _cell(match: re.Match) -> str:
    """A cell of a table. On a narrow screen a number is not broken at its minus sign, and a
    sentence is not squeezed into a column of single words: then the table is scrolled."""
    text = html.unescape(re.sub(r"<[^>]+>", "", match[2])).strip()
    kind = "short" if len(text) <= 10 else "long" if len(text) > 40 else ""
    kind = f' class="{kind}"' if kind else ""
    return f"<td{match[1]}{kind}>{match[2]}</td>"


def _contents(body: str) -> str:
    """Links to the sections of a page, folded."""
    sections = re.findall(r'<h2 id="([^"]+)">(.+?)<a class="anchor-link"', body)
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in sections)
    return (
        f'<details class="contents"><summary>Contents</summary><ul>{links}</ul></details>'
    )


def _short(name: str) -> str:
    return name[:2] if name != "index" else "Start"
