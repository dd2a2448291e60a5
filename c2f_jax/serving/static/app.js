// The page of `c2f serve`: record or choose a query, show its answers, explain one of them.
// decode and toWav are those of wav.js.

const TOP = 6;
const $ = (id) => document.getElementById(id);
const page = { about: null, queries: [], current: null, recorder: null, maps: new Map(), turn: 0 };

// Recording

const MICROPHONE_PROBLEMS = {
  NotAllowedError: "The browser does not allow this page to use the microphone.",
  NotFoundError: "There is no microphone.",
};

async function record() {
  if (page.recorder) {
    if (page.recorder.state === "recording") page.recorder.stop();
    return;
  }
  if (!navigator.mediaDevices) return warnOfAddress();
  page.recorder = { state: "starting" }; // a second press must not open a second microphone
  let stream;
  try {
    // Raising the level would clip loud words; the model does not mind low ones.
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    stream = await navigator.mediaDevices.getUserMedia({ audio });
    const samples = await decode(await takeDown(stream));
    await ask(new Blob([toWav(samples)], { type: "audio/wav" }), "image", `Recording ${page.queries.length + 1}`, samples);
  } catch (error) {
    warn(MICROPHONE_PROBLEMS[error.name] || `Not recorded: ${error.message}`);
  } finally {
    stream?.getTracks().forEach((track) => track.stop());
    page.recorder = null;
    $("record").textContent = "Record";
    $("record").classList.remove("on");
  }
}

// Record a stream until it is stopped, or is as long as the model hears.
async function takeDown(stream) {
  const pieces = [];
  const recorder = (page.recorder = new MediaRecorder(stream));
  recorder.ondataavailable = (event) => pieces.push(event.data);
  const stopped = new Promise((resolve) => (recorder.onstop = resolve));
  recorder.start();
  warn("");
  $("record").textContent = "Stop";
  $("record").classList.add("on");
  const began = performance.now();
  const clock = setInterval(() => {
    const seconds = (performance.now() - began) / 1000;
    $("state").textContent = `recording, ${seconds.toFixed(0)} of ${page.about.max_seconds} s`;
    if (seconds >= page.about.max_seconds && recorder.state === "recording") recorder.stop();
  }, 100);
  await stopped;
  clearInterval(clock);
  $("state").textContent = "";
  return new Blob(pieces, { type: recorder.mimeType });
}

function warnOfAddress() {
  const port = location.port ? `:${location.port}` : "";
  warn(
    `Browsers allow the microphone only at localhost or over HTTPS. On the machine of the server ` +
      `open http://localhost${port}; from another, forward its port with ssh -L and open the same ` +
      `address. Files can be chosen here.`,
  );
}

function warn(text) {
  $("warning").textContent = text;
  $("warning").hidden = !text;
}

// Asking

async function call(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw Error("The server does not answer.");
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw Error(problem.detail || `The server answered ${response.status}.`);
  }
  return response.json();
}

// Send a query; the coarse answers are shown while SIM works on the fine ones.
async function ask(blob, find, label, samples = null) {
  const query = { blob, find, label, samples, coarse: null, fine: null };
  const turn = ++page.turn;
  const isLast = () => turn === page.turn;
  warn("");
  page.current = query;
  showQuery(query);
  $("state").textContent = "searching";
  try {
    const options = { method: "POST", body: blob };
    const found = await call(`api/search?find=${find}&rerank=0&top=${TOP}`, options);
    Object.assign(query, { coarse: found.coarse, id: found.query, notes: found.notes });
    page.queries.push(query);
    showHistory();
    if (isLast()) showQuery(query);
    if (page.about.rerank) {
      query.fine = (await call(`api/queries/${found.query}/answers?top=${TOP}`)).answers;
      if (isLast()) showQuery(query);
    }
  } catch (error) {
    if (isLast()) warn(error.message);
  } finally {
    if (isLast()) $("state").textContent = "";
  }
}

async function askWithFile(file) {
  const isImage = file.type.startsWith("image/");
  const find = isImage ? "speech" : "image";
  if (!page.about.find[find]) {
    const served = page.about.find.image ? "recordings" : "images";
    return warn(`This server is asked with ${served}.`);
  }
  // What the browser cannot decode, the server perhaps can; then there is no waveform.
  const samples = isImage ? null : await decode(file).catch(() => null);
  await ask(file, find, file.name, samples);
}

// Showing

