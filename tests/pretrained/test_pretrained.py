"""Published weights: reading them safely, names, the card, errors."""

import collections
import json
import pickle
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from helpers.tiny_whisper import WHISPER, whisper_tensors
from safetensors.numpy import save_file

from c2f_jax.errors import UserError
from c2f_jax.main import main
from c2f_jax.pretrained.families import find_layout
from c2f_jax.pretrained.networks import bare_tower, tower_shapes
from c2f_jax.pretrained.tensors import read_tensors, weight_files
from c2f_jax.pretrained.weights import (
    check_weights,
    convert,
    load_card,
    load_weights,
    open_card,
)


@pytest.fixture
def published(tmp_path):
    """A folder as published."""
    folder = tmp_path / "published"
    folder.mkdir()
    tensors = whisper_tensors()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(WHISPER))
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    return folder, tensors


def test_command_writes_a_checkpoint_and_a_card(published, tmp_path, capsys):
    folder, tensors = published
    output = tmp_path / "converted"
    assert main(["convert", str(folder), f"--output={output}"]) == 0
    assert "Hugging Face Whisper" in capsys.readouterr().out
    card = load_card(output)
    assert card["license"] == "mit" and card["preprocessing"] == {
        "sample_rate": 16_000,
        "normalize": False,
    }
    assert (
        len(card["source"][0]["sha256"]) == 64 and card["source"][0]["file"] == "model.safetensors"
    )
    params = load_weights(output)
    # Keys have no bias in the file: ours are zeros, 2 layers of 8.
    assert card["parameters"] == sum(x.size for x in tensors.values()) + 16
    assert sum(x.size for x in jax.tree.leaves(params)) == card["parameters"]
    block, source = params["transformer"]["block_1"], "model.encoder.layers.1."
    np.testing.assert_array_equal(block["mlp_in"]["kernel"], tensors[source + "fc1.weight"].T)
    query = tensors[source + "self_attn.q_proj.weight"].T.reshape(8, 2, 4)
    np.testing.assert_array_equal(block["self_attention"]["query"]["kernel"], query)
    out = tensors[source + "self_attn.out_proj.weight"].T.reshape(2, 4, 8)
    np.testing.assert_array_equal(block["self_attention"]["out"]["kernel"], out)
    np.testing.assert_array_equal(block["self_attention"]["key"]["bias"], np.zeros((2, 4)))
    np.testing.assert_array_equal(
        params["conv_0"]["kernel"], tensors["model.encoder.conv1.weight"].transpose(2, 1, 0)
    )
    # Published files serve without conversion too.
    jax.tree.map(np.testing.assert_array_equal, load_weights(folder), params)
    assert open_card(folder)["tower"] == card["tower"]
    assert main(["convert", str(folder), f"--output={output}"]) == 2
    assert "holds converted weights already" in capsys.readouterr().err


def test_a_card_in_the_old_spelling_is_read(published, tmp_path):
    folder, _ = published
    card = convert([folder], tmp_path / "out")
    path = tmp_path / "out" / "card.json"
    old = path.read_text().replace('"license"', '"licence"').replace('"normalize"', '"normalise"')
    assert "licence" in old and "normalise" in old
    path.write_text(old)
    assert load_card(tmp_path / "out") == {"format": 1} | card


def test_missing_unused_misshaped_and_damaged_tensors_are_all_listed(published, tmp_path):
    folder, tensors = published
    del tensors["model.encoder.layers.0.fc1.bias"]
    tensors["model.encoder.extra"] = np.zeros(3, np.float32)
    tensors["model.encoder.layers.1.fc2.weight"] = np.zeros((8, 13), np.float32)
    tensors["model.encoder.layers.1.fc2.bias"] = np.zeros(
        (2, 4), np.float32
    )  # as many entries, another shape
    tensors["model.encoder.conv1.bias"][0] = np.nan
    tensors["model.decoder.anything"] = np.zeros(
        3, np.float32
    )  # the half that is known and not needed
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        convert([folder], tmp_path / "out")
    message = str(error.value)
    assert (
        message.startswith(f"{folder}: ")
        and "tensors that do not fit: 5\n" in message
        and "decoder" not in message
    )
    assert "missing: model.encoder.layers.0.fc1.bias" in message
    assert "unused: model.encoder.extra (3,)" in message
    assert "misshaped: model.encoder.layers.1.fc2.weight (8, 13)" in message
    assert "misshaped: model.encoder.layers.1.fc2.bias (2, 4)" in message
    assert "damaged: 1 of the 8 entries of model.encoder.conv1.bias are NaN or infinite" in message
    assert not (tmp_path / "out").exists()


