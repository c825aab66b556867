import { chooseColour } from "./colours.js";
import { findCells } from "./rle.js";

const LONGEST_SIDE_PX = 1600; // sharp on a wide screen; a 50-megapixel photo stays fluid
const STUFF_EXPONENT = 1.75; // at opacity 0.55 stuff lies at 0.35, as in the service's own overlay
const BACKDROP = "#77777d";
const LINE = 0xfff5f5f5; // pixels below are little-endian: alpha, blue, green, red
const VEIL = 0x9a0c0a0a;

/** The photo on one canvas, and on another the photo under its segments. */
export class Picture {
  #photo;
  #masks;
  #grid; // the canvases' size: the photo's, or less
  #cells; // of each segment
  #labels; // of each cell: 0, or 1 + the index of the segment that shows there
  #layers; // the stuff, the things
  #spotlight;
  #opacity = 0.55;

  constructor(photoCanvas, masksCanvas) {
    this.#photo = photoCanvas.getContext("2d");
    this.#masks = masksCanvas.getContext("2d");
    this.showPhoto({ width: 1, height: 1 }, null);
  }

  /** Start over with a photo of this size; without a bitmap, with a blank one. */
  showPhoto({ width, height }, bitmap) {
    const scale = Math.min(1, LONGEST_SIDE_PX / Math.max(width, height));
    this.#grid = { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
    for (const context of [this.#photo, this.#masks]) Object.assign(context.canvas, this.#grid);
    this.#photo.imageSmoothingQuality = "high";
    this.#photo.fillStyle = BACKDROP;
    this.#photo.fillRect(0, 0, this.#grid.width, this.#grid.height);
    if (bitmap) this.#photo.drawImage(bitmap, 0, 0, this.#grid.width, this.#grid.height);
    this.showSegments([]);
  }

  /** Lay segments over the photo; where they overlap, the first one shows. */
  showSegments(segments) {
    this.#cells = segments.map((segment) => findCells(segment.segmentation, this.#grid));
    this.#labels = new Uint16Array(this.#grid.width * this.#grid.height);
    for (let index = segments.length - 1; index >= 0; index--) {
      for (const cell of this.#cells[index]) this.#labels[cell] = index + 1;
    }
    this.#layers = [this.#paintLayer(segments, false), this.#paintLayer(segments, true)];
    this.highlight(null);
  }

  set opacity(value) {
    this.#opacity = value;
    this.#draw();
  }

  /** Dim everything but one segment, the whole of it even where others cover it; null for none. */
  highlight(index) {
    this.#spotlight = index === null ? null : this.#paintSpotlight(this.#cells[index]);
    this.#draw();
  }

  /** The index of the segment shown under a pointer event, or null. */
  findSegment(event) {
    const box = this.#masks.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.#grid.width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.#grid.height);
    const label = this.#labels[row * this.#grid.width + column];
    return label ? label - 1 : null;
  }

  #draw() {
    const [stuff, things] = this.#layers;
    this.#masks.globalAlpha = 1;
    this.#masks.drawImage(this.#photo.canvas, 0, 0);
    this.#masks.globalAlpha = this.#opacity ** STUFF_EXPONENT;
    this.#masks.drawImage(stuff, 0, 0);
    this.#masks.globalAlpha = this.#opacity;
    this.#masks.drawImage(things, 0, 0);
    this.#masks.globalAlpha = 1;
    if (this.#spotlight) this.#masks.drawImage(this.#spotlight, 0, 0);
  }

  /** The things, or the stuff, in their colours; the light lines between all segments lie on the things. */
  #paintLayer(segments, isThing) {
    const colours = segments.map((segment) => packColour(chooseColour(segment.id, segment.isthing)));
    return this.#paint((pixels) => {
      for (let cell = 0; cell < pixels.length; cell++) {
        const index = this.#labels[cell] - 1;
        if (isThing && this.#isBetweenLabels(cell)) pixels[cell] = LINE;
        else if (index >= 0 && segments[index].isthing === isThing) pixels[cell] = colours[index];
      }
    });
  }

  #paintSpotlight(cells) {
    return this.#paint((pixels) => {
      pixels.fill(VEIL);
      for (const cell of cells) pixels[cell] = 0;
      for (const cell of cells) if (this.#touches(pixels, cell, VEIL)) pixels[cell] = LINE;
    });
  }

  #paint(fill) {
    const layer = new OffscreenCanvas(this.#grid.width, this.#grid.height);
    const context = layer.getContext("2d");
    const content = context.createImageData(this.#grid.width, this.#grid.height);
    fill(new Uint32Array(content.data.buffer));
    context.putImageData(content, 0, 0);
    return layer;
  }

  get #thickness() {
    return Math.max(1, Math.round(Math.max(this.#grid.width, this.#grid.height) / 600));
  }

  #isBetweenLabels(cell) {
    const { width } = this.#grid;
    const label = this.#labels[cell];
    const right = (cell % width) + this.#thickness < width ? this.#labels[cell + this.#thickness] : label;
    const below = this.#labels[cell + this.#thickness * width] ?? label;
    return right !== label || below !== label;
  }

  /** Whether a cell lies within a line's thickness of the given value, or of the picture's border. */
  #touches(pixels, cell, value) {
    const { width } = this.#grid;
    const column = cell % width;
    const reach = this.#thickness + 1;
    return (
      column < reach ||
      column >= width - reach ||
      pixels[cell - reach] === value ||
      pixels[cell + reach] === value ||
      (pixels[cell - reach * width] ?? value) === value ||
      (pixels[cell + reach * width] ?? value) === value
    );
  }
}

function packColour([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
