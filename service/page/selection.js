import { showDetails } from "./details.js";
import { renderLegend, renderSegment } from "./legend.js";
import { placeTip } from "./tip.js";

/**
 * The one segment that stands out, alike in the picture and in the list: the hovered one, else the pinned one.
 *
 * The pinned one is told in full.
 */
export class Selection {
  #picture;
  #elements;
  #naming;
  #segments = [];
  #image = null; // whose area the segments share
  #model = null; // which found them
  #hovered = null; // indices into the segments
  #pinned = null;

  /** `elements` are the canvas with the masks, the list, the tip and the panel of details; `naming` is its form. */
  constructor(picture, elements, naming) {
    this.#picture = picture;
    this.#elements = elements;
    this.#naming = naming;
    this.#listenToList(elements.legend);
    this.#listenToMasks(elements.masks);
    addEventListener("scroll", () => this.#showTip(null));
    addEventListener("keydown", ({ key }) => {
      if (key === "Escape") this.#pin(null);
    });
  }

  /** List these segments in place of the last ones; none stands out. */
  show(segments, image, model) {
    this.#segments = segments;
    this.#image = image;
    this.#model = model;
    this.#hovered = this.#pinned = null;
    this.#picture.showSegments(segments);
    this.renew();
  }

  /** Tell the segments anew, which have other names than before; the pinned one stays it. */
  renew() {
    this.#elements.legend.replaceChildren(...renderLegend(this.#segments, this.#image));
    this.#highlight();
    this.#showDetails();
    this.#showTip(null);
  }

  #listenToList(legend) {
    for (const entered of ["pointerover", "focusin"]) {
      legend.addEventListener(entered, (event) => this.#hover(readIndex(event)));
    }
    for (const left of ["pointerleave", "focusout"]) legend.addEventListener(left, () => this.#hover(null));
    legend.addEventListener("click", (event) => this.#pin(readIndex(event)));
  }

  #listenToMasks(masks) {
    masks.addEventListener("pointermove", (event) => {
      this.#hover(this.#picture.findSegment(event));
      this.#showTip(this.#hovered, event);
    });
    masks.addEventListener("pointerleave", () => {
      this.#hover(null);
      this.#showTip(null);
    });
    masks.addEventListener("click", (event) => {
      this.#pin(this.#picture.findSegment(event));
      this.#showTip(this.#hovered ?? this.#pinned, event); // a finger does not hover
    });
  }

  #hover(index) {
    if (index === this.#hovered) return;
    this.#hovered = index;
    this.#highlight();
  }

  /** Keep one segment standing out; a second time lets it go. The keyboard goes back from its details to the list. */
  #pin(index) {
    const left = this.#elements.details.contains(document.activeElement) ? this.#pinned : null;
    this.#pinned = index === this.#pinned ? null : index;
    this.#highlight();
    this.#showDetails();
    if (left !== null) this.#elements.legend.querySelector(`[data-index="${left}"]`).focus();
  }

  #showDetails() {
    const segment = this.#pinned === null ? null : this.#segments[this.#pinned];
    if (segment) this.#naming.show(segment, this.#model, listNames(this.#segments));
    showDetails(this.#elements.details, segment, this.#image, this.#naming.form);
  }

  #highlight() {
    const active = this.#hovered ?? this.#pinned;
    this.#picture.highlight(active);
    for (const button of this.#elements.legend.querySelectorAll("button")) {
      const index = Number(button.dataset.index);
      button.classList.toggle("active", index === active);
      button.setAttribute("aria-pressed", index === this.#pinned);
    }
  }

  #showTip(index, event) {
    const { tip } = this.#elements;
    if (index === null) tip.hidden = true;
    else placeTip(tip, event, renderSegment(this.#segments[index], this.#image));
  }
}

function listNames(segments) {
  return [...new Set(segments.map(({ category }) => category).filter(Boolean))].sort();
}

function readIndex(event) {
  const button = event.target.closest("[data-index]");
  return button ? Number(button.dataset.index) : null;
}
