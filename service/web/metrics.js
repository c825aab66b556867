// Prometheus' text format: samples of one scrape, and what happened between two scrapes.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** All samples of one scrape. */
export class Metrics {
  #samples = new Map();

  constructor(text = "") {
    for (const line of text.split("\n")) {
      const [, name, labels = "", value] = line.match(SAMPLE) ?? [];
      if (!name) continue;
      if (!this.#samples.has(name)) this.#samples.set(name, []);
      this.#samples.get(name).push({ labels: parseLabels(labels), value: Number(value) });
    }
  }

  /** The samples of a metric whose labels match `where`, by text or regular expression. */
  list(name, where = {}) {
    const conditions = Object.entries(where);
    return (this.#samples.get(name) ?? []).filter(({ labels }) =>
      conditions.every(([label, expected]) =>
        expected instanceof RegExp ? expected.test(labels[label]) : labels[label] === expected,
      ),
    );
  }

  /** Their sum; 0 if there are none. */
  sum(name, where) {
    return this.list(name, where).reduce((total, { value }) => total + value, 0);
  }

  /** Their sums by the value of a label. */
  sumBy(name, label, where) {
    const sums = new Map();
    for (const { labels, value } of this.list(name, where)) {
      sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
    }
    return sums;
  }

  /** A histogram: cumulative counts by upper bound, in ascending order. */
  buckets(name, where) {
    const counts = [...this.sumBy(`${name}_bucket`, "le", where)].map(([bound, count]) => [parseBound(bound), count]);
    return new Map(counts.sort(([a], [b]) => a - b));
  }
}

/** What happened between two scrapes; each is { at, metrics }, `at` in milliseconds. */
export class MetricsWindow {
  #earlier;
  #later;

  constructor(earlier, later) {
    this.#earlier = earlier.metrics;
    this.#later = later.metrics;
    this.seconds = Math.max(0.001, (later.at - earlier.at) / 1000);
  }

  /** The time since the service started. */
  static sinceStart(later) {
    const started = later.metrics.sum("process_start_time_seconds") * 1000;
    return new MetricsWindow({ at: later.at - Math.max(0, Date.now() - started), metrics: new Metrics() }, later);
  }

  /** The increase of a counter. */
  increase(name, where) {
    return this.#later.sum(name, where) - this.#earlier.sum(name, where);
  }

  rate(name, where) {
    return this.increase(name, where) / this.seconds;
  }

  /** The increase of a counter by the value of a label. */
  increaseBy(name, label, where) {
    const before = this.#earlier.sumBy(name, label, where);
    return new Map(
      [...this.#later.sumBy(name, label, where)].map(([value, sum]) => [value, sum - (before.get(value) ?? 0)]),
    );
  }

  /** A quantile (0..1) of a histogram's new values; null if there are none. */
  quantile(q, name, where) {
    return bucketQuantile(q, subtractBuckets(this.#later.buckets(name, where), this.#earlier.buckets(name, where)));
  }

  /** The mean of a histogram's new values; null if there are none. */
  mean(name, where) {
    const count = this.increase(`${name}_count`, where);
    return count > 0 ? this.increase(`${name}_sum`, where) / count : null;
  }
}

/** The increase of a histogram between two scrapes. */
export function subtractBuckets(later, earlier) {
  return new Map([...later].map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]));
}

/** A quantile (0..1) of a histogram, interpolated linearly within its bucket; null if it is empty. */
export function bucketQuantile(q, buckets) {
  const total = buckets.get(Infinity) ?? 0;
  if (total <= 0) return null;
  let [lower, before] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= q * total) {
      return Number.isFinite(bound) ? lower + ((bound - lower) * (q * total - before)) / (count - before) : lower;
    }
    [lower, before] = [bound, count];
  }
  return lower;
}

function parseLabels(text) {
  return Object.fromEntries([...text.matchAll(LABEL)].map(([, name, value]) => [name, value.replace(/\\(.)/g, "$1")]));
}

function parseBound(text) {
  return Number(text.replace("+Inf", "Infinity"));
}
