// A recorder for a page: one button, the seconds left, the recording to listen to. It hands over
// 16-bit PCM WAV at 16 kHz, mono, so that nothing but the browser needs a decoder of what browsers
// record (WebM, Ogg or MP4).

const SAMPLE_RATE = 16000;

// Decode a recording of any type and encode it as WAV; bytes.
async function toWav(blob) {
  // Decoding resamples to the rate of the context, and needs no permission to play sound.
  const context = new OfflineAudioContext(1, 1, SAMPLE_RATE);
  const audio = await context.decodeAudioData(await blob.arrayBuffer());
  const bytes = new DataView(new ArrayBuffer(44 + 2 * audio.length));
  const text = (offset, letters) =>
    [...letters].forEach((letter, i) => bytes.setUint8(offset + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  bytes.setUint32(4, 36 + 2 * audio.length, true);
  text(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true); // size of this chunk
  bytes.setUint16(20, 1, true); // PCM
  bytes.setUint16(22, 1, true); // channels
  bytes.setUint32(24, audio.sampleRate, true);
  bytes.setUint32(28, 2 * audio.sampleRate, true); // bytes per second
  bytes.setUint16(32, 2, true); // bytes per sample of all channels
  bytes.setUint16(34, 16, true); // bits per sample
  text(36, "data");
  bytes.setUint32(40, 2 * audio.length, true);
  const channels = Array.from({ length: audio.numberOfChannels }, (_, c) => audio.getChannelData(c));
  for (let i = 0; i < audio.length; i++) {
    const mean = channels.reduce((sum, samples) => sum + samples[i], 0) / channels.length;
    bytes.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, mean))), true);
  }
  return new Uint8Array(bytes.buffer);
}

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

    const wav = await toWav(new Blob(pieces, { type: recorder.mimeType }));
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
