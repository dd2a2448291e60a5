"""README: its blocks, its links, and its size."""

import re

from helpers.pages import python_blocks
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_first_two_bash_blocks_are_the_job_and_the_tests():
    job, tests = re.findall(r"```bash\n(.*?)```", README, re.S)[:2]
    assert "c2f train" in job and "c2f search" in job and "pytest" in tests
    for block in (job, tests):
        assert "venv" in block and "pip install" in block


def test_links_and_images_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_headings_that_links_name_exist():
    for page, anchor in re.findall(r"\]\(([\w/]+\.md)#([\w-]+)\)", README):
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
        anchors = [
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
        ]
        assert anchor in anchors, f"{page} has no heading #{anchor}"


def test_the_losses_are_twelve_lines():
    (code,) = python_blocks(ROOT / "README.md")
    start = code.index("def loss")
    assert len(code[start : code.index("\n\n", start)].splitlines()) <= 12


def test_readme_is_one_page():
    assert len(README.split()) < 1000 and len(README.encode()) < 6500
