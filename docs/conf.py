"""Site of the documentation: `make docs` builds it with Sphinx into build/docs."""

project = "moe-dist"
html_title = "moe-dist"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4
html_theme = "furo"
exclude_patterns = ["examples"]
