import { rleToPixels } from "./rle.js";

const GOLDEN_RATIO = 0.618034;
export const MAX_SIDE_PX = 1600; // sharp on a wide screen; a 50-megapixel photo stays fluid
const STUFF_EXPONENT = 1.75; // at opacity 0.55 stuff has 0.35, as in the service's own overlay
const BACKGROUND = "#77777d";
const LINE = 0xfff5f5f5; // little-endian: alpha, blue, green, red
const DIMMED = 0x9a0c0a0a;

/** RGB of a segment, 0..255; the same rule as `segment_color` in model/formats/encoders.py. */
export function segmentColor(segmentId, isThing) {
  const hue = (segmentId * GOLDEN_RATIO) % 1;
  const saturation = isThing ? 0.85 : 0.4;
  const value = isThing ? 1 : 0.75;
  return [5, 3, 1].map((offset) => {
    const distance = (offset + hue * 6) % 6;
    const fraction = Math.max(0, Math.min(distance, 4 - distance, 1));
    return Math.round(255 * value * (1 - saturation * fraction));
  });
}

/** The photo on one canvas, and the photo under its segments on another. */
export class MaskCanvas {
  #photo;
  #masks;
  #size; // of both canvases: the photo's, or less
  #pixels; // the pixel indices of each segment
  #labels; // per pixel: 0, or 1 + the index of the visible segment
  #layers; // [stuff, things]
  #spotlight;
  #opacity = 0.55;

  constructor(photoCanvas, masksCanvas) {
    this.#photo = photoCanvas.getContext("2d");
    this.#masks = masksCanvas.getContext("2d");
    this.showPhoto({ width: 1, height: 1 }, null);
  }

  /** Replace the photo and clear the segments; without a bitmap the photo is blank. */
  showPhoto({ width, height }, bitmap) {
    const scale = Math.min(1, MAX_SIDE_PX / Math.max(width, height));
    this.#size = { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
    for (const context of [this.#photo, this.#masks]) Object.assign(context.canvas, this.#size);
    this.#photo.imageSmoothingQuality = "high";
    this.#photo.fillStyle = BACKGROUND;
    this.#photo.fillRect(0, 0, this.#size.width, this.#size.height);
    if (bitmap) this.#photo.drawImage(bitmap, 0, 0, this.#size.width, this.#size.height);
    this.showSegments([]);
  }

  /** Draw segments over the photo; where they overlap, the first one is visible. */
  showSegments(segments) {
    this.#pixels = segments.map((segment) => rleToPixels(segment.segmentation, this.#size));
    this.#labels = new Uint16Array(this.#size.width * this.#size.height);
    for (let index = segments.length - 1; index >= 0; index--) {
      for (const pixel of this.#pixels[index]) this.#labels[pixel] = index + 1;
    }
    this.#layers = [this.#paintLayer(segments, 0), this.#paintLayer(segments, 1)];
    this.highlight(null);
  }

  set opacity(value) {
    this.#opacity = value;
    this.#draw();
  }

  /** Dim everything but one segment, including where others cover it; null for none. */
  highlight(index) {
    this.#spotlight = index === null ? null : this.#paintSpotlight(this.#pixels[index]);
    this.#draw();
  }

  /** The index of the segment under a pointer event, or null. */
  findSegment(event) {
    const box = this.#masks.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.#size.width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.#size.height);
    const label = this.#labels[row * this.#size.width + column];
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

  /** Paint things or stuff; the layer of things also has the lines between all segments. */
  #paintLayer(segments, isThing) {
    const colors = segments.map((segment) => packColor(segmentColor(segment.id, segment.isthing)));
    return this.#paint((content) => {
      for (let pixel = 0; pixel < content.length; pixel++) {
        const index = this.#labels[pixel] - 1;
        if (isThing && this.#isOnBorder(pixel)) content[pixel] = LINE;
        else if (index >= 0 && segments[index].isthing === isThing) content[pixel] = colors[index];
      }
    });
  }

  #paintSpotlight(pixels) {
    return this.#paint((content) => {
      content.fill(DIMMED);
      for (const pixel of pixels) content[pixel] = 0;
      for (const pixel of pixels) if (this.#isNear(content, pixel, DIMMED)) content[pixel] = LINE;
    });
  }

  #paint(fill) {
    const layer = new OffscreenCanvas(this.#size.width, this.#size.height);
    const context = layer.getContext("2d");
    const image = context.createImageData(this.#size.width, this.#size.height);
    fill(new Uint32Array(image.data.buffer));
    context.putImageData(image, 0, 0);
    return layer;
  }

  get #lineWidth() {
    return Math.max(1, Math.round(Math.max(this.#size.width, this.#size.height) / 600));
  }

  #isOnBorder(pixel) {
    const { width } = this.#size;
    const label = this.#labels[pixel];
    const right = (pixel % width) + this.#lineWidth < width ? this.#labels[pixel + this.#lineWidth] : label;
    const below = this.#labels[pixel + this.#lineWidth * width] ?? label;
    return right !== label || below !== label;
  }

  /** Whether a pixel is within a line's width of the given value or of the image border. */
  #isNear(content, pixel, value) {
    const { width } = this.#size;
    const column = pixel % width;
    const distance = this.#lineWidth + 1;
    return (
      column < distance ||
      column >= width - distance ||
      content[pixel - distance] === value ||
      content[pixel + distance] === value ||
      (content[pixel - distance * width] ?? value) === value ||
      (content[pixel + distance * width] ?? value) === value
    );
  }
}

function packColor([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
