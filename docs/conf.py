"""The site of the documentation: ``tox run -e docs`` builds it into out/docs."""

from __future__ import annotations

import sys

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import ptq4dit_ao

project = "ptq4dit-ao"
author = "the ptq4dit-ao authors"
copyright = author
version = release = ptq4dit_ao.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
templates_path: list[str] = []
exclude_patterns = ["_*"]

myst_heading_anchors = 4  # the anchors that a forge gives to headings, so that links work in both
smartquotes_action = "D"  # dashes in lists of parameters; quotes stay as they are written

html_theme = "pydata_sphinx_theme"
html_title = "ptq4dit-ao"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "get_started": []}  # neither has a section to list
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 6,
}

copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False

nitpicky = True  # every name of this package that a docstring or a signature mentions has an entry
nitpick_ignore_regex = [
    ("py:.*", r"(?!ptq4dit_ao\.).*"),  # names of other packages: there is no inventory offline
    ("py:mod", r"ptq4dit_ao\..*"),  # where something is explained in the source
    ("py:class", r"ptq4dit_ao\.graph\.sites\.\w+Edit"),  # what is passed on, and not for users to make or to read
    ("py:class", r"ptq4dit_ao\.report\.types\.\w+"),  # dicts of report.json
    ("py:func", r"ptq4dit_ao\.passes\.offset\.find_shifts"),
    ("py:class", r"ptq4dit_ao\..*\.M"),  # a type variable
    (
        "py:class",
        r"ptq4dit_ao\.(.*\.)?(CallSignature|CapturedModule|ModuleLinear|LayerPlan|ArtifactSize|ImageClassifier|IntegerLinear|PerToken)",
    ),
]

PUBLIC = (
    "",
    ".calibration",
    ".lowering",
    ".metrics",
    ".ptqd",
    ".nncf",
    ".recipe",
    ".passes",
    ".quantizer",
    ".rounding",
)
PUBLIC += (".graph", ".observers", ".workflow", ".errors")


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", link_to_public_name)
    app.connect("source-read", without_empty_glob)
    app.connect("autodoc-process-docstring", without_types, priority=400)  # before napoleon


def link_to_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element) -> Element | None:
    """A signature names a class by the module that defines it; its entry stands under the name that users import."""
    if node.get("refdomain") != "py":
        return None
    *module, name = node["reftarget"].split(".")
    meant = getattr(sys.modules.get(".".join(module)), name, None)
    for public in PUBLIC:
        alias = f"ptq4dit_ao{public}.{name}"
        entry = env.domains.python_domain.objects.get(alias)
        same = not module or getattr(sys.modules.get(f"ptq4dit_ao{public}"), name, None) is meant is not None
        if entry is not None and same:
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, alias)
    return None


def without_empty_glob(app: Sphinx, page: str, source: list[str]) -> None:
    """A pattern that matches no page is a warning; the maintainers' pages are whatever stands in their folder."""
    if page == "maintainers_index" and not any(app.srcdir.glob("maintainers/*.md")):
        source[0] = source[0].replace("maintainers/*\n", "")


def without_types(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in an attribute's first line for its type; here it is a sentence."""
    if what in ("attribute", "property", "data"):
        lines[:0] = ["..", ""]  # an empty comment is the first line now
