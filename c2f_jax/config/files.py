"""Read configurations from files and the command line; keep them in the directory of a run."""

import json
import os
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from c2f_jax.config import fields, options
from c2f_jax.config.default import default_config
from c2f_jax.errors import UserError

# A run can be resumed with other values of these; options of `eval` can change too.
CAN_CHANGE = frozenset(
    {
        "steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "max_skipped_steps",
        "parallel",
        "data.threads",
        "data.prefetch",
    }
)
# Removed options that saved runs may have, with the value that has no effect.
REMOVED = {"method": {"momentum_half_life": None, "sic_weight": 1.0}}


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with the package: their names and files."""
    package = Path(__file__).parents[1]
    folder = package / "configs"  # as installed from a wheel
    if not folder.is_dir():
        folder = package.parent / "configs"  # in a clone
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def load_config(config: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Read a configuration and apply overrides.

    Args:
      config: a shipped configuration, such as ``spoken_scenes``, or a file with a function
        ``get_config``. What follows a colon is the argument of ``get_config``:
        ``spoken_scenes:crowded``, ``my_config.py:argument``.
      overrides: words such as ``--config.optimizer.learning_rate=3e-4``.

    Returns:
      The configuration, locked: assigning an option that does not exist raises.

    Raises:
      UserError: if the configuration does not exist or fails, or an option does not exist or has
        another type.
    """
    values = _call_get_config(config)
    for word in overrides:
        _override(values, word)
    return values.lock()


def save_config(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Write ``<workdir>/config.json``, unless the workdir holds another experiment.

    A run can be prolonged, so ``CAN_CHANGE`` and ``eval`` may differ from run to run. A run that
    ended before its first checkpoint is no experiment yet: its configuration and its record of
    weights (see ``pretrained.weights.check_weights``) are overwritten.

    Raises:
      UserError: if the workdir holds another experiment, with the options that differ, or cannot be
        written.
    """
    path = epath.Path(workdir) / "config.json"
    if path.exists() and _has_checkpoint(workdir):
        rows = _differences(load_saved_config(workdir), config)
        if rows:
            raise UserError(
                f"{workdir} holds a run with another configuration:\n" + "\n".join(rows) + "\n"
                "Give another --workdir, or the same values to resume that run."
            )

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
        if not _has_checkpoint(workdir):
            (path.parent / "weights.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error}): give another directory"
        ) from error


def load_saved_config(workdir: str | os.PathLike) -> ConfigDict:
    """Read the configuration of a training run.

    Raises:
      UserError: if there is no run or its file cannot be read.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(
            f"{workdir} holds no training run (no config.json): give the --workdir of `c2f train`"
        )
    try:
        values = json.loads(path.read_text())
        for section, options_removed in REMOVED.items():
            for name, neutral in options_removed.items():
                if values.get(section, {}).get(name, "") == neutral:
                    del values[section][name]
        return ConfigDict(values)
    except (ValueError, AttributeError, OSError) as error:  # not text, not JSON, not a file
        raise UserError(
            f"{path} is damaged ({error}): restore it or train into another --workdir"
        ) from error


def _has_checkpoint(workdir: str | os.PathLike) -> bool:
    """Return whether a run has saved a checkpoint."""
    folder = epath.Path(workdir) / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _differences(saved: ConfigDict, wanted: ConfigDict) -> list[str]:
    """Return a line for each option that must be equal and is not."""
    found = fields.flatten(json.loads(saved.to_json()))
    asked = fields.flatten(json.loads(wanted.to_json()))
    default = fields.flatten(json.loads(default_config().to_json()))

    rows = []
    for key in sorted(found.keys() | asked.keys()):
        if key in CAN_CHANGE or key.startswith("eval."):
            continue
        # An option that the saved file does not have had its default.
        there = found.get(key, default.get(key))
        if there != asked.get(key):
            rows.append(f"  {key}: {there!r} there, {asked.get(key)!r} given")
    return rows


def _call_get_config(given: str) -> ConfigDict:
    """Run a configuration file and call its ``get_config``."""
    name, colon, argument = given.partition(":")
    shipped = shipped_configs()
    file = str(shipped.get(name, name))
    if not os.path.isfile(file):
        raise UserError(
            f"--config={given}: there is no file {name}: give a file (.py) or one of "
            f"{', '.join(shipped)}"
        )

    # A configuration is a program, which can fail in any way.
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise ValueError("the file has no function get_config")
        config = get_config(argument) if colon else get_config()
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"--config={given}: {reason}") from error

    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={given}: get_config returns {type(config).__name__}: must be a ConfigDict"
        )
    return config


def _override(config: ConfigDict, word: str) -> None:
    """Apply one override to a configuration."""
    key, equals, text = word.removeprefix("--config.").partition("=")
    kinds = _option_types(config)

    # Name the section or the nearest option if there is no such option.
    inside = [name for name in kinds if name.startswith(f"{key}.")]
    if inside and key not in kinds:
        raise UserError(f"--config.{key} is a section: set one of {', '.join(inside)}")
    fields.check_known(key, list(kinds), "--config.")
    if not equals:
        raise UserError(f"--config.{key} has no value: write --config.{key}=VALUE")

    # The value has the option's type, but perhaps not that of the value before, such as None.
    value = fields.parse(f"--config.{key}", text, kinds[key])
    *path, name = key.split(".")
    section = config
    for part in path:
        section = section[part]
    with section.ignore_type(), section.unlocked():
        section[name] = value


def _option_types(config: ConfigDict) -> dict[str, Any]:
    """Return the type of each option of a configuration, by its dotted name.

    The options of a published network are not known here: they have the type of their value.
    """
    encoders = {part: config.model[part].get("name") for part in options.ENCODERS}
    kinds = {}
    for where, section in options.sections(encoders).items():
        for name, option in section.items():
            kinds[fields.dotted(where, name)] = option.type
    for key, value in fields.flatten(config.to_dict()).items():
        kinds.setdefault(key, type(value))
    return kinds
