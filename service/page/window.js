import { Metrics, findQuantile, subtractBins } from "./metrics.js";

/** What happened between two looks at the metrics; each is { at, metrics }, `at` in milliseconds. */
export class Window {
  #earlier;
  #later;

  constructor(earlier, later) {
    this.#earlier = earlier.metrics;
    this.#later = later.metrics;
    this.seconds = Math.max(0.001, (later.at - earlier.at) / 1000);
  }

  /** All that happened since the service started. */
  static sinceStart(later) {
    const started = later.metrics.sum("process_start_time_seconds") * 1000;
    return new Window({ at: later.at - Math.max(0, Date.now() - started), metrics: new Metrics() }, later);
  }

  /** How much a counter rose. */
  rise(name, where) {
    return this.#later.sum(name, where) - this.#earlier.sum(name, where);
  }

  rate(name, where) {
    return this.rise(name, where) / this.seconds;
  }

  /** How much a counter rose for each value of a label. */
  rises(name, label, where) {
    const before = this.#earlier.group(name, label, where);
    return new Map(
      [...this.#later.group(name, label, where)].map(([value, sum]) => [value, sum - (before.get(value) ?? 0)]),
    );
  }

  /** The value below which a share of a histogram's new values lies; null if there is none. */
  quantile(share, name, where) {
    return findQuantile(share, subtractBins(this.#later.bins(name, where), this.#earlier.bins(name, where)));
  }

  /** The mean of a histogram's new values; null if there is none. */
  mean(name, where) {
    const count = this.rise(`${name}_count`, where);
    return count > 0 ? this.rise(`${name}_sum`, where) / count : null;
  }
}
