"""A run goes on with its data, wherever they are and however spelled, and with no other."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from c2f_jax.config.files import load_config
from c2f_jax.errors import UserError
from c2f_jax.train import train_and_evaluate

pytestmark = pytest.mark.slow
SMALL = [
    "batch_size=4", "queue_size=4", "log_every=1", "checkpoint_every=1", "eval_every=0", "eval.k=2",
    "eval.resamples=10", "data.bucket_seconds=0.5", "data.max_seconds=0.5", "data.image_size=32",
    "model.speech.depth=1", "model.image.depth=1", "data.threads=0", "method.warm_up_steps=0",
]  # fmt: skip


def test_a_run_is_resumed_with_its_data_alone(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number, split in enumerate(["train"] * 4 + ["validation"] * 2):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.normal(size=6000), 16_000)
        rows.append({"image": f"{number}.png", "audio": f"{number}.wav", "split": split})

    def train(steps):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "manifest.jsonl").write_text(lines)
        words = [*SMALL, f"steps={steps}"]
        config = load_config(
            f"manifest:{folder}/manifest.jsonl", [f"--config.{word}" for word in words]
        )
        train_and_evaluate(config, tmp_path / "run", test=False)
        return capsys.readouterr().err

    assert f"training on {folder}/manifest.jsonl, split train: 4 recordings" in train(1)
    rows[0] |= {"image": "./0.png", "caption": "new"}
    for path in list(folder.glob("*.*")):  # other files of the same content
        shutil.copyfile(path, path.with_suffix(".copy"))
        path.with_suffix(".copy").replace(path)
    assert "resuming at step 1" in train(2)

    soundfile.write(folder / "2.wav", 0.1 * rng.normal(size=6000), 16_000)
    with pytest.raises(
        UserError, match="4 recordings of 4 images now, but their files hold someth"
    ):
        train(3)
    rows[1]["image_id"] = "./0.png"
    with pytest.raises(UserError, match="with other image ids"):
        train(3)
