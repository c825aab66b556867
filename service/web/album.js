import { fetchPhoto, fetchSegments } from "./api.js";
import { MAX_SIDE_PX } from "./mask_canvas.js";

const THUMBNAIL_PX = 144;
const MAX_CONCURRENT = 2;
const STATE_LABELS = { waiting: "waiting", busy: "being segmented", done: "segmented", failed: "failed" };

/** The user's photos, one of which is shown. Each is segmented once for a detail, the shown one first. */
export class Album {
  #list;
  #onChange;
  #entries = [];
  #running = 0;
  #detail = "standard";
  shown = null; // { file, photo, state, detail, result, stages, seconds, error }; the photo is as the service decoded it

  /** `list` holds one button per photo; `onChange` is called with an entry whose state has changed. */
  constructor(list, onChange) {
    this.#list = list;
    this.#onChange = onChange;
    list.addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (button) this.show(this.#entries[[...list.querySelectorAll("button")].indexOf(button)]);
    });
  }

  /** Add photos and show the first of them. */
  add(files) {
    const added = files.map((file) => ({ file, photo: file, state: "waiting", button: renderButton(file) }));
    for (const entry of added) entry.size = drawThumbnail(entry);
    for (const { button } of added) {
      const item = document.createElement("li");
      item.append(button);
      this.#list.append(item);
    }
    this.#entries.push(...added);
    this.#list.hidden = this.#entries.length < 2;
    this.show(added[0]);
  }

  show(entry) {
    this.shown = entry;
    for (const { button } of this.#entries) button.setAttribute("aria-current", button === entry.button);
    this.#onChange(entry);
    this.#refreshShown();
  }

  /** Segment the shown photo again in this detail, and others when they are shown. */
  setDetail(detail) {
    this.#detail = detail;
    this.#refreshShown();
  }

  /** Segment all photos again whose error is retryable. */
  retry() {
    for (const entry of this.#entries) {
      if (entry.error?.isRetryable) this.#update(entry, { state: "waiting", error: null });
    }
    this.#startWaiting();
  }

  /** Put the current names of a model's clusters into all results so far. */
  updateNames(model, clusters) {
    const byId = new Map(clusters.map((cluster) => [cluster.cluster_id, cluster]));
    for (const { result } of this.#entries) {
      if (result?.model.name !== model.name || result.model.version !== model.version) continue;
      for (const segment of result.results.flatMap(({ segments_info }) => segments_info)) {
        const { category_name, category_id } = byId.get(segment.cluster_id);
        Object.assign(segment, { category_name, category_id });
      }
    }
  }

  #refreshShown() {
    const entry = this.shown;
    if (entry?.state === "done" && entry.detail !== this.#detail) this.#update(entry, { state: "waiting" });
    this.#startWaiting();
  }

  #startWaiting() {
    while (this.#running < MAX_CONCURRENT) {
      const waiting = this.#entries.filter(({ state }) => state === "waiting");
      if (!waiting.length) return;
      this.#segment(waiting.includes(this.shown) ? this.shown : waiting[0]);
    }
  }

  async #segment(entry) {
    const started = performance.now();
    this.#running++;
    this.#update(entry, { state: "busy", detail: this.#detail });
    try {
      const { result, stages } = await fetchSegments(entry.file, entry.detail);
      const seconds = (performance.now() - started) / 1000;
      const photo = await loadPhoto(entry, result.image);
      this.#update(entry, { state: "done", photo, result, stages, seconds });
    } catch (error) {
      this.#update(entry, { state: "failed", error });
    }
    this.#running--;
    this.#refreshShown();
  }

  #update(entry, changes) {
    Object.assign(entry, changes);
    entry.button.dataset.state = entry.state;
    entry.button.querySelector(".visually-hidden").textContent = `, ${STATE_LABELS[entry.state]}`;
    this.#onChange(entry);
  }
}

function renderButton(file) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = file.name;
  button.dataset.state = "waiting";
  const thumbnail = document.createElement("canvas");
  const name = document.createElement("span");
  name.textContent = file.name;
  const state = document.createElement("span");
  state.className = "visually-hidden";
  button.append(thumbnail, name, state);
  return button;
}

/** The photo as the service decoded it: the file, unless the browser turns it otherwise or cannot decode it. */
async function loadPhoto(entry, image) {
  const size = await entry.size;
  const isSame = size?.width === image.original_width && size.height === image.original_height;
  if (isSame && !image.exif_transposed) return entry.file;
  const photo = await fetchPhoto(entry.file, MAX_SIDE_PX).catch(() => entry.file);
  await drawThumbnail({ ...entry, photo });
  return photo;
}

/** Draw a small version of the photo; returns the photo's size, or null if the browser cannot decode it. */
async function drawThumbnail({ photo, button }) {
  const bitmap = await createImageBitmap(photo).catch(() => null);
  if (!bitmap) return null;
  const { width, height } = bitmap;
  const canvas = button.querySelector("canvas");
  Object.assign(canvas, { width: Math.max(1, Math.round((width * THUMBNAIL_PX) / height)), height: THUMBNAIL_PX });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { width, height };
}
