// Connects the user's actions, the requests to the service and what the page shows.

import { Album } from "./album.js";
import { ApiError, fetchLabelMap, setApiKey } from "./api.js";
import { showTiming } from "./charts.js";
import { listenForFiles, listenForSamples, save } from "./files.js";
import { watchHealth } from "./health.js";
import { MaskCanvas } from "./mask_canvas.js";
import { NameForm } from "./name_form.js";
import { Selection } from "./selection.js";

const UNDECODABLE = "This browser cannot show the photo's format: the segments are drawn on a blank image.";

const find = (id) => document.getElementById(id);
const canvas = new MaskCanvas(find("photo"), find("masks"));
const elements = { masks: find("masks"), list: find("segments"), tooltip: find("tooltip"), details: find("details") };
const selection = new Selection(canvas, elements, new NameForm(updateNames));
const album = new Album(find("album"), showEntry);
let drawn = null; // { entry, photo, size }: what is on the canvases and a promise of its size, or of null

/** Show the current state of an entry, if it is the shown one. */
async function showEntry(entry) {
  if (entry !== album.shown) return;
  showState(entry);
  if (drawn?.entry !== entry || drawn.photo !== entry.photo) {
    drawn = { entry, photo: entry.photo, size: drawEntry(entry) };
  }
  const size = await drawn.size;
  if (entry !== album.shown) return;
  if (entry.result) showResult(entry, size);
  else selection.show([], null, null);
}

function showState(entry) {
  const isBusy = entry.state === "busy" || entry.state === "waiting";
  document.body.classList.toggle("busy", isBusy);
  find("result").setAttribute("aria-busy", isBusy);
  for (const id of ["download-png", "download-json"]) find(id).disabled = entry.state !== "done";
  find("photo-name").textContent = entry.file.name;
  if (entry.state !== "done") {
    showSummary(isBusy ? "Segmenting…" : "");
    find("warnings").replaceChildren();
    find("timing").hidden = true;
  }
  if (entry.error) showError(entry.error, () => album.retry());
  else find("error").hidden = true;
}

/** Draw the entry's photo; returns its size, or null if the browser cannot decode it and needs the result first. */
async function drawEntry(entry) {
  const { file, photo, result } = entry;
  const bitmap = await createImageBitmap(photo).catch(() => null);
  if (entry !== album.shown) return null;
  find("drop").hidden = bitmap !== null;
  find("result").hidden = bitmap === null;
  if (!bitmap) return null;
  const { width, height } = photo === file ? bitmap : result.image; // the service's may be scaled down
  const size = { width, height };
  showPhoto(size, bitmap);
  bitmap.close();
  return size;
}

function showPhoto({ width, height }, bitmap) {
  find("images").style.setProperty("--aspect", width / height);
  find("images").classList.toggle("blank", bitmap === null);
  find("photo-size").textContent = `${width} × ${height}`;
  canvas.showPhoto({ width, height }, bitmap);
}

function showResult(entry, size) {
  const { image, model, results } = entry.result;
  const isDecoded = size !== null && size.width === image.width && size.height === image.height;
  if (!isDecoded) showPhoto(image, null);
  find("drop").hidden = true;
  find("result").hidden = false;
  const segments = results.find(({ task }) => task === selectedTask()).segments_info;
  selection.show(segments, image, model);
  find("warnings").replaceChildren(...[...(isDecoded ? [] : [UNDECODABLE]), ...image.warnings].map(renderWarning));
  const count = segments.length === 1 ? "1 segment" : `${segments.length || "No"} segments`;
  showSummary(`${count} in ${entry.seconds.toFixed(1)} s by ${model.name} ${model.version}`, count);
  const timing = { box: find("timing"), bar: find("timing-bar"), text: find("timing-text") };
  showTiming(timing, entry.stages, entry.seconds);
}

function updateNames(model, clusters) {
  album.updateNames(model, clusters);
  selection.refresh();
  find("status").textContent = "Name saved.";
}

function selectedTask() {
  return document.querySelector("[name=task]:checked").value;
}

/** Show a text, and announce a shorter one to screen readers. */
function showSummary(text, announcement = text) {
  find("summary").textContent = text;
  find("status").textContent = announcement;
}

function renderWarning(text) {
  const item = document.createElement("li");
  item.textContent = text;
  return item;
}

function showError(error, retry) {
  if (!(error instanceof ApiError)) console.error(error);
  const message = error instanceof ApiError ? error.message : "The result could not be shown.";
  find("error").hidden = false;
  find("error-text").textContent = `${album.shown.file.name}: ${message}`;
  find("key-field").hidden = !error.needsApiKey;
  find("retry").hidden = !error.isRetryable;
  find("retry").onclick = retry;
}

function setOpacity(percent) {
  find("opacity").value = percent;
  canvas.opacity = percent / 100;
}

async function savePng() {
  const entry = album.shown;
  const task = selectedTask();
  find("error").hidden = true;
  find("download-png").disabled = true;
  try {
    save(await fetchLabelMap(entry.file, task, entry.detail), entry.file.name, `${task}.png`);
  } catch (error) {
    if (entry === album.shown) showError(error, savePng);
  }
  find("download-png").disabled = album.shown.state !== "done";
}

function saveJson() {
  const { result, file } = album.shown;
  const { image, model, results } = result;
  const single = { image, model, ...results.find(({ task }) => task === selectedTask()) };
  save(new Blob([JSON.stringify(single, null, 2)], { type: "application/json" }), file.name, `${selectedTask()}.json`);
}

function listenForControls() {
  find("tasks").addEventListener("change", () => {
    if (album.shown) showEntry(album.shown);
  });
  find("detail").addEventListener("change", ({ target }) => album.setDetail(target.checked ? "high" : "standard"));
  find("opacity").addEventListener("input", ({ target }) => setOpacity(target.valueAsNumber));
  find("show-photo").addEventListener("click", () => setOpacity(0));
  find("show-masks").addEventListener("click", () => setOpacity(100));
  find("download-png").addEventListener("click", savePng);
  find("download-json").addEventListener("click", saveJson);
  find("key").addEventListener("input", ({ target }) => setApiKey(target.value));
  find("key").addEventListener("keydown", ({ key }) => {
    if (key === "Enter") find("retry").click();
  });
}

listenForFiles(find("file"), (files) => album.add(files));
listenForSamples(find("samples"), (files) => album.add(files));
listenForControls();
watchHealth(find("health"), find("health-line"), find("health-body"));
setOpacity(find("opacity").valueAsNumber); // browsers keep a moved slider across a reload
