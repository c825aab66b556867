const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 40;

/** A line of the last values, as many as `kept` across; nulls are left out. Without a `label`, it is for the eye alone. */
export function drawLine(values, kept, label = "") {
  const top = Math.max(...values.filter((each) => each !== null), Number.MIN_VALUE);
  const points = values
    .map((value, index) =>
      value === null ? "" : `${kept - values.length + index},${HEIGHT - (HEIGHT - 2) * (value / top) - 1}`,
    )
    .filter(Boolean);
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", `0 0 ${kept} ${HEIGHT}`);
  picture.setAttribute("preserveAspectRatio", "none");
  if (label) picture.setAttribute("role", "img");
  picture.setAttribute(label ? "aria-label" : "aria-hidden", label || "true");
  const path = document.createElementNS(SVG, "polyline");
  path.setAttribute("points", points.join(" "));
  picture.append(path);
  return picture;
}

/** What two neighbours in time tell together. */
export function listPairs(samples, compare) {
  return samples.slice(1).map((sample, index) => compare(samples[index], sample));
}