def test_shards_with_an_index_are_one_model(published, tmp_path):
    folder, tensors = published
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    shards = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for shard, own in shards.items():
        save_file({n: tensors[n] for n in own}, folder / shard)
    index = {"weight_map": {n: shard for shard, own in shards.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    card = convert([folder], tmp_path / "out")
    assert [s["file"] for s in card["source"]] == sorted(shards)
    with pytest.raises(
        UserError, match="holds model.encoder.conv1.bias, which another given file holds too"
    ):
        convert([folder / "model-00001-of-00002.safetensors"] * 2, tmp_path / "twice")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError,
        match="lacks model-00002-of-00002.safetensors, which model.safetensors.index.json",
    ):
        convert([folder], tmp_path / "incomplete")


def test_a_damaged_index_a_short_configuration_and_an_unwritable_output_are_named(
    published, tmp_path
):
    folder, _ = published
    with pytest.raises(UserError, match="README.md cannot be written"):
        convert([folder], folder / "README.md")
    # Before anything is read: there are no such weights.
    for place, problem in (("/proc/x/y", "cannot be written"), ("gs://bucket/x", "on a disk")):
        with pytest.raises(UserError, match=f"--output={place}.*{problem}"):
            convert(["nowhere"], place)
    for config, message in (
        ('{"model_type": "whisper"}', "Hugging Face Whisper: config.json has no d_model"),
        (
            json.dumps(WHISPER | {"d_model": None}),
            "Hugging Face Whisper: config.json has no d_model",
        ),
        ("[]", "config.json: must hold values by name"),
        ("{", "config.json: not JSON"),
    ):
        (folder / "config.json").write_text(config)
        with pytest.raises(UserError, match=message):
            convert([folder], tmp_path / "out")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: not an index of shards .*weight_map"):
        convert([folder], tmp_path / "out")


def test_the_normalisation_flag_is_for_networks_that_have_one(published, tmp_path):
    folder, _ = published
    with pytest.raises(
        UserError, match="--normalize is for wav2vec 2.0, HuBERT and WavLM; Hugging Face Whisper"
    ):
        convert([folder], tmp_path / "out", normalize=True)


def test_hub_ids_need_the_client_and_a_network(tmp_path, monkeypatch, published):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"owner/name: no such path; hub ids need the extra: pip install"
    ):
        convert(["owner/name"], "out")
    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)

    def no_network(*_, **__):
        raise ConnectionError("Name or service not known")

    hub.snapshot_download = no_network
    with pytest.raises(
        UserError,
        match=r"owner/name: neither a local path nor a hub id .*Name or service not known",
    ):
        convert(["owner/name"], "out")
    hub.snapshot_download = lambda source, allow_patterns: published[0]
    card = convert(["owner/name"], "out")
    assert card["source"][0]["given"] == "owner/name" and card["license"] == "mit"


