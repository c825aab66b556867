// Requests to the service. Addresses are relative, so that the page works behind a path prefix.

/** Why there is no answer, in words for the user. */
export class Refusal extends Error {
  constructor(message, { mayPass }) {
    super(message);
    this.mayPass = mayPass; // whether the same request may succeed later
  }
}

/** The service's answer in JSON. Throws Refusal, or AbortError once `signal` is aborted. */
export async function fetchSegments(file, task, signal) {
  const response = await post(file, task, "application/json", signal);
  return response.json();
}

/** The label map as a PNG blob. Throws as above. */
export async function fetchLabelMap(file, task, signal) {
  const response = await post(file, task, "image/png", signal);
  return response.blob();
}

async function post(file, task, accept, signal) {
  const body = new FormData();
  body.append("file", file);
  const address = `v1/segment?task=${encodeURIComponent(task)}`;
  const response = await fetch(address, { method: "POST", headers: { Accept: accept }, body, signal }).catch(refuse);
  if (!response.ok) throw await readProblem(response);
  return response;
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
  return new Refusal(String(message), { mayPass: response.status >= 500 || response.status === 429 });
}
