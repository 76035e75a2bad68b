// What the page's parts share: elements, requests, numbers.

export const byId = (id) => document.getElementById(id);

/** An element (or `svg:name`) with attributes and children; strings become text, never markup. */
export function element(name, attributes = {}, ...children) {
  const node = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const API_KEY = "eagleray-api-key";

/** The API key that requests are sent with; kept until the tab is closed. */
export const apiKey = () => sessionStorage.getItem(API_KEY) || "";
export const keepApiKey = (key) => sessionStorage.setItem(API_KEY, key);

/** The response, or an Error with the server's own reason and its status. */
export async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey()) headers.set("Authorization", `Bearer ${apiKey()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const reason = await response.json().then((body) => body.error, () => null);
  const error = new Error(reason || `The server answered ${response.status} without a reason.`);
  throw Object.assign(error, { status: response.status });
}

export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

/** Show a reason in a notice, or hide it. */
export function tell(notice, reason) {
  notice.textContent = reason || "";
  notice.hidden = !reason;
}

export const percent = (value, digits = 1) => (value === null ? "–" : `${(100 * value).toFixed(digits)} %`);
export const count = (value) => value.toLocaleString("en");
export const milliseconds = (value) => (value === null ? "–" : `${value.toFixed(1)} ms`);
