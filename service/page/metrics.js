// Prometheus' text format, and what can be read out of two looks at it.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** All samples of one look. */
export class Metrics {
  #samples = new Map();

  constructor(text = "") {
    for (const row of text.split("\n")) {
      const [, name, labels = "", value] = row.match(SAMPLE) ?? [];
      if (!name) continue;
      if (!this.#samples.has(name)) this.#samples.set(name, []);
      this.#samples.get(name).push({ labels: readLabels(labels), value: Number(value) });
    }
  }

  /** The samples of a metric whose labels are as in `where`, by text or pattern. */
  list(name, where = {}) {
    const wanted = Object.entries(where);
    return (this.#samples.get(name) ?? []).filter(({ labels }) =>
      wanted.every(([label, form]) => (form instanceof RegExp ? form.test(labels[label]) : labels[label] === form)),
    );
  }

  /** Their sum; 0 where there are none. */
  sum(name, where) {
    return this.list(name, where).reduce((total, { value }) => total + value, 0);
  }

  /** Their sums by the value of a label. */
  group(name, label, where) {
    const sums = new Map();
    for (const { labels, value } of this.list(name, where)) {
      sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
    }
    return sums;
  }

  /** A histogram: counts of values up to each bound, the bounds rising. */
  bins(name, where) {
    const bounds = [...this.group(`${name}_bucket`, "le", where)].map(([bound, count]) => [readNumber(bound), count]);
    return new Map(bounds.sort(([a], [b]) => a - b));
  }
}

/** How much a histogram grew between two looks. */
export function subtractBins(later, earlier) {
  return new Map([...later].map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]));
}

/** The value below which a share of a histogram lies, between bounds as the crow flies; null if it is empty. */
export function findQuantile(share, bins) {
  const count = bins.get(Infinity) ?? 0;
  if (count <= 0) return null;
  let [low, below] = [0, 0];
  for (const [bound, within] of bins) {
    if (within >= share * count) {
      return Number.isFinite(bound) ? low + ((bound - low) * (share * count - below)) / (within - below) : low;
    }
    [low, below] = [bound, within];
  }
  return low;
}

function readLabels(text) {
  return Object.fromEntries([...text.matchAll(LABEL)].map(([, name, value]) => [name, value.replace(/\\(.)/g, "$1")]));
}

function readNumber(text) {
  return Number(text.replace("+Inf", "Infinity"));
}
