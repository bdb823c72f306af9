"""Settings of Sphinx: ``sphinx-build -W --keep-going -b html docs build/docs``. Nothing here needs a network."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

from s2sam_jax import __version__

project = "s2sam_jax"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nitpicky = True  # a name that is not found is a warning; those of other libraries have no page here
nitpick_ignore_regex = [("py:.*", r"(collections|jax|numpy|optax|typing)\..*")]

html_theme = "furo"
html_title = f"s2sam_jax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_copyright = html_show_sphinx = html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Reference"]
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-docstring", sentences_stay_whole, priority=900)  # after napoleon
    app.connect("missing-reference", elsewhere_in_the_package)
    app.connect("doctree-read", without_last_empty_lines)


def inline_math(visitor: Any, node: nodes.math) -> None:
    visitor.body.append(mathml(node, node.astext(), "inline"))
    raise nodes.SkipNode


def block_math(visitor: Any, node: nodes.math_block) -> None:
    """In parts, cut where a wide space sets them apart."""
    parts = [mathml(node, part, "block") for part in re.split(r"\\q?quad\b", node.astext())]
    visitor.body.append(f'<div class="math"><div>{"</div><div>".join(parts)}</div></div>\n')
    raise nodes.SkipNode


def mathml(node: nodes.Node, tex: str, display: str) -> str:
    """What browsers draw themselves, without scripts."""
    text = convert(tex.strip(), display=display)
    if "\\" in text:
        logging.getLogger(__name__).warning("a command that MathML is not made from: %s", tex, location=node)
    return text.replace('<mo stretchy="false">&#x0007C;', '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;')


def sentences_stay_whole(*event: Any) -> None:
    """Napoleon takes what stands before a colon in a Returns section for a type."""
    lines = event[-1]
    lines[:] = [re.sub(r"^:returns: \*?(.+?)\*? -- ", r":returns: \1: ", line) for line in lines]


def without_last_empty_lines(_: Sphinx, doctree: nodes.document) -> None:
    """Doctests need one before the end of their block; a page does not."""
    for block in doctree.findall(nodes.literal_block):
        text = block.rawsource = block.astext().rstrip()
        block.children = [nodes.Text(text)]


def elsewhere_in_the_package(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> nodes.Element | None:
    """``:func:`select``` in a docstring of ``s2sam_jax.methods`` means that of ``s2sam_jax``."""
    if node["refdomain"] != "py":
        return None
    node["refspecific"] = True  # found by the end of its name
    domain, target = env.domains.python_domain, node["reftarget"]
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, contnode)
