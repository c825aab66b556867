const GOLDEN_RATIO = 0.618034;

/** RGB of a segment, 0..255: the rule of `choose_colour` in model/encodings.py. */
export function chooseColour(segmentId, isThing) {
  const hue = (segmentId * GOLDEN_RATIO) % 1;
  const saturation = isThing ? 0.85 : 0.4;
  const value = isThing ? 1 : 0.75;
  return [5, 3, 1].map((offset) => {
    const distance = (offset + hue * 6) % 6;
    const share = Math.max(0, Math.min(distance, 4 - distance, 1));
    return Math.round(255 * value * (1 - saturation * share));
  });
}
