// Requests to the service. Addresses are relative, so that the page works behind a path prefix.

const TASKS = ["panoptic", "instance", "semantic"];
const UNAUTHORIZED = 401;
const FORBIDDEN = 403;

let key = ""; // lives as long as the page: it is written down nowhere
let administratorKey = ""; // so does this one, which only changes of names are sent with

/** Send this API key with every request from now on. */
export function useKey(text) {
  key = text.trim();
}

/** Send this key with every change of a name from now on. */
export function useAdministratorKey(text) {
  administratorKey = text.trim();
}

/** Why there is no answer, in words for the user. */
export class Refusal extends Error {
  constructor(message, { mayPass, needsKey = false, needsAdministrator = false }) {
    super(message);
    this.mayPass = mayPass; // whether the same request may succeed later
    this.needsKey = needsKey;
    this.needsAdministrator = needsAdministrator;
  }
}

/**
 * The service's answer for all tasks from one run of the network, and the milliseconds of each of its stages.
 *
 * Throws Refusal, or AbortError once `signal` is aborted.
 */
export async function fetchSegments(file, signal) {
  const response = await post(file, TASKS.join(","), "application/json", signal);
  const stages = readStages(response.headers.get("Server-Timing") ?? "");
  return { answer: await response.json(), stages };
}

/** The label map of one task as a PNG blob. Throws as above. */
export async function fetchLabelMap(file, task, signal) {
  const response = await post(file, task, "image/png", signal);
  return response.blob();
}

/** The service's metrics as text. Throws Refusal. */
export async function fetchMetrics() {
  const response = await fetch("metrics", { headers: authorize({}) }).catch(refuse);
  if (!response.ok) throw await readProblem(response);
  return response.text();
}

/** Call a model's cluster by another name; an empty one takes the name back. Throws Refusal. */
export async function nameCluster(model, cluster, category) {
  const headers = authorize({ "Content-Type": "application/json" }, administratorKey || key);
  const body = JSON.stringify({ category });
  const response = await fetch(locateClusters(model, `/${cluster}`), { method: "PUT", headers, body }).catch(refuse);
  if (!response.ok) throw await readProblem(response);
}

/** All clusters of a model with their names. Throws Refusal. */
export async function fetchClusters(model) {
  const headers = authorize({}, key || administratorKey);
  const response = await fetch(locateClusters(model), { headers }).catch(refuse);
  if (!response.ok) throw await readProblem(response);
  return (await response.json()).clusters;
}

/** Of the version that answered: another one has other clusters. */
function locateClusters({ name, version }, end = "") {
  return `v1/models/${encodeURIComponent(name)}/clusters${end}?version=${encodeURIComponent(version)}`;
}

async function post(file, task, accept, signal) {
  const body = new FormData();
  body.append("file", file);
  const address = `v1/segment?task=${encodeURIComponent(task)}`;
  const headers = authorize({ Accept: accept });
  const response = await fetch(address, { method: "POST", headers, body, signal }).catch(refuse);
  if (!response.ok) throw await readProblem(response);
  return response;
}

function authorize(headers, sent = key) {
  return sent ? { ...headers, Authorization: `Bearer ${sent}` } : headers;
}

/** `decode;dur=7.5, queue;dur=0.1` as names and numbers, in their order. */
function readStages(header) {
  const parts = header.split(",").map((part) => part.trim().split(";dur="));
  return parts.filter(([, ms]) => ms !== undefined).map(([name, ms]) => ({ name, ms: Number(ms) }));
}

function refuse(error) {
  if (error.name === "AbortError") throw error;
  // A server that refuses a large upload early looks the same as none at all.
  throw new Refusal("No answer: the service is out of reach, or the file is far over its limit.", { mayPass: true });
}

/** RFC 9457 problem details; anything else, such as a proxy's own page, is told by its status. */
async function readProblem(response) {
  const problem = await response.json().catch(() => ({}));
  const message = problem.detail ?? problem.title ?? `The service answered ${response.status}.`;
  const needsKey = response.status === UNAUTHORIZED;
  const needsAdministrator = needsKey || response.status === FORBIDDEN;
  const mayPass = needsKey || response.status >= 500 || response.status === 429;
  return new Refusal(String(message), { mayPass, needsKey, needsAdministrator });
}
