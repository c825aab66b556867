import { placeTooltip, renderSegment, renderSegmentList, showDetails } from "./segments.js";

/** The segment that is highlighted in the image and in the list: the hovered one, else the pinned one. */
export class Selection {
  #canvas;
  #elements;
  #nameForm;
  #segments = [];
  #image = null; // size that the segments' areas refer to
  #model = null; // model that found the segments
  #hovered = null; // index into the segments
  #pinned = null; // index of the segment shown in detail

  /** `elements` are the canvas of the masks, the list, the tooltip and the details; `nameForm` edits a name. */
  constructor(canvas, elements, nameForm) {
    this.#canvas = canvas;
    this.#elements = elements;
    this.#nameForm = nameForm;
    this.#listenToList(elements.list);
    this.#listenToMasks(elements.masks);
    addEventListener("scroll", () => this.#showTooltip(null));
    addEventListener("keydown", ({ key }) => {
      if (key === "Escape") this.#pin(null);
    });
  }

  /** Replace the segments; nothing is highlighted. */
  show(segments, image, model) {
    this.#segments = segments;
    this.#image = image;
    this.#model = model;
    this.#hovered = this.#pinned = null;
    this.#canvas.showSegments(segments);
    this.refresh();
  }

  /** Render the segments again after a name has changed; the pinned one stays pinned. */
  refresh() {
    this.#elements.list.replaceChildren(...renderSegmentList(this.#segments, this.#image));
    this.#highlight();
    this.#showDetails();
    this.#showTooltip(null);
  }

  #listenToList(list) {
    for (const type of ["pointerover", "focusin"]) {
      list.addEventListener(type, (event) => this.#hover(readIndex(event)));
    }
    for (const type of ["pointerleave", "focusout"]) list.addEventListener(type, () => this.#hover(null));
    list.addEventListener("click", (event) => this.#pin(readIndex(event)));
  }

  #listenToMasks(masks) {
    masks.addEventListener("pointermove", (event) => {
      this.#hover(this.#canvas.findSegment(event));
      this.#showTooltip(this.#hovered, event);
    });
    masks.addEventListener("pointerleave", () => {
      this.#hover(null);
      this.#showTooltip(null);
    });
    masks.addEventListener("click", (event) => {
      this.#pin(this.#canvas.findSegment(event));
      this.#showTooltip(this.#hovered ?? this.#pinned, event); // touch screens do not hover
    });
  }

  #hover(index) {
    if (index === this.#hovered) return;
    this.#hovered = index;
    this.#highlight();
  }

  /** Pin a segment, or unpin it if it is pinned. Keyboard focus returns from the details to the list. */
  #pin(index) {
    const previous = this.#elements.details.contains(document.activeElement) ? this.#pinned : null;
    this.#pinned = index === this.#pinned ? null : index;
    this.#highlight();
    this.#showDetails();
    if (previous !== null) this.#elements.list.querySelector(`[data-index="${previous}"]`).focus();
  }

  #showDetails() {
    const segment = this.#pinned === null ? null : this.#segments[this.#pinned];
    if (segment) this.#nameForm.show(segment, this.#model, listNames(this.#segments));
    showDetails(this.#elements.details, segment, this.#image, this.#nameForm.element);
  }

  #highlight() {
    const active = this.#hovered ?? this.#pinned;
    this.#canvas.highlight(active);
    for (const button of this.#elements.list.querySelectorAll("button")) {
      const index = Number(button.dataset.index);
      button.classList.toggle("active", index === active);
      button.setAttribute("aria-pressed", index === this.#pinned);
    }
  }

  #showTooltip(index, event) {
    const { tooltip } = this.#elements;
    if (index === null) tooltip.hidden = true;
    else placeTooltip(tooltip, event, renderSegment(this.#segments[index], this.#image));
  }
}

function listNames(segments) {
  return [...new Set(segments.map(({ category_name }) => category_name).filter(Boolean))].sort();
}

function readIndex(event) {
  const button = event.target.closest("[data-index]");
  return button ? Number(button.dataset.index) : null;
}