function showQuery(query) {
  page.current = query;
  const isImage = query.find === "speech";
  $("query").hidden = false;
  query.url ||= URL.createObjectURL(query.blob);
  $("asked").hidden = !isImage;
  $("player").hidden = isImage;
  const target = isImage ? $("asked") : $("player");
  if (target.src !== query.url) target.src = query.url;
  $("wave").hidden = !query.samples;
  if (query.samples) drawWave($("wave"), query.samples);
  $("notes").textContent = [query.label, ...(query.notes || [])].join(" · ");
  $("found").hidden = !query.coarse;
  $("fine-column").hidden = !page.about.rerank;
  if (query.coarse) showAnswers($("coarse"), query, query.coarse);
  if (query.fine) showAnswers($("fine"), query, query.fine);
  else $("fine").replaceChildren(element("li", "…", "empty"));
}

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

// Lines of scores: the probability of a match if it is known, else its log-odds.
function scores(answer) {
  const lines = [`cosine ${answer.cosine.toFixed(2)}`];
  if (answer.probability != null) lines.push(`match ${(100 * answer.probability).toFixed(0)} %`);
  else if (answer.match_logit != null) {
    lines.push(`match logit ${answer.match_logit >= 0 ? "+" : ""}${answer.match_logit.toFixed(1)}`);
  }
  return lines.map((line) => element("span", line));
}

const itemUrl = (query, answer, what) => `api/items/${answer.row}/${what}?find=${query.find}`;
const nameOf = (answer) => answer.metadata.caption || answer.name.split("/").pop();

function showAnswers(list, query, answers) {
  const made = answers.map((answer, place) => {
    const button = element("button", "", "answer");
    button.type = "button";
    if (query.find === "image") {
      const image = element("img");
      image.src = itemUrl(query, answer, "thumbnail");
      image.alt = nameOf(answer);
      button.append(image);
    }
    button.append(element("b", `${place + 1}. ${nameOf(answer)}`), ...scores(answer));
    button.onclick = () => showDetail(query, answer);
    const item = element("li");
    item.append(button);
    return item;
  });
  list.replaceChildren(...(made.length ? made : [element("li", "Nothing matches.", "empty")]));
}

function showHistory() {
  $("past").hidden = page.queries.length < 2;
  const made = page.queries.map((query) => {
    const button = element("button", query.label);
    button.type = "button";
    button.onclick = () => {
      page.turn++; // an answer that is still to come must not replace this one
      $("state").textContent = "";
      showQuery(query);
    };
    const item = element("li");
    item.append(button);
    return item;
  });
  $("history").replaceChildren(...made.reverse());
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

// Draw a waveform and, over it, a weight from 0 to 1 for each of T equal parts.
function drawWave(canvas, samples, weights = null) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  if (weights) {
    context.fillStyle = color("--accent");
    weights.forEach((weight, t) => {
      context.globalAlpha = 0.75 * weight;
      context.fillRect((t * width) / weights.length, 0, width / weights.length, height);
    });
    context.globalAlpha = 1;
  }
  context.fillStyle = color("--ink");
  const loudest = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 1e-4);
  for (let x = 0; x < width; x += 2) {
    const part = samples.subarray((x * samples.length) / width, ((x + 2) * samples.length) / width);
    const peak = part.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0) / loudest;
    context.fillRect(x, (height / 2) * (1 - peak), 1.4, Math.max(1, peak * height));
  }
}

// One answer, and what SIM joined

async function showDetail(query, answer) {
  page.detail = { query, answer };
  const isImage = query.find === "image";
  $("title").textContent = nameOf(answer);
  $("shown").hidden = false;
  $("patches").replaceChildren();
  $("joined").hidden = true;
  $("heard").hidden = isImage;
  $("backwards").hidden = !(isImage && page.about.find.speech);
  // A file that was moved away, or that the browser cannot show, has its thumbnail.
  const shown = isImage ? $("large") : $("heard");
  shown.onerror = () => {
    shown.onerror = null;
    shown.src = itemUrl(query, answer, "thumbnail");
  };
  shown.src = itemUrl(query, answer, "media");
  if (!isImage) $("large").src = query.url;
  const facts = { ...answer.metadata, cosine: answer.cosine.toFixed(3), "place by cosine": answer.coarse_place };
  if (answer.match_logit != null) facts["match logit"] = answer.match_logit.toFixed(2);
  if (answer.probability != null) facts["match probability"] = `${(100 * answer.probability).toFixed(1)} %`;
  $("metadata").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]),
  );
  if (!$("detail").open) $("detail").showModal();
  if (page.about.attention) await showAttention(query, answer);
}

