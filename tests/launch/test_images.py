"""The parts of the Dockerfiles that need no Docker."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dockerfile.gpu", "Dockerfile.tpu"])
def test_the_copied_files_make_a_wheel(name, tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    lines = (ROOT / "launch" / name).read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            *files, target = line.split()[1:]
            for file in files:
                if (ROOT / file).is_dir():
                    shutil.copytree(ROOT / file, source / target)
                else:
                    (source / target).mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / file, source / target)
    (build,) = (line for line in lines if line.startswith("RUN pip wheel"))
    options = [word for word in build.split()[3:-1] if word not in ("--wheel-dir", "/wheels")]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", tmp_path, "."], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("c2f_jax-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"c2f_jax/main.py", "c2f_jax/py.typed", "c2f_jax/configs/spoken_scenes.py"} <= set(names)
    assert any(name.startswith("c2f_jax/reports/") and name.endswith(".css") for name in names)
