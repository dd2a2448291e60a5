"""What a release needs: one version, metadata, links that hold on PyPI, workflows."""

import re
import runpy

import pytest
import setuptools
import yaml
from helpers.paths import ROOT

import c2f_jax
from c2f_jax.main import main

WORKFLOWS = {
    file.stem: yaml.safe_load(file.read_text())
    for file in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
JOBS = {
    f"{name}/{job}": steps
    for name, workflow in WORKFLOWS.items()
    for job, steps in workflow["jobs"].items()
}


@pytest.fixture
def metadata(monkeypatch):
    """What setup.py passes to setuptools."""
    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_one_version(metadata, capsys):
    version = c2f_jax.__version__
    assert metadata["version"] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    (latest, *_) = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert re.fullmatch(rf"\[{version}\] - (Unreleased|\d{{4}}-\d\d-\d\d)", latest)
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0 and capsys.readouterr().out == f"c2f_jax {version}\n"


def test_links_of_the_long_description_leave_the_repository(metadata):
    text, readme = metadata["long_description"], (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) == len(re.findall(r"\]\(([^)]*)\)", readme))
    assert all(link.startswith("https://") for link in links)
    tag = f"/v{c2f_jax.__version__}/"
    inside = [link for link in links if link.startswith(metadata["url"])]
    assert len(inside) > 20
    for link in inside:
        assert (ROOT / link.partition(tag)[2].partition("#")[0]).exists(), link
    blocks = re.compile(r"```.*?```", re.S)
    assert blocks.findall(text) == blocks.findall(readme)


def test_every_folder_of_the_package_is_installed(metadata):
    with_files = {file.parent for file in (ROOT / "c2f_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in with_files}
    assert set(metadata["packages"]) == names | {"c2f_jax.configs"}


def test_the_python_versions_are_those_that_the_workflow_tests(metadata):
    versions = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]["python"]
    named = [line.rpartition(" ")[2] for line in metadata["classifiers"] if "Python :: 3." in line]
    assert versions == named and metadata["python_requires"] == f">={versions[0]}"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_a_time_limit_pinned_actions_and_least_rights(name):
    job, workflow = JOBS[name], WORKFLOWS[name.partition("/")[0]]
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]
    assert job["timeout-minutes"] <= 45
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"[\w/-]+@(release/)?v\d+", action) for action in uses)
    rights = {"docs/deploy": {"pages", "id-token"}, "release/publish": {"id-token"}}
    assert set(job.get("permissions", ())) == rights.get(name, set())
    assert ("environment" in job) == (name in rights)
    assert not (name in rights and any("run" in step for step in job["steps"]))


def test_workflows_run_files_and_folders_that_exist():
    text = "\n".join(step.get("run", "") for job in JOBS.values() for step in job["steps"])
    assert ".ci/run" in text and (ROOT / ".ci" / "run").exists()
    (path,) = re.findall(r"c2f_jax/\S+\.py", text)
    pattern = re.search(r"s/(\^__version__.*?\$)/", text)[1].replace("\\(", "(").replace("\\)", ")")
    assert re.findall(pattern, (ROOT / path).read_text(), re.M) == [c2f_jax.__version__]
