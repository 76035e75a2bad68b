// The running experiment, as GET /ab/{model} tells it, and how its intervals have moved while the page is open.

import { apiKey, askJson, byId, count, element, milliseconds, percent, tell } from "./tools.js";

const INTERVAL_MS = 5000;
const MAX_HISTORY = 720; // an hour
const GUARDRAILS = {
  error_rate: "Error rate may rise by up to",
  p99_latency: "p99 latency may rise by up to",
  confidence: "Mean confidence may change by up to",
  recall: "Recall may fall by up to",
  outcome: "Outcome may fall by up to",
};

let model = null;
let timer = null;
let isLooking = false;
let isAskedAgain = false;
let history = []; // {time, differences}, of one experiment and revision
let historyOf = null;
let lastSeen = null;

export function start() {
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
}

export function setModel(name) {
  model = name;
  history = [];
  historyOf = lastSeen = null;
  byId("experiment").replaceChildren(element("p", { class: "quiet" }, "Loading…"));
  tell(byId("experiment-problem"), null);
  look();
}

/** Ask now, and again in a while; nobody is asked for a page that nobody sees. */
export async function look() {
  clearTimeout(timer);
  if (model === null || document.hidden) return;
  if (isLooking) {
    isAskedAgain = true; // what is on its way may have been read before the news
    return;
  }
  isLooking = true;
  const asked = model;
  const answer = await askJson(`ab/${encodeURIComponent(asked)}`).then((report) => ({ report }), (error) => ({ error }));
  isLooking = false;
  timer = setTimeout(look, isAskedAgain ? 0 : INTERVAL_MS);
  isAskedAgain = false;
  if (asked !== model) return;
  if (answer.error) {
    tell(byId("experiment-problem"), `${answer.error.message}${lastSeen ? ` The figures are of ${clock(lastSeen)}.` : ""}`);
    if (!lastSeen) byId("experiment").replaceChildren();
    return;
  }
  lastSeen = new Date();
  remember(answer.report);
  tell(byId("experiment-problem"), null);
  show(answer.report);
}

function remember(report) {
  const of = `${report.experiment} ${report.revision}`;
  if (of !== historyOf) history = [];
  historyOf = of;
  history = [...history, { time: lastSeen, differences: report.differences }].slice(-MAX_HISTORY);
}

const clock = (time) => time.toLocaleTimeString("en-GB");

// --- The panel ---------------------------------------------------------------------------------------------------

function show(report) {
  const names = Object.keys(report.variants);
  const isComparison = names.length > 1;
  byId("experiment").replaceChildren(
    element("p", { id: "status" }, status(report, isComparison)),
    ...warning(report),
    variantsTable(report),
    ...(isComparison ? Object.entries(report.differences).map(([name, figures]) => difference(report, name, figures)) : []),
    ...shadows(report),
    ...guardrails(report, isComparison),
    ...decisions(report, isComparison),
    element("p", { class: "quiet" }, `As of ${clock(lastSeen)}, since the shares were last set at ${new Date(report.revised).toLocaleString("en-GB")}.`),
  );
}

function status(report, isComparison) {
  if (report.status !== "running") return `The last experiment was ${report.status}${report.reason ? `: ${report.reason}` : ""}. ${report.winner} answers all requests.`;
  if (!isComparison && !Object.keys(report.shadows).length) return `No experiment is running; ${report.control} answers all requests.`;
  const policy = report.policy === "fixed" ? "" : " Traffic follows what looks best (Thompson sampling).";
  return `Running since ${new Date(report.started).toLocaleString("en-GB")}.${policy}`;
}

function warning({ sample_ratio: ratio }) {
  if (!ratio.is_mismatch) return [];
  return [element("p", { class: "notice bad", role: "alert" },
    `Do not trust these figures: users are not split as they should be (p = ${ratio.p_value.toPrecision(2)}).`)];
}

const isRate = (report) => report.outcome === "proportion";
const outcome = (report, figures) => (isRate(report) ? percent(figures.success_rate) : figures.mean === null ? "–" : figures.mean.toPrecision(4));

function variantsTable(report) {
  const columns = ["Share", "Requests", "Errors", "p50", "p99", "Outcomes", isRate(report) ? "Success" : "Mean"];
  const rows = Object.entries(report.variants).map(([name, figures]) => [`${name} (version ${figures.version})`, [
    `${percent(figures.share, 0)} of ${percent(figures.expected_share, 0)}`,
    count(figures.requests), count(figures.errors), milliseconds(figures.p50_ms), milliseconds(figures.p99_ms), count(figures.outcomes), outcome(report, figures),
  ]]);
  return table("Variants", "variants", columns, rows);
}

