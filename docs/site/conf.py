"""Settings of Sphinx for the site. ``build.py`` writes the pages and calls Sphinx with them."""

import ast
import re
import textwrap
from itertools import groupby
from operator import itemgetter

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

from lora_lab import __version__

project = "lora_lab"
version = release = __version__
html_title = f"{project} {version}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["download"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_default_options = {"show-inheritance": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_static_path = ["site.css", "sort.js"]
html_css_files = ["site.css"]
html_js_files = ["sort.js"]
suppress_warnings = ["myst.header"]  # lesson 00 has no parts, only sections
html_copy_source = False  # the notebooks are there with their solutions
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#00629b", "color-brand-content": "#00629b"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}
pygments_dark_style = "github-dark"

SECTIONS = ("Args", "Attributes", "Example", "Examples", "Note", "Raises", "Returns", "Warns", "Yields")


def as_mathml(formula, as_block):
    """A formula of LaTeX as MathML, which browsers draw themselves: no script, no font, nothing to load."""
    return tex2mathml(formula.replace(r"\dots", r"\ldots"), as_block=as_block)


def mathml(translator, node):
    as_block = isinstance(node, nodes.math_block)
    formula = as_mathml(node.astext(), as_block)
    translator.body.append(f'<div class="math">{formula}</div>' if as_block else formula)
    raise nodes.SkipNode


def literal_blocks(app, what, name, subject, options, lines):
    """Mark what is drawn in a docstring, such as code, lists in columns and figures, as to be shown line by line."""
    blocks = re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip("\n"))
    drawn, in_section = [], False
    for block in blocks:
        first = block.split("\n", 1)[0]
        indented = first.startswith(" ")
        in_section = in_section if indented else first.rstrip(":") in SECTIONS
        columns = len(re.findall(r"^ *[\w/]+ {2,}\S", block, re.MULTILINE)) > 1
        drawn.append((indented or columns) and not in_section)
    parts = []
    for is_drawn, group in groupby(zip(drawn, blocks, strict=True), key=itemgetter(0)):
        text = "\n\n".join(block for _, block in group)
        if is_drawn:
            text = textwrap.dedent(text)
            text = f".. code-block:: {lexer(text)}\n\n{textwrap.indent(text, 4 * ' ')}"
        else:  # several **settings in one line of Args
            text = re.sub(r"(?<![\w*`])\*\*(?=\w+[,:\s])", r"\*\*", text)
        parts.append(text)
    lines[:] = [*"\n\n".join(parts).split("\n"), ""]


def lexer(text):
    """The lexer for a text that is shown line by line."""
    try:
        ast.parse(text)
    except SyntaxError:
        return "text"
    return "python"


def setup(app):
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-docstring", literal_blocks, priority=100)  # before napoleon, at 500
