// COCO's compressed run-length encoding: column-major, the first run counts zeros.

/** Decode run lengths: little-endian base-32 digits from "0" up, each the difference to the run two before. */
function decodeCounts(counts) {
  const runs = [];
  for (let at = 0; at < counts.length; ) {
    let value = 0;
    let shift = 0;
    let digit;
    do {
      digit = counts.charCodeAt(at++) - 48;
      value |= (digit & 31) << shift;
      shift += 5;
    } while (digit & 32);
    if (digit & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/**
 * The row-major indices of the pixels of a grid whose centers lie in the mask.
 *
 * A grid of the mask's own size gives the mask itself. A smaller grid gives the mask at that size, without decoding
 * up to 50 million pixels.
 */
export function rleToPixels({ size: [height, width], counts }, grid) {
  const rows = countCentersBefore(height, grid.height);
  const columns = countCentersBefore(width, grid.width);
  const pixels = [];
  let end = 0;
  for (const [index, length] of decodeCounts(counts).entries()) {
    const start = end;
    end += length;
    if (index % 2 === 0 || length === 0) continue;
    for (let x = Math.floor(start / height); x * height < end; x++) {
      const top = rows[Math.max(start - x * height, 0)];
      const bottom = rows[Math.min(end - x * height, height)];
      for (let column = columns[x]; column < columns[x + 1]; column++) {
        for (let row = top; row < bottom; row++) pixels.push(row * grid.width + column);
      }
    }
  }
  return pixels;
}

/** For each of `length` lines, and for the end: how many of the grid's `samples` centers lie before it. */
function countCentersBefore(length, samples) {
  const before = new Uint32Array(length + 1);
  for (let i = 0; i < samples; i++) before[Math.floor(((i + 0.5) * length) / samples) + 1]++;
  for (let i = 0; i < length; i++) before[i + 1] += before[i];
  return before;
}
