// Requests to the service. Addresses are relative, so that the page works behind a path prefix.

const TASKS = ["panoptic", "instance", "semantic"];
const UNAUTHORIZED = 401;

let key = ""; // lives as long as the page: it is written down nowhere

/** Send this API key with every request from now on. */
export function useKey(text) {
  key = text.trim();
}

/** Why there is no answer, in words for the user. */
export class Refusal extends Error {
  constructor(message, { mayPass, needsKey = false }) {
    super(message);
    this.mayPass = mayPass; // whether the same request may succeed later
    this.needsKey = needsKey;
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

async function post(file, task, accept, signal) {
  const body = new FormData();
  body.append("file", file);
  const address = `v1/segment?task=${encodeURIComponent(task)}`;
  const headers = authorize({ Accept: accept });
  const response = await fetch(address, { method: "POST", headers, body, signal }).catch(refuse);
  if (!response.ok) throw await readProblem(response);
  return response;
}

function authorize(headers) {
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
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
  return new Refusal(String(message), { mayPass: needsKey || response.status >= 500 || response.status === 429, needsKey });
}