def write_torch(path, stored):
    """A file in PyTorch's zip format; ``stored`` holds arrays as tensors and any other picklable
    objects."""
    arrays = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", value.kind, value.key, "cpu", value.count)
            return None

        def reducer_override(self, value):
            if isinstance(value, np.ndarray):
                kind = getattr(
                    modules["torch"],
                    {"float32": "FloatStorage", "float16": "HalfStorage"}[str(value.dtype)],
                )
                arrays.append(value)
                storage = Storage(kind, str(len(arrays) - 1), value.size)
                strides = tuple(s // value.itemsize for s in value.strides)
                rebuild = modules["torch._utils"]._rebuild_tensor_v2
                return rebuild, (storage, 0, value.shape, strides, False, collections.OrderedDict())
            return NotImplemented

    class Storage:
        def __init__(self, kind, key, count):
            self.kind, self.key, self.count = kind, key, count

    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for module, name in (
        ("torch", "FloatStorage"),
        ("torch", "HalfStorage"),
        ("torch._utils", "_rebuild_tensor_v2"),
    ):
        stub = type(name, (), {"__module__": module, "__qualname__": name})
        setattr(modules[module], name, stub)
    saved = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("archive/data.pkl", "w") as file:
                Pickler(file, protocol=2).dump(stored)
            for number, array in enumerate(arrays):
                archive.writestr(f"archive/data/{number}", array.tobytes())
    finally:
        for name, module in saved.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


class Exploit:
    """Runs a command when it is unpickled by the standard unpickler."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_torch_files_are_read_without_running_their_code(tmp_path):
    tensors = whisper_tensors() | {"half": np.arange(6, dtype=np.float16).reshape(2, 3)}
    trap = tmp_path / "trap"
    stored = {
        "model": collections.OrderedDict(tensors),
        "args": Exploit(trap),
        "cfg": {"task": {"normalize": True}},
    }
    write_torch(tmp_path / "model.pt", stored)
    found, settings = read_tensors(tmp_path / "model.pt")
    assert not trap.exists() and settings["task"]["normalize"] is True
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    write_torch(tmp_path / "good.pt", {"w": np.zeros((2, 3), np.float32)})
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad,
    ):
        data = good.read("archive/data.pkl").replace(
            b"K\x02K\x03\x86", b"K\x63K\x03\x86"
        )  # 99 x 3 instead of 2 x 3
        assert data != good.read("archive/data.pkl")
        bad.writestr("archive/data.pkl", data)
        bad.writestr("archive/data/0", good.read("archive/data/0"))
    with pytest.raises(UserError, match="beyond its storage"):
        read_tensors(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "content, message",
    [(b"nonsense", "not PyTorch's zip format"), (b"", "not PyTorch's zip format")],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_tensors(path)
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="weights.safetensors: cannot be read as weights"):
        read_tensors(tmp_path / "weights.safetensors")
    with pytest.raises(
        UserError, match="must hold one file that ends in .*; found weights.pt, weights.safetensors"
    ):
        weight_files(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        weight_files(tmp_path / "nowhere")


def test_unknown_networks_and_missing_cards_are_named(tmp_path):
    with pytest.raises(UserError, match="no known network: its tensors begin with a.weight"):
        find_layout({"a.weight": np.zeros(1)})
    with pytest.raises(UserError, match="holds no converted weights"):
        load_card(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_card(tmp_path / "nowhere")


def test_a_run_refuses_other_weights(published, tmp_path):
    folder, tensors = published
    check_weights(tmp_path, {"speech": str(folder)}, write=True)
    check_weights(tmp_path, {"speech": str(folder)})
    other = tmp_path / "other"
    other.mkdir()
    save_file(whisper_tensors(seed=1), other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(WHISPER))
    with pytest.raises(
        UserError, match=r"trained with other weights than model\.speech\.weights names"
    ):
        check_weights(tmp_path, {"speech": str(other)})


def test_weights_of_another_network_do_not_fit(published):
    folder, _ = published
    tower = bare_tower(open_card(folder))
    with pytest.raises(UserError, match="do not fit the model's .tower."):
        load_weights(folder, tower_shapes(tower | {"depth": 1}, {}))
    with pytest.raises(
        UserError, match=r"mlp_in/bias has the shape \(12,\), the model needs \(16,\)"
    ):
        load_weights(folder, tower_shapes(tower | {"mlp_ratio": 2.0}, {}))
