"""README and the pages of the documentation."""

import re

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page):
    """The code of the page's Python blocks, in order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
