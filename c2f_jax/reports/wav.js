// Recordings of browsers (WebM, Ogg or MP4) as 16-bit PCM WAV at 16 kHz, mono, so that nothing but
// the browser needs a decoder of them.

const SAMPLE_RATE = 16000;

// Decode audio of any type as 16 kHz mono samples.
async function decode(blob) {
  // Decoding resamples to the rate of the context, and needs no permission to play sound.
  const context = new OfflineAudioContext(1, 1, SAMPLE_RATE);
  const audio = await context.decodeAudioData(await blob.arrayBuffer());
  const channels = Array.from({ length: audio.numberOfChannels }, (_, c) => audio.getChannelData(c));
  return Float32Array.from(
    channels[0],
    (_, i) => channels.reduce((sum, samples) => sum + samples[i], 0) / channels.length,
  );
}

// Encode samples as WAV; bytes.
function toWav(samples) {
  const bytes = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (offset, letters) =>
    [...letters].forEach((letter, i) => bytes.setUint8(offset + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  bytes.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true); // size of this chunk
  bytes.setUint16(20, 1, true); // PCM
  bytes.setUint16(22, 1, true); // channels
  bytes.setUint32(24, SAMPLE_RATE, true);
  bytes.setUint32(28, 2 * SAMPLE_RATE, true); // bytes per second
  bytes.setUint16(32, 2, true); // bytes per sample
  bytes.setUint16(34, 16, true); // bits per sample
  text(36, "data");
  bytes.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) =>
    bytes.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true),
  );
  return new Uint8Array(bytes.buffer);
}
