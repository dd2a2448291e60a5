"""README and the pages of the documentation."""

import re

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page, fence="python"):
    """The code of the page's Python blocks, in order; "py" marks those that need what a page cannot
    have, which tests put in its place."""
    return re.findall(rf"```{fence}\n(.*?)```", page.read_text(), re.DOTALL)
