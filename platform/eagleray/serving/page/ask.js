// A picture, the answer to it, what spoke for it, and whether it was right.

import { ask, askJson, byId, element, percent, tell } from "./tools.js";

const KEY = "eagleray-routing-key";
const SMALL = 96; // px; smaller pictures are shown as the squares that they are

let model = null;
let current = null; // {file, answer, url, heats: {label: url}, label}
let asking = 0; // number of the latest question: an earlier one's answer is let go

export function start(onCounted) {
  byId("key").value = remembered() || newKey();
  byId("new-key").addEventListener("click", () => { byId("key").value = newKey(); });
  byId("key").addEventListener("change", remember);
  byId("file").addEventListener("change", () => {
    const [file] = byId("file").files;
    byId("file").value = ""; // so that the same file can be chosen again
    if (file) classify(file, onCounted);
  });
  acceptDrops(onCounted);
  byId("show-heat").addEventListener("change", draw);
  byId("right").addEventListener("click", () => sendFeedback(current.answer.predictions[0].label, onCounted));
  byId("wrong").addEventListener("click", openTruth);
  byId("feedback").addEventListener("submit", (event) => {
    event.preventDefault();
    sendFeedback(byId("label").value.trim(), onCounted);
  });
}

export function setModel(chosen, classes) {
  model = chosen.name;
  byId("labels").replaceChildren(...classes.map((label) => element("option", { value: label })));
  byId("variant").replaceChildren(
    element("option", { value: "" }, "by user"),
    ...Object.entries(chosen.variants).map(([name, version]) => element("option", { value: name }, `${name} (version ${version})`)),
  );
  forget();
}

// --- A picture ---------------------------------------------------------------------------------------------------

function acceptDrops(onCounted) {
  const drop = byId("drop");
  // The whole page takes the drop: one that misses the frame would make the browser leave the page.
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) classify(event.dataTransfer.files[0], onCounted);
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) classify(file, onCounted);
  });
}

async function classify(file, onCounted) {
  if (model === null) return;
  const number = ++asking;
  forget();
  byId("drop").classList.add("busy");
  const headers = { "X-Routing-Key": remember() };
  if (byId("variant").value) headers["X-Variant"] = byId("variant").value;
  try {
    const answer = await askJson(`predict/${encodeURIComponent(model)}`, { method: "POST", body: file, headers });
    if (number !== asking) return;
    current = { file, answer, isCounted: !headers["X-Variant"], url: URL.createObjectURL(file), heats: {}, label: null };
    show();
    explain(answer.predictions[0].label);
    if (current.isCounted) onCounted();
  } catch (error) {
    if (number === asking) tell(byId("refusal"), error.message);
  } finally {
    if (number === asking) byId("drop").classList.remove("busy");
  }
}

function forget() {
  if (current) [current.url, ...Object.values(current.heats)].forEach((url) => URL.revokeObjectURL(url));
  current = null;
  byId("picture").hidden = byId("answer").hidden = true;
  byId("picture").removeAttribute("src");
  byId("invitation").hidden = false;
  ["refusal", "heat-problem"].forEach((id) => tell(byId(id), null));
}

// --- The answer --------------------------------------------------------------------------------------------------

function show() {
  const { answer } = current;
  const picture = byId("picture");
  picture.onload = () => picture.classList.toggle("small", Math.max(picture.naturalWidth, picture.naturalHeight) < SMALL);
  picture.hidden = false;
  byId("invitation").hidden = true;
  byId("from").replaceChildren(
    element("b", { id: "answered-by" }, answer.variant),
    ` (version ${answer.version}) in `,
    element("span", { class: "number" }, `${answer.latency_ms.toFixed(1)} ms`),
    current.isCounted ? "" : ", not counted",
  );
  byId("classes").replaceChildren(...answer.predictions.map(classRow));
  byId("top-label").textContent = answer.predictions[0].label;
  byId("truth").hidden = true;
  byId("wrong").setAttribute("aria-expanded", "false");
  byId("label").value = byId("thanks").textContent = "";
  setFeedbackDisabled(false);
  byId("answer").hidden = false;
  draw();
}

function classRow({ label, probability }) {
  const bar = element("span", { class: "bar" });
  bar.style.width = `${100 * probability}%`;
  const row = element("button", { type: "button", "data-label": label, "aria-pressed": "false" },
    bar, element("span", {}, label), element("span", { class: "number" }, percent(probability)));
  row.addEventListener("click", () => explain(label));
  return element("li", {}, row);
}

// --- What spoke for it -------------------------------------------------------------------------------------------

/** Ask the variant that has answered, whatever the experiment has become since. */
async function explain(label) {
  const question = current;
  question.label = label;
  byId("explained").textContent = label;
  for (const row of byId("classes").querySelectorAll("button")) row.setAttribute("aria-pressed", String(row.dataset.label === label));
  tell(byId("heat-problem"), null);
  draw();
  if (question.heats[label]) return;
  try {
    const path = `explain/${encodeURIComponent(model)}?label=${encodeURIComponent(label)}`;
    const headers = { Accept: "image/png", "X-Variant": question.answer.variant };
    const png = await (await ask(path, { method: "POST", body: question.file, headers })).blob();
    if (question !== current) return;
    question.heats[label] = URL.createObjectURL(png);
    draw();
  } catch (error) {
    if (question === current && question.label === label) tell(byId("heat-problem"), `No heat map: ${error.message}`);
  }
}

function draw() {
  if (!current) return;
  const heat = byId("show-heat").checked ? current.heats[current.label] : null;
  byId("picture").src = heat || current.url;
  byId("picture").alt = heat ? `Your picture; in colour what spoke for ${current.label}` : "Your picture";
}

// --- Whether it was right ----------------------------------------------------------------------------------------

function openTruth() {
  byId("truth").hidden = false;
  byId("wrong").setAttribute("aria-expanded", "true");
  byId("label").focus();
}

async function sendFeedback(label, onCounted) {
  const question = current;
  setFeedbackDisabled(true);
  try {
    const body = JSON.stringify({ request_id: question.answer.request_id, label });
    await ask("feedback", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    if (question === current) {
      byId("truth").hidden = true;
      byId("thanks").textContent = `Recorded: it is ${label}.${question.isCounted ? "" : " It is not counted in the experiment."}`;
    }
    if (question.isCounted) onCounted();
  } catch (error) {
    if (question !== current) return;
    setFeedbackDisabled(false);
    byId("thanks").textContent = `Not recorded: ${error.message}`;
  }
}

function setFeedbackDisabled(isDisabled) {
  for (const control of byId("feedback").elements) control.disabled = isDisabled;
}

// --- Who asks ----------------------------------------------------------------------------------------------------

function newKey() {
  return `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
}

function remembered() {
  try { return localStorage.getItem(KEY); } catch { return null; } // storage may be forbidden
}

/** Keep the key for the next visit; a header holds ASCII only. */
function remember() {
  const field = byId("key");
  field.value = field.value.replace(/[^\x21-\x7e]+/g, "-") || newKey();
  try { localStorage.setItem(KEY, field.value); } catch { /* for this visit then */ }
  return field.value;
}