function shadows(report) {
  const entries = Object.entries(report.shadows);
  if (!entries.length) return [];
  const columns = ["Requests", "Errors", "p50", "p99", "Agreement", "Success", "Looks alike"];
  const rows = entries.map(([name, figures]) => [`${name} (version ${figures.version})`, [
    count(figures.requests), count(figures.errors), milliseconds(figures.p50_ms), milliseconds(figures.p99_ms), percent(figures.agreement), percent(figures.success_rate),
    figures.saliency_similarity?.toFixed(2) ?? "–",
  ]]);
  return [element("h3", {}, "Shadows, which answer nobody"), table("Shadows", "shadows", columns, rows)];
}

function table(label, id, columns, rows) {
  return element("table", { id, "aria-label": label },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Variant"), ...columns.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows.map(([name, cells]) => element("tr", { "data-variant": name.split(" (")[0] },
      element("th", { scope: "row" }, name), ...cells.map((cell, i) => element("td", { "data-name": columns[i] }, cell))))));
}

function guardrails(report, isComparison) {
  if (!isComparison) return [];
  const title = element("h3", {}, "Guardrails");
  if (!report.guardrails.length) return [title, element("p", { class: "quiet" }, "None: nobody ends this experiment but you.")];
  return [title, element("ul", { class: "plain", id: "guardrails" }, ...report.guardrails.map((guard) => element("li", {},
    element("b", { class: guard.is_breached ? "bad-text" : "good" }, guard.is_breached ? "Breached. " : "Not breached. "),
    `${GUARDRAILS[guard.metric] || guard.metric} ${percent(guard.margin)}${guard.label ? ` (${guard.label})` : ""}. `,
    element("span", { class: "quiet" }, guard.reason))))];
}

// --- Decisions ---------------------------------------------------------------------------------------------------

function decisions(report, isComparison) {
  if (!isComparison || report.status !== "running") return [];
  const title = element("h3", {}, "End it");
  if (!apiKey()) return [title, element("p", { class: "quiet" }, "To decide here, give an admin’s API key under “Ask as”.")];
  const button = (text, path, question) => {
    const made = element("button", { type: "button" }, text);
    made.addEventListener("click", () => { if (confirm(question)) decide(report.model, path); });
    return made;
  };
  const challengers = Object.keys(report.variants).filter((name) => name !== report.control);
  return [title, element("div", { class: "row", id: "decide" },
    ...challengers.map((name) => button(`Promote ${name}`, `promote?variant=${encodeURIComponent(name)}`,
      `Make ${name} (version ${report.variants[name].version}) the champion, with all traffic?`)),
    button("Abort", "abort", `End the experiment, and give all traffic back to ${report.control}?`))];
}

async function decide(name, path) {
  document.querySelectorAll("#decide button").forEach((button) => { button.disabled = true; });
  try {
    await askJson(`ab/${encodeURIComponent(name)}/${path}`, { method: "POST" });
  } catch (error) {
    tell(byId("problem"), error.message);
  }
  look();
}

// --- The difference ----------------------------------------------------------------------------------------------

function difference(report, name, figures) {
  const kinds = [["all outcomes", figures], ["by user", figures.by_user], ["adjusted", figures.adjusted]].filter(([, kind]) => kind);
  return element("div", { class: "difference", "data-variant": name },
    element("h3", {}, `${name} minus ${report.control}`),
    element("p", { class: verdict(figures)[1] }, summary(report, figures)),
    intervals(report, kinds),
    ...trail(report, name));
}

/** Which side of zero the interval lies on; null ends are infinite. */
function verdict({ lower, upper }) {
  if (lower !== null && lower > 0) return ["better", "good"];
  if (upper !== null && upper < 0) return ["worse", "bad-text"];
  return ["open", ""];
}

function summary(report, figures) {
  if (figures.estimate === null) return "Nothing to compare yet: send feedback on answers of both.";
  const { lower, upper, estimate } = figures;
  const sure = `${(100 * (1 - figures.alpha)).toFixed(1).replace(/\.0$/, "")} % sure at every moment`;
  const found = { better: "It is better.", worse: "It is worse.", open: "It is open which one is better." }[verdict(figures)[0]];
  const range = lower === null || upper === null ? "too few for an interval" : `between ${signed(report, lower)} and ${signed(report, upper)}`;
  return `${found} ${signed(report, estimate)}, ${range} (${sure}; p = ${figures.p_value.toPrecision(2)}).`;
}

