"""Record from the microphone of the browser that shows a notebook: Jupyter and Colab."""

import base64
import io
import sys
from functools import cache
from importlib import resources
from os import PathLike
from types import SimpleNamespace
from typing import Any

from c2f_jax.errors import UserError, missing_extra

SILENCE_DB = 30  # what is that much weaker than the loudest moment is silence

# What follows microphone.js: in Jupyter, the module of a widget; in Colab, the end of a function.
_WIDGET = """
export default {
  render({ model, el }) {
    drawRecorder(el, model.get("seconds"), (wav, problem) => {
      model.set({ wav, problem });
      model.save_changes();
    });
  },
};
"""
_COLAB = """
  const element = document.createElement("div");
  document.body.append(element);
  const recorded = new Promise((resolve) =>
    drawRecorder(element, %g, (wav, problem) => resolve({ wav, problem }), true));
  google.colab.output.setIframeHeight?.(80, true);
  return await recorded;
"""


class Recording:
    """What a recorder has recorded; in Jupyter, it changes with each press of the button.

    Attributes:
      source: where ``wav`` (base64) and ``problem`` are found.
    """

    def __init__(self, source: Any) -> None:
        self.source = source

    @property
    def problem(self) -> str:
        """Why there is no recording; empty if there is one."""
        if self.source.wav:
            return ""
        return self.source.problem or "the recorder was not used"

    @property
    def wav(self) -> bytes:
        """The content of a WAV file, 16 bits at 16 kHz, mono; empty without a recording."""
        return base64.b64decode(self.source.wav)

    def save(self, path: str | PathLike[str]) -> str:
        """Write the recording to a WAV file, without the silence before and after the speech.

        A model that was trained on speech alone does not know silence, and ranks by it too.

        Returns:
          The path, for ``Query(audio=[...])``.

        Raises:
          UserError: there is no recording, or no sound in it.
        """
        if not self.wav:
            raise UserError(
                f"nothing was recorded ({self.problem}): press Record in the cell above"
            )
        import librosa
        import soundfile

        samples, rate = soundfile.read(io.BytesIO(self.wav), dtype="float32")
        _, (start, end) = librosa.effects.trim(samples, top_db=SILENCE_DB)
        if start >= end or not samples.any():
            raise UserError("the recording is silent: choose another microphone and record again")
        margin = rate // 20
        soundfile.write(path, samples[max(start - margin, 0) : end + margin], rate)
        return str(path)

    def __repr__(self) -> str:
        seconds = max(len(self.wav) - 44, 0) / 2 / 16_000
        return f"Recording({seconds:.1f} s)" if self.wav else f"Recording({self.problem})"


def record(seconds: float = 6) -> Recording:
    """Show a recorder in a notebook.

    In Colab, the cell waits for the recording or for "Go on without". In Jupyter, a kernel hears
    nothing while a cell runs: the recording is there for the next cell.

    Args:
      seconds: the longest recording.

    Returns:
      What is recorded.

    Raises:
      UserError: outside of a notebook, or without the extra `notebook` in Jupyter.
    """
    if "google.colab" in sys.modules:
        from google.colab import output

        body = _script() + _COLAB % seconds
        return Recording(SimpleNamespace(**output.eval_js(f"(async () => {{\n{body}\n}})()")))

    # A kernel has loaded IPython; a script may not have it.
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        raise UserError("record() needs a notebook: elsewhere, give Query(audio=[...]) a file")
    widget = _widget_class()(seconds=seconds)
    ipython.display.display(widget)
    return Recording(widget)


@cache
def _script() -> str:
    files = resources.files("c2f_jax.reports")
    return "\n".join(files.joinpath(n).read_text("utf-8") for n in ("wav.js", "microphone.js"))


@cache
def _widget_class() -> type:
    """Return the class of the widget; defining it imports the extra `notebook`."""
    try:
        import anywidget
    except ModuleNotFoundError as error:
        raise UserError(missing_extra("record()", error)) from error
    import traitlets

    class Recorder(anywidget.AnyWidget):
        _esm = _script() + _WIDGET
        seconds = traitlets.Float(6).tag(sync=True)
        wav = traitlets.Unicode("").tag(sync=True)
        problem = traitlets.Unicode("").tag(sync=True)

        def __repr__(self) -> str:
            return "A recorder, where this notebook is open in a browser."

    return Recorder
