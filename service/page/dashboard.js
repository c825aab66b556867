import { fetchMetrics, useKey } from "./api.js";
import { renderDetails } from "./dashboard_tables.js";
import { renderTiles } from "./dashboard_tiles.js";
import { Metrics } from "./metrics.js";
import { refresh } from "./tables.js";
import { Window } from "./window.js";

const EVERY_MS = 2000;
const KEPT = 150; // five minutes
const ANSWERED = "useg_request_duration_seconds_count";

const find = (id) => document.getElementById(id);
const samples = [];
let isPaused = false;

async function look() {
  if (isPaused || document.hidden) return;
  try {
    take({ at: performance.now(), metrics: new Metrics(await fetchMetrics()) });
    show();
    find("error").hidden = true;
  } catch (error) {
    complain(error);
  }
}

/** A service that was started again counts from 0: what came before is of another one. */
function take(sample) {
  const start = ({ metrics }) => metrics.sum("process_start_time_seconds");
  if (samples.length && start(samples[0]) !== start(sample)) samples.length = 0;
  samples.push(sample);
  if (samples.length > KEPT) samples.shift();
}

function show() {
  const last = samples.at(-1);
  const recent = new Window(samples[0], last);
  const isFresh = recent.rise(ANSWERED) > 0;
  const told = isFresh ? recent : Window.sinceStart(last);
  const minutes = Math.max(1, Math.round(recent.seconds / 60));
  refresh(find("period"), isFresh ? `last ${minutes === 1 ? "minute" : `${minutes} minutes`}` : "since the start");
  refresh(find("state"), describeState(last.metrics));
  find("tiles").replaceChildren(...renderTiles(samples, recent, told));
  for (const [id, content] of Object.entries(renderDetails(last.metrics, told))) refresh(find(id), ...content);
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

function complain(error) {
  find("error-text").textContent = `Metrics are out of reach: ${error.message}`;
  find("key-field").hidden = !error.needsKey;
  find("error").hidden = false;
}

find("key").addEventListener("change", ({ target }) => {
  useKey(target.value);
  look();
});
find("pause").addEventListener("click", ({ target }) => {
  isPaused = !isPaused;
  target.setAttribute("aria-pressed", String(isPaused));
  look();
});
document.addEventListener("visibilitychange", look);
setInterval(look, EVERY_MS);
look();
