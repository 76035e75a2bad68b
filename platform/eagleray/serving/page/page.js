// Joins the parts: which model is asked, and what asking it changes in its experiment.

import * as askPart from "./ask.js";
import * as experimentPart from "./experiment.js";
import { apiKey, askJson, byId, element, keepApiKey, tell } from "./tools.js";

async function choose(model) {
  try {
    const { parameters } = await askJson(`v2/models/${encodeURIComponent(model.name)}`);
    askPart.setModel(model, parameters.classes);
    tell(byId("problem"), null);
  } catch (error) {
    tell(byId("problem"), error.message);
  }
  experimentPart.setModel(model.name);
}

function acceptApiKey() {
  byId("api-key").value = apiKey();
  byId("api-key").addEventListener("change", (event) => {
    keepApiKey(event.target.value.trim());
    location.reload();
  });
}

async function start() {
  acceptApiKey();
  askPart.start(experimentPart.look);
  experimentPart.start();
  let models;
  try {
    ({ models } = await askJson("models"));
  } catch (error) {
    const isLocked = error.status === 401;
    tell(byId("problem"), isLocked ? "This endpoint needs an API key; give yours under “Ask as”." : `${error.message} Load the page again.`);
    byId("experiment").replaceChildren();
    if (isLocked) {
      byId("ask-as").open = true;
      byId("api-key").focus();
    }
    return;
  }
  if (!models.length) {
    tell(byId("problem"), "No model is served yet. Deploy one: eagleray serve deploy MODEL@champion");
    byId("experiment").replaceChildren();
    return;
  }
  const picker = byId("model");
  picker.replaceChildren(...models.map(({ name }) => element("option", { value: name }, name)));
  picker.disabled = models.length === 1;
  picker.addEventListener("change", () => choose(models.find(({ name }) => name === picker.value)));
  await choose(models[0]);
}

start();
