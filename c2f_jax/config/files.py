"""Configurations read from files and command lines, and kept in a run's directory."""

import difflib
import json
import os

import ml_collections
from etils import epath

from c2f_jax.config.default import default_config
from c2f_jax.config.fields import flatten
from c2f_jax.errors import UserError


def save_config(config, workdir):
    """Write ``<workdir>/config.json``, or refuse a workdir that holds another experiment.

    ``steps`` and the cadences may change from run to run, so that a run can be prolonged; all else must be equal. A run
    that ended before its first checkpoint is no experiment yet: its configuration is overwritten, its record of weights
    (``pretrained.weights.check_weights``) forgotten.

    Raises:
      UserError: listing the values that differ; or the workdir cannot be written.
    """
    path = epath.Path(workdir) / "config.json"
    free = {
        "steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "parallel",
        "data.threads",
        "data.prefetch",
    }
    wanted = json.loads(config.to_json())
    if path.exists() and _has_checkpoint(workdir):
        found = flatten(load_saved_config(workdir).to_dict())
        asked, default = flatten(wanted), flatten(default_config().to_dict())
        # A value that the saved file does not know had its default.
        differing = [
            k
            for k in sorted(found.keys() | asked.keys())
            if found.get(k, default.get(k)) != asked.get(k)
        ]
        differing = [k for k in differing if k not in free]
        differing = [k for k in differing if not k.startswith("eval.")]
        if differing:
            rows = "\n".join(
                f"  {k}: {found.get(k)!r} there, {asked.get(k)!r} asked" for k in differing
            )
            raise UserError(
                f"{workdir} holds a run of another configuration:\n{rows}\n"
                "Give another --workdir, or the same values to go on with that run."
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=2) + "\n")
        if not _has_checkpoint(workdir):
            (path.parent / "weights.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error}): give a directory that can"
        ) from error


def _has_checkpoint(workdir):
    folder = epath.Path(workdir) / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def load_saved_config(workdir):
    """The ConfigDict of a training run.

    Raises:
      UserError: no run there, or an unreadable file.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(
            f"{workdir} holds no training run (no config.json): give the --workdir of `c2f train`"
        )
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except (
        ValueError,
        AttributeError,
        OSError,
    ) as error:  # not UTF-8, not JSON, not an object of JSON, not a file
        raise UserError(
            f"{path} is damaged ({error}): restore it or train into another --workdir"
        ) from error


def load_config(path, overrides=()):
    """A locked ConfigDict from ``file.py[:argument]`` with ``--config.key=value`` overrides applied.

    Raises:
      UserError: no such file, argument that it does not take, unknown key (with the nearest known one), value of
        another type.
    """
    file = path.partition(":")[0]
    if not os.path.isfile(file):
        raise UserError(
            f"--config={path}: there is no file {file}; the repository's are in configs/"
        )
    known = _keys(_read_config(path, ()))
    for word in overrides:
        key = word.partition("=")[0].removeprefix("--config.")
        if key not in known:
            inside = [name for name in known if name.startswith(f"{key}.")]
            if inside:
                raise UserError(
                    f"--config.{key} is a section: give a value of it, {', '.join(inside)}"
                )
            near = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"did you mean --config.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            )
            raise UserError(f"the configuration has no {key}: {hint}")
    return _read_config(path, overrides)


def _read_config(path, overrides):
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    values, argv = flags.FlagValues(), ["c2f", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values["config"].value
        if not isinstance(config, ConfigDict):
            raise ValueError(
                f"get_config returns {type(config).__name__}, a ConfigDict is expected"
            )
        return config
    except Exception as error:  # a configuration is a program, which may fail in any way
        # What it raises for its argument comes as the text of a traceback, whose last line tells it.
        reason = (
            (str(error).strip() or "no reason given").splitlines()[-1].removeprefix("ValueError: ")
        )
        kind = "" if isinstance(error, flags.Error | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"--config={path}: {kind}{reason}") from error


def _keys(config, prefix=""):
    keys = []
    for key, value in config.items():
        keys += _keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [prefix + key]
    return keys