const signed = (report, value) => {
  const shown = isRate(report) ? (100 * value).toFixed(1) : value.toPrecision(3);
  return `${value >= 0 ? "+" : ""}${shown}${isRate(report) ? " points" : ""}`.replace("-", "−");
};

/** Half the width of an axis around zero on which all the values are seen. */
function reach(report, values) {
  const known = values.filter((value) => value !== null).map(Math.abs);
  return Math.min(isRate(report) ? 1 : Infinity, Math.max(...known, isRate(report) ? 0.01 : 1e-9) * 1.1);
}

/** In pixels, so that the letters have the same size on every screen. */
const plotWidth = () => Math.max(240, byId("experiment").clientWidth);

function intervals(report, kinds) {
  const most = reach(report, kinds.flatMap(([, { lower, upper, estimate }]) => [lower, upper, estimate]));
  const [width, left] = [plotWidth(), 80];
  const x = (value) => left + ((width - left - 30) * (value + most)) / (2 * most);
  const bottom = 14 + 24 * kinds.length;
  const svg = element("svg:svg", { class: "plot intervals", viewBox: `0 0 ${width} ${bottom + 18}`, role: "img",
    "aria-label": kinds.map(([kind, figures]) => `${kind}: ${summary(report, { alpha: kinds[0][1].alpha, ...figures })}`).join(" ") });
  svg.append(element("svg:line", { class: "zero", x1: x(0), x2: x(0), y1: 4, y2: bottom }));
  [-most, 0, most].forEach((value) => svg.append(element("svg:text", { x: x(value), y: bottom + 13, "text-anchor": "middle" },
    value ? signed(report, value).replace(" points", "") : "0")));
  kinds.forEach(([kind, figures], row) => {
    const y = 20 + 24 * row;
    svg.append(element("svg:text", { x: 0, y: y + 4 }, kind));
    if (figures.estimate === null) return;
    const [lower, upper] = [figures.lower ?? -most, figures.upper ?? most].map((value) => x(Math.max(-most, Math.min(most, value))));
    const side = verdict(figures)[0];
    svg.append(
      element("svg:line", { class: `interval ${{ better: "good", worse: "bad", open: "" }[side]}`, x1: lower, x2: upper, y1: y, y2: y }),
      element("svg:circle", { class: "estimate", cx: x(figures.estimate), cy: y, r: 5 }));
  });
  return svg;
}

/** The interval over the time that the page is open. */
function trail(report, name) {
  const known = history.map(({ time, differences }) => ({ time: time.getTime(), ...differences[name] }))
    .filter(({ estimate, lower, upper }) => (estimate ?? null) !== null && lower !== null && upper !== null);
  if (known.length < 2) return [element("p", { class: "quiet" }, "How the interval moves is drawn here while the page is open.")];
  const most = reach(report, known.flatMap(({ lower, upper }) => [lower, upper]));
  const [width, left, height] = [plotWidth(), 80, 90];
  const [first, last] = [known[0].time, known.at(-1).time];
  const point = (time, value) => `${(left + ((width - left - 30) * (time - first)) / (last - first)).toFixed(1)},${(height / 2 - (value / most) * (height / 2 - 8)).toFixed(1)}`;
  const band = [...known.map((k) => point(k.time, k.upper)), ...known.toReversed().map((k) => point(k.time, k.lower))];
  const svg = element("svg:svg", { class: "plot trail", viewBox: `0 0 ${width} ${height + 16}`, role: "img",
    "aria-label": `The interval from ${clock(new Date(first))} to ${clock(new Date(last))}` });
  svg.append(
    element("svg:polygon", { class: "band", points: band.join(" ") }),
    element("svg:polyline", { class: "line", points: known.map((k) => point(k.time, k.estimate)).join(" ") }),
    element("svg:line", { class: "zero", x1: left, x2: width - 30, y1: height / 2, y2: height / 2 }),
    element("svg:text", { x: 0, y: 14 }, signed(report, most).replace(" points", "")),
    element("svg:text", { x: 0, y: height / 2 + 4 }, "0"),
    element("svg:text", { x: 0, y: height - 4 }, signed(report, -most).replace(" points", "")),
    element("svg:text", { x: left, y: height + 13 }, clock(new Date(first))),
    element("svg:text", { x: width - 30, y: height + 13, "text-anchor": "end" }, clock(new Date(last))));
  return [svg];
}
