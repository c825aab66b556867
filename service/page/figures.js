// Numbers for people.

/** A number under its name, over a picture of it. */
export function renderFigure(name, value, picture) {
  const figure = document.createElement("div");
  const title = document.createElement("span");
  const number = document.createElement("strong");
  title.textContent = name;
  number.textContent = value;
  figure.append(title, number, picture);
  return figure;
}

export function formatS(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

export function formatShare(share) {
  return `${(100 * share).toFixed(share && share < 0.1 ? 1 : 0)} %`;
}

export function formatTenths(value) {
  return value.toFixed(1);
}

export function formatMb(bytes) {
  return `${Math.round(bytes / 2 ** 20)} MB`;
}
