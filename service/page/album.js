import { fetchSegments } from "./api.js";

const THUMB_PX = 144;
const AT_ONCE = 2;
const SPOKEN = { waiting: "waiting", busy: "being segmented", done: "segmented", failed: "failed" };

/** The user's photos, of which one is shown; each is segmented once, the shown one first. */
export class Album {
  #list;
  #onChange;
  #entries = [];
  #running = 0;
  shown = null; // { file, state, answer, stages, seconds, error }

  /** `list` holds a button a photo; `onChange` is called with an entry whose state has changed. */
  constructor(list, onChange) {
    this.#list = list;
    this.#onChange = onChange;
    list.addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (button) this.show(this.#entries[[...list.querySelectorAll("button")].indexOf(button)]);
    });
  }

  /** Take in more photos and show the first of them. */
  add(files) {
    const added = files.map((file) => ({ file, state: "waiting", button: renderButton(file) }));
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
    this.#fill();
  }

  /** Ask again for all that failed and may pass. */
  retry() {
    for (const entry of this.#entries) if (entry.error?.mayPass) this.#change(entry, { state: "waiting", error: null });
    this.#fill();
  }

  /** Give the clusters of a model the names that they now have, in all answers so far. */
  rename(model, clusters) {
    const known = new Map(clusters.map((each) => [each.cluster, each]));
    for (const { answer } of this.#entries) {
      if (answer?.model.name !== model.name || answer.model.version !== model.version) continue;
      for (const segment of answer.answers.flatMap(({ segments_info }) => segments_info)) {
        const { category, category_id } = known.get(segment.cluster);
        Object.assign(segment, { category, category_id });
      }
    }
  }

  #fill() {
    while (this.#running < AT_ONCE) {
      const waiting = this.#entries.filter(({ state }) => state === "waiting");
      if (!waiting.length) return;
      this.#segment(waiting.includes(this.shown) ? this.shown : waiting[0]);
    }
  }

  async #segment(entry) {
    const started = performance.now();
    this.#running++;
    this.#change(entry, { state: "busy" });
    try {
      const { answer, stages } = await fetchSegments(entry.file);
      this.#change(entry, { state: "done", answer, stages, seconds: (performance.now() - started) / 1000 });
    } catch (error) {
      this.#change(entry, { state: "failed", error });
    }
    this.#running--;
    this.#fill();
  }

  #change(entry, facts) {
    Object.assign(entry, facts);
    entry.button.dataset.state = entry.state;
    entry.button.querySelector(".unseen").textContent = `, ${SPOKEN[entry.state]}`;
    this.#onChange(entry);
  }
}

function renderButton(file) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = file.name;
  button.dataset.state = "waiting";
  const thumb = document.createElement("canvas");
  const name = document.createElement("span");
  name.textContent = file.name;
  const state = document.createElement("span");
  state.className = "unseen";
  button.append(thumb, name, state);
  drawThumb(thumb, file);
  return button;
}

/** A small picture; none where the browser cannot read the file. */
async function drawThumb(canvas, file) {
  const options = { imageOrientation: "from-image", resizeHeight: THUMB_PX, resizeQuality: "medium" };
  const bitmap = await createImageBitmap(file, options).catch(() => null);
  if (!bitmap) return;
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
}
