"""Settings of the site: `make docs` builds it into build/site. Building and reading it need no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import sma

project = "Sparse Modular Activation"
copyright = "the authors, Apache-2.0"
version = release = sma.__version__

extensions = [
    "myst_nb",  # includes myst_parser
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",  # the source of every name, inside the site
    "site_docstrings",
    "site_fields",
    "site_formulas",
    "site_members",
    "site_names",
    "site_pages",
]
exclude_patterns = ["_ext"]
suppress_warnings = ["config.cache"]

# A dead link, a missing heading and a reference to a name of ours that no page describes are warnings, and `make docs`
# fails on a warning. Names of other packages are not looked up: that would need a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!sma\.).*"), ("py:.*", r"sma\..*\._\w+")]
nitpick_ignore = [
    (role, f"sma.{name}")
    for name in (
        "around.Around",
        "modules.state_space.Kind",
        "pytree.Class",
        "recipes.training.graph.ResultT",
        "spec.Registered",
        "submodule.StateKind",
        "testing.examples.Module",
    )
    for role in ("py:class", "py:obj")
]  # type variables, and what a layer and its sub-modules tell each other
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_links_external_new_tab = False
nb_execution_mode = "off"  # `make notebooks` writes the outputs into the notebooks
nb_merge_streams = True

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_custom_sections = [("Shape", "notes_style"), ("Reference", "notes_style"), ("References", "notes_style")]
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

highlight_language = "bash"  # of blocks that name no language: commands

html_theme = "pydata_sphinx_theme"
html_title = "Sparse Modular Activation"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
html_sidebars = {page: [] for page in ("index", "first_hour", "concepts", "site/benchmarks", "reliability")}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "navigation_depth": 3,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
