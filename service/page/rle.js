// COCO's compressed run-length encoding: column-major, zeros first.

/** The lengths of the runs: little-endian base 32 digits from "0" up, each the difference to the run two before. */
export function readRuns(counts) {
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
 * The cells of a grid, row-major, whose centres lie in the mask.
 *
 * A grid of the mask's own size gives the mask itself; a smaller one gives it as shown on a screen, without the cost
 * of 50 million pixels.
 */
export function findCells({ size: [height, width], counts }, grid) {
  const rows = countBefore(height, grid.height);
  const columns = countBefore(width, grid.width);
  const cells = [];
  let end = 0;
  for (const [index, length] of readRuns(counts).entries()) {
    const start = end;
    end += length;
    if (index % 2 === 0 || length === 0) continue;
    for (let x = Math.floor(start / height); x * height < end; x++) {
      const top = rows[Math.max(start - x * height, 0)];
      const bottom = rows[Math.min(end - x * height, height)];
      for (let column = columns[x]; column < columns[x + 1]; column++) {
        for (let row = top; row < bottom; row++) cells.push(row * grid.width + column);
      }
    }
  }
  return cells;
}

/** For each of `length` lines, and for the end: how many of the grid's `samples` centres lie before it. */
function countBefore(length, samples) {
  const before = new Uint32Array(length + 1);
  for (let i = 0; i < samples; i++) before[Math.floor(((i + 0.5) * length) / samples) + 1]++;
  for (let i = 0; i < length; i++) before[i + 1] += before[i];
  return before;
}
