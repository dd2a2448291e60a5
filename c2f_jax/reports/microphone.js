// A recorder for a page: one button, the seconds left, the recording to listen to. It hands over the
// WAV of wav.js.

function toBase64(bytes) {
  let letters = "";
  for (const byte of bytes) letters += String.fromCharCode(byte);
  return btoa(letters);
}

function explain(error) {
  const known = {
    NotAllowedError: "the browser does not allow this page to use the microphone",
    NotFoundError: "there is no microphone",
    EncodingError: "the browser cannot decode its own recording",
  };
  return known[error.name] || `${error.name}: ${error.message}`;
}

// Draw a recorder in an element. Calls done(wav as base64, problem), one of them empty, after each
// recording. With `once`, a second button goes on without one, and both leave with the first call.
function drawRecorder(element, seconds, done, once = false) {
  const add = (tag, words) => {
    const child = document.createElement(tag);
    child.textContent = words;
    child.style.marginRight = "0.7em";
    element.append(child);
    return child;
  };
  const button = add("button", "● Record");
  const leave = once && add("button", "Go on without");
  const line = add("span", `up to ${seconds} s`);
  let recorder = null;

  const finish = (wav, problem) => {
    button.textContent = "● Record again";
    if (once) [button, leave].forEach((each) => each.remove());
    if (problem) line.textContent = `Not recorded: ${problem}.`;
    done(wav, problem);
  };

  async function record() {
    if (!navigator.mediaDevices) {
      throw Error("a page uses the microphone only over https or from localhost");
    }
    // Raising the level would clip loud words; the model does not mind low ones.
    const audio = { echoCancellation: false, noiseSuppression: true, autoGainControl: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio });
    const pieces = [];
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = (event) => pieces.push(event.data);
    const stopped = new Promise((resolve) => (recorder.onstop = resolve));
    recorder.start();
    button.textContent = "■ Stop";
    let left = seconds;
    const count = () => {
      line.textContent = `recording, ${left} s left`;
      if (left-- <= 0 && recorder.state === "recording") recorder.stop();
    };
    count();
    const clock = setInterval(count, 1000);
    await stopped;
    clearInterval(clock);
    stream.getTracks().forEach((track) => track.stop());

    const wav = toWav(await decode(new Blob(pieces, { type: recorder.mimeType })));
    line.textContent = `${((wav.length - 44) / 2 / SAMPLE_RATE).toFixed(1)} s recorded`;
    element.querySelector("audio")?.remove();
    const player = document.createElement("audio");
    player.controls = true;
    player.style.verticalAlign = "middle";
    player.src = URL.createObjectURL(new Blob([wav], { type: "audio/wav" }));
    element.append(player);
    finish(toBase64(wav), "");
  }

  button.onclick = async () => {
    if (recorder?.state === "recording") return recorder.stop();
    try {
      await record();
    } catch (error) {
      finish("", explain(error));
    }
  };
  if (leave) leave.onclick = () => finish("", "you went on without");
}
