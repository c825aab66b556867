// Wires the page: what the user does, the requests that follow, and what is shown.

import { Album } from "./album.js";
import { Refusal, fetchLabelMap, useKey } from "./api.js";
import { listenForFiles, save } from "./files.js";
import { watchHealth } from "./health.js";
import { Naming } from "./naming.js";
import { Picture } from "./picture.js";
import { Selection } from "./selection.js";
import { showTiming } from "./timing.js";

const UNSHOWN = "This browser cannot show the photo's format: the segments lie on a blank picture.";

const find = (id) => document.getElementById(id);
const picture = new Picture(find("photo"), find("masks"));
const elements = { masks: find("masks"), legend: find("legend"), tip: find("tip"), details: find("details") };
const selection = new Selection(picture, elements, new Naming(rename));
const album = new Album(find("album"), showEntry);
let drawn = null; // the entry whose photo lies on the canvases, and the promise of its size, or of null: { entry, size }

/** Show an entry of the album as far as it has come; of another one than the shown, nothing. */
async function showEntry(entry) {
  if (entry !== album.shown) return;
  showBusy(entry);
  if (drawn?.entry !== entry) drawn = { entry, size: drawEntry(entry) };
  const size = await drawn.size;
  if (entry !== album.shown) return;
  if (entry.answer) showAnswer(entry, size);
  else selection.show([], null, null);
}

function showBusy(entry) {
  const isBusy = entry.state === "busy" || entry.state === "waiting";
  document.body.classList.toggle("busy", isBusy);
  find("result").setAttribute("aria-busy", isBusy);
  for (const id of ["download-png", "download-json"]) find(id).disabled = entry.state !== "done";
  find("photo-name").textContent = entry.file.name;
  if (entry.state !== "done") {
    showSummary(isBusy ? "Looking for segments…" : "");
    find("notes").replaceChildren();
    find("timing").hidden = true;
  }
  if (entry.error) showError(entry.error, () => album.retry());
  else find("error").hidden = true;
}

/** Lay the entry's photo on the canvases; null where the browser cannot read it, which may wait for its answer. */
async function drawEntry(entry) {
  const bitmap = await createImageBitmap(entry.file, { imageOrientation: "from-image" }).catch(() => null);
  if (entry !== album.shown) return null;
  find("drop").hidden = bitmap !== null;
  find("result").hidden = bitmap === null;
  if (!bitmap) return null;
  const size = { width: bitmap.width, height: bitmap.height };
  showPhoto(size, bitmap);
  bitmap.close();
  return size;
}

function showPhoto({ width, height }, bitmap) {
  find("pictures").style.setProperty("--aspect", width / height);
  find("pictures").classList.toggle("blank", bitmap === null);
  find("photo-size").textContent = `${width} × ${height}`;
  picture.showPhoto({ width, height }, bitmap);
}

function showAnswer(entry, size) {
  const { image, model, answers } = entry.answer;
  const isShown = size !== null && size.width === image.width && size.height === image.height;
  if (!isShown) showPhoto(image, null);
  find("drop").hidden = true;
  find("result").hidden = false;
  const segments = answers.find(({ task }) => task === readTask()).segments_info;
  selection.show(segments, image, model);
  find("notes").replaceChildren(...[...(isShown ? [] : [UNSHOWN]), ...image.notes].map(renderNote));
  const count = segments.length === 1 ? "1 segment" : `${segments.length || "No"} segments`;
  showSummary(`${count} in ${entry.seconds.toFixed(1)} s by ${model.name} ${model.version}`, count);
  const elements = { box: find("timing"), bar: find("timing-bar"), text: find("timing-text") };
  showTiming(elements, entry.stages, entry.seconds);
}

function rename(model, clusters) {
  album.rename(model, clusters);
  selection.renew();
  find("status").textContent = "The name is saved.";
}

function readTask() {
  return document.querySelector("[name=task]:checked").value;
}

/** Tell the eye, and a screen reader in fewer words. */
function showSummary(text, spoken = text) {
  find("summary").textContent = text;
  find("status").textContent = spoken;
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
  find("error-text").textContent = `${album.shown.file.name}: ${message}`;
  find("key-field").hidden = !error.needsKey;
  find("retry").hidden = !error.mayPass;
  find("retry").onclick = retry;
}

function setOpacity(percent) {
  find("opacity").value = percent;
  picture.opacity = percent / 100;
}

async function savePng() {
  const entry = album.shown;
  const task = readTask();
  find("error").hidden = true;
  find("download-png").disabled = true;
  try {
    save(await fetchLabelMap(entry.file, task), entry.file.name, `${task}.png`);
  } catch (error) {
    if (entry === album.shown) showError(error, savePng);
  }
  find("download-png").disabled = album.shown.state !== "done";
}

function saveJson() {
  const { answer, file } = album.shown;
  const { image, model, answers } = answer;
  const one = { image, model, ...answers.find(({ task }) => task === readTask()) };
  save(new Blob([JSON.stringify(one, null, 2)], { type: "application/json" }), file.name, `${readTask()}.json`);
}

function listenForControls() {
  find("tasks").addEventListener("change", () => {
    if (album.shown) showEntry(album.shown);
  });
  find("opacity").addEventListener("input", ({ target }) => setOpacity(target.valueAsNumber));
  find("show-photo").addEventListener("click", () => setOpacity(0));
  find("show-masks").addEventListener("click", () => setOpacity(100));
  find("download-png").addEventListener("click", savePng);
  find("download-json").addEventListener("click", saveJson);
  find("key").addEventListener("input", ({ target }) => useKey(target.value));
  find("key").addEventListener("keydown", ({ key }) => {
    if (key === "Enter") find("retry").click();
  });
}

listenForFiles(find("file"), (files) => album.add(files));
listenForControls();
watchHealth(find("health"), find("health-line"), find("health-body"));
setOpacity(find("opacity").valueAsNumber); // browsers keep a moved slider across a reload