async function showAttention(query, answer) {
  const url = `api/queries/${query.id}/attention/${answer.row}`;
  let map, samples;
  try {
    map = page.maps.get(url) || (await call(url));
    page.maps.set(url, map);
    samples = query.samples;
    if (query.find === "speech") {
      samples = await decode(await (await fetch(itemUrl(query, answer, "thumbnail"))).blob());
    }
  } catch {
    return; // the answer itself is shown
  }
  if (page.detail.answer !== answer || !samples) return;
  const heard = samples.subarray(
    Math.round(map.start * SAMPLE_RATE),
    Math.round((map.start + map.seconds) * SAMPLE_RATE),
  );
  const [rows, columns] = map.grid;
  $("patches").style.grid = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  $("patches").replaceChildren(...Array.from({ length: rows * columns }, () => element("i")));
  $("joined").hidden = false;
  drawWave($("moments"), heard);
  linkMoments(map, heard);
}

// From 0 for the smallest value to 1 for the largest.
function stretch(values) {
  const least = Math.min(...values);
  const range = Math.max(...values) - least || 1;
  return values.map((value) => (value - least) / range);
}

function linkMoments(map, heard) {
  const cells = [...$("patches").children];
  const light = (weights) =>
    cells.forEach((cell, p) => {
      cell.style.background = weights ? `rgb(255 120 0 / ${(0.7 * weights[p] ** 1.5).toFixed(3)})` : "";
    });
  const moments = $("moments");
  moments.onpointermove = moments.onpointerdown = (event) => {
    const box = moments.getBoundingClientRect();
    const share = Math.min(0.9999, Math.max(0, (event.clientX - box.left) / box.width));
    const t = Math.floor(share * map.weights.length);
    light(stretch(map.weights[t]));
    drawWave(moments, heard, map.weights.map((_, other) => (other === t ? 1 : 0)));
  };
  $("patches").onpointermove = $("patches").onpointerdown = (event) => {
    const box = $("patches").getBoundingClientRect();
    const place = (part, size, count) => Math.min(count - 1, Math.max(0, Math.floor((part / size) * count)));
    const row = place(event.clientY - box.top, box.height, map.grid[0]);
    const p = row * map.grid[1] + place(event.clientX - box.left, box.width, map.grid[1]);
    drawWave(moments, heard, stretch(map.weights.map((line) => line[p])));
    light(cells.map((_, other) => (other === p ? 1 : 0)));
  };
  moments.onpointerleave = $("patches").onpointerleave = () => {
    light(null);
    drawWave(moments, heard);
  };
}

async function askBackwards() {
  const { query, answer } = page.detail;
  $("detail").close();
  let response = await fetch(itemUrl(query, answer, "media"));
  if (!response.ok) response = await fetch(itemUrl(query, answer, "thumbnail"));
  await ask(await response.blob(), "speech", nameOf(answer));
}

// Keys and drops

function moveFocus(step) {
  const answers = [...document.querySelectorAll(".answer")];
  const at = answers.indexOf(document.activeElement);
  answers[at < 0 ? 0 : Math.min(answers.length - 1, Math.max(0, at + step))]?.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if ($("detail").open) return; // Esc closes it
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const inPlayer = document.activeElement?.tagName === "AUDIO";
  if (event.key in steps && !inPlayer) {
    event.preventDefault();
    moveFocus(steps[event.key]);
  } else if (event.key === "Escape" && page.recorder?.state === "recording") {
    record();
  } else if (event.key.toLowerCase() === "r" || (event.key === " " && document.activeElement === document.body)) {
    if ($("record").hidden) return;
    event.preventDefault();
    record();
  } else if (event.key === "Enter" && document.activeElement === $("choose")) {
    $("file").click();
  }
});

function listen() {
  $("record").onclick = record;
  $("close").onclick = () => $("detail").close();
  $("backwards").onclick = askBackwards;
  $("file").onchange = () => {
    const [file] = $("file").files;
    $("file").value = "";
    if (file) askWithFile(file);
  };
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("ask").classList.add("over");
  });
  document.addEventListener("dragleave", () => $("ask").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("ask").classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) askWithFile(file);
  });
}

async function start() {
  page.about = await call("api/about");
  const { image, speech } = page.about.find;
  const parts = [];
  if (image) parts.push(`${image.items.toLocaleString("en")} images of ${image.gallery}`);
  if (speech) parts.push(`${speech.items.toLocaleString("en")} recordings of ${speech.gallery}`);
  $("about").textContent = parts.join(" · ");
  $("record").hidden = !image;
  $("file").accept = [image && "audio/*", speech && "image/*"].filter(Boolean).join(",");
  listen();
  if (image && !navigator.mediaDevices) warnOfAddress();
}

start().catch((error) => warn(error.message));
