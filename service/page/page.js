// Wires the page: what the user does, the requests that follow, and what is shown.

import { Refusal, fetchLabelMap, fetchSegments } from "./api.js";
import { listenForFiles, save } from "./files.js";
import { Picture } from "./picture.js";
import { Selection } from "./selection.js";

const UNSHOWN = "This browser cannot show the photo's format: the segments lie on a blank picture.";

const find = (id) => document.getElementById(id);
const picture = new Picture(find("photo"), find("masks"));
const selection = new Selection(picture, { masks: find("masks"), legend: find("legend"), tip: find("tip") });

let request = new AbortController();
let upload = null; // { file, bitmap }; the bitmap is a promise, of null where the browser cannot read the file
let answer = null;

async function acceptFile(file) {
  upload = { file, bitmap: createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null) };
  segmentUpload();
  const bitmap = await upload.bitmap;
  if (upload.file === file) showUpload(bitmap);
}

/** Ask for the chosen task; a newer request silently replaces this one. */
async function segmentUpload() {
  const signal = startRequest();
  const started = performance.now();
  const task = document.querySelector("[name=task]:checked").value;
  showBusy(true);
  try {
    const received = await fetchSegments(upload.file, task, signal);
    const seconds = (performance.now() - started) / 1000;
    const bitmap = await upload.bitmap;
    if (!signal.aborted) showAnswer(received, bitmap, seconds);
  } catch (error) {
    if (!signal.aborted) showError(error, segmentUpload);
  }
  if (!signal.aborted) showBusy(false);
}

/** Forget the last answer and end the request still in flight. */
function startRequest() {
  request.abort();
  request = new AbortController();
  answer = null;
  find("error").hidden = true;
  find("notes").replaceChildren();
  selection.show([], null);
  return request.signal;
}

function showBusy(isBusy) {
  document.body.classList.toggle("busy", isBusy);
  find("result").setAttribute("aria-busy", isBusy);
  for (const id of ["download-png", "download-json"]) find(id).disabled = answer === null;
  if (answer === null) showSummary(isBusy ? "Looking for segments…" : "");
}

/** Tell the eye, and a screen reader in fewer words. */
function showSummary(text, spoken = text) {
  find("summary").textContent = text;
  find("status").textContent = spoken;
}

function showUpload(bitmap) {
  find("photo-name").textContent = upload.file.name;
  find("drop").hidden = bitmap !== null;
  find("result").hidden = bitmap === null;
  if (bitmap) showPhoto(bitmap, bitmap);
}

function showPhoto({ width, height }, bitmap) {
  find("pictures").style.setProperty("--aspect", width / height);
  find("pictures").classList.toggle("blank", bitmap === null);
  find("photo-size").textContent = `${width} × ${height}`;
  picture.showPhoto({ width, height }, bitmap);
}

function showAnswer(received, bitmap, seconds) {
  const { image, model, segments_info: segments } = received;
  const isShown = bitmap !== null && bitmap.width === image.width && bitmap.height === image.height;
  if (!isShown) showPhoto(image, null);
  find("drop").hidden = true;
  find("result").hidden = false;
  selection.show(segments, image);
  find("notes").replaceChildren(...[...(isShown ? [] : [UNSHOWN]), ...image.notes].map(renderNote));
  const count = segments.length === 1 ? "1 segment" : `${segments.length || "No"} segments`;
  showSummary(`${count} in ${seconds.toFixed(1)} s by ${model.name} ${model.version}`, count);
  answer = received;
}

function renderNote(text) {
  const item = document.createElement("li");
  item.textContent = text;
  return item;
}

function showError(error, retry) {
  if (!(error instanceof Refusal)) console.error(error);
  const message = error instanceof Refusal ? error.message : "The answer could not be shown.";
  find("error").hidden = false;
  find("error-text").textContent = `${upload.file.name}: ${message}`;
  find("retry").hidden = !error.mayPass;
  find("retry").onclick = retry;
}

function setOpacity(percent) {
  find("opacity").value = percent;
  picture.opacity = percent / 100;
}

async function savePng() {
  const { signal } = request;
  const { file } = upload;
  const { task } = answer;
  find("error").hidden = true;
  find("download-png").disabled = true;
  try {
    save(await fetchLabelMap(file, task, signal), file.name, `${task}.png`);
  } catch (error) {
    if (!signal.aborted) showError(error, savePng);
  }
  if (!signal.aborted) find("download-png").disabled = false;
}

function saveJson() {
  const content = JSON.stringify(answer, null, 2);
  save(new Blob([content], { type: "application/json" }), upload.file.name, `${answer.task}.json`);
}

function listenForControls() {
  find("tasks").addEventListener("change", () => {
    if (upload) segmentUpload();
  });
  find("opacity").addEventListener("input", ({ target }) => setOpacity(target.valueAsNumber));
  find("show-photo").addEventListener("click", () => setOpacity(0));
  find("show-masks").addEventListener("click", () => setOpacity(100));
  find("download-png").addEventListener("click", savePng);
  find("download-json").addEventListener("click", saveJson);
}

listenForFiles(find("file"), acceptFile);
listenForControls();
setOpacity(find("opacity").valueAsNumber); // browsers keep a moved slider across a reload
