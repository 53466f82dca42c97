// The settings page: workers that are known here. Add by pasting an invite, rename, test, remove.

import { bytes, part } from "./panel.js";
import { SETTINGS } from "./texts.js";

async function post(api, path, body) {
  const answer = await api.fetchApi(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const value = await answer.json();
  if (!answer.ok) throw new Error(SETTINGS.error(value.error, value.hint));
  return value;
}

function button(text, act) {
  const element = part("button", "mesh-button", text);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

function tested(answer) {
  const devices = answer.devices.map((d) => SETTINGS.room(d.name, d.budget ? bytes(d.budget) : undefined));
  return SETTINGS.answers(answer.ms.toFixed(0), answer.families, devices);
}

export function workersPage(api, changed) {
  const page = part("div", "mesh-page");
  const list = part("div", "mesh-list");
  const invite = part("textarea", "mesh-invite");
  invite.placeholder = SETTINGS.invite;
  invite.rows = 2;
  const said = part("div", "mesh-said");

  function say(text, bad = false) {
    said.textContent = text;
    said.classList.toggle("mesh-bad", bad);
  }

  async function act(work) {
    try {
      const answer = await work();
      if (answer?.workers) show(answer.workers);
      changed();
      return answer;
    } catch (error) {
      say(error.message, true);
      return undefined;
    }
  }

  function row(worker) {
    const line = part("div", "mesh-row");
    line.dataset.address = worker.address;
    const name = part("input", "mesh-input");
    name.value = worker.name;
    name.title = SETTINGS.rename;
    name.addEventListener("change", () =>
      act(() => post(api, "/mesh/workers/rename", { address: worker.address, name: name.value })),
    );
    const result = part("div", "mesh-dim mesh-result");
    const test = button(SETTINGS.test, async () => {
      result.textContent = SETTINGS.connecting;
      result.classList.remove("mesh-bad");
      try {
        result.textContent = tested(await post(api, "/mesh/workers/test", { address: worker.address }));
      } catch (error) {
        result.textContent = error.message;
        result.classList.add("mesh-bad");
      }
    });
    const remove = button(SETTINGS.remove, () => act(() => post(api, "/mesh/workers/remove", { address: worker.address })));
    const top = part("div", "mesh-row-top");
    top.append(name, part("span", "mesh-dim mesh-address", worker.address), test, remove);
    line.append(top, result);
    return line;
  }

  function show(workers) {
    const empty = part("div", "mesh-dim", SETTINGS.none);
    list.replaceChildren(...(workers.length ? workers.map(row) : [empty]));
  }

  const add = button(SETTINGS.add, async () => {
    say(SETTINGS.connecting);
    const answer = await act(() => post(api, "/mesh/workers", { invite: invite.value }));
    if (!answer) return;
    invite.value = "";
    say(SETTINGS.added(answer.added));
  });
  const how = part("div", "mesh-dim", SETTINGS.how);
  const form = part("div", "mesh-form");
  form.append(invite, add);
  page.append(list, how, form, said);
  api.fetchApi("/mesh/workers").then(async (answer) => {
    const value = await answer.json();
    if (answer.ok) show(value.workers);
    else say(SETTINGS.error(value.error, value.hint), true);
  });
  return page;
}
