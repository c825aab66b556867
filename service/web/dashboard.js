import { fetchMetrics, setApiKey } from "./api.js";
import { replaceIfChanged } from "./charts.js";
import { renderTables } from "./dashboard_tables.js";
import { renderTiles } from "./dashboard_tiles.js";
import { Metrics, MetricsWindow } from "./metrics.js";

const INTERVAL_MS = 2000;
const MAX_SAMPLES = 150; // five minutes
const RESPONSES = "useg_request_duration_seconds_count";

const find = (id) => document.getElementById(id);
const samples = [];
let isPaused = false;

async function poll() {
  if (isPaused || document.hidden) return;
  try {
    add({ at: performance.now(), metrics: new Metrics(await fetchMetrics()) });
    show();
    find("error").hidden = true;
  } catch (error) {
    showError(error);
  }
}

/** Add a sample; after a restart of the service its counters start at 0, so older samples are dropped. */
function add(sample) {
  const start = ({ metrics }) => metrics.sum("process_start_time_seconds");
  if (samples.length && start(samples[0]) !== start(sample)) samples.length = 0;
  samples.push(sample);
  if (samples.length > MAX_SAMPLES) samples.shift();
}

function show() {
  const last = samples.at(-1);
  const recent = new MetricsWindow(samples[0], last);
  const isRecent = recent.increase(RESPONSES) > 0;
  const shown = isRecent ? recent : MetricsWindow.sinceStart(last);
  const minutes = Math.max(1, Math.round(recent.seconds / 60));
  const period = isRecent ? `last ${minutes === 1 ? "minute" : `${minutes} minutes`}` : "since the start";
  replaceIfChanged(find("period"), period);
  replaceIfChanged(find("state"), describeState(last.metrics));
  find("tiles").replaceChildren(...renderTiles(samples, recent, shown));
  for (const [id, content] of Object.entries(renderTables(last.metrics, shown))) {
    replaceIfChanged(find(id), ...content);
  }
}

function describeState(metrics) {
  const models = metrics
    .list("useg_model_info", {})
    .map(({ labels }) => `${labels.name} ${labels.version} on ${labels.backend}`);
  const states = metrics
    .list("useg_model_state")
    .filter(({ value }) => value === 1)
    .map(({ labels }) => labels.state);
  return `${models.join(", ") || "No model"}: ${states.join(", ")}`;
}

function showError(error) {
  find("error-text").textContent = `Metrics are not available: ${error.message}`;
  find("key-field").hidden = !error.needsApiKey;
  find("error").hidden = false;
}

find("key").addEventListener("change", ({ target }) => {
  setApiKey(target.value);
  poll();
});
find("pause").addEventListener("click", ({ target }) => {
  isPaused = !isPaused;
  target.setAttribute("aria-pressed", String(isPaused));
  poll();
});
document.addEventListener("visibilitychange", poll);
setInterval(poll, INTERVAL_MS);
poll();
