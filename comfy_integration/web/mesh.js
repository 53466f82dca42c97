// The mesh in ComfyUI's page: a live panel on the nodes, and the workers in the settings.
// Shows text that came from other machines as text only, never as markup. Connects to nobody: it talks to this ComfyUI.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { panel } from "./panel.js";
import { NODES, SETTINGS } from "./texts.js";
import { workersPage } from "./workers.js";

const WITH_WORKERS = ["MeshSplit", "MeshWorkers", "MeshRemoteLora"];
const panels = new Map();

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./mesh.css", import.meta.url).href;
  document.head.appendChild(link);
}

function nodeOf(id) {
  for (const [node, show] of panels) {
    const own = String(node.id);
    if (id === own || (node.graph !== app.graph && id.split(":").pop() === own)) return show;
  }
  return undefined;
}

function eachNode(graph, act) {
  for (const node of graph?.nodes ?? []) {
    act(node);
    if (node.subgraph) eachNode(node.subgraph, act);
  }
}

function offer(node, choices) {
  const combo = node.widgets?.find((widget) => widget.name === "worker");
  if (combo) combo.options.values = choices;
}

async function refresh() {
  const answer = await api.fetchApi("/mesh/workers");
  if (!answer.ok) return;
  const { choices } = await answer.json();
  eachNode(app.graph, (node) => {
    if (WITH_WORKERS.includes(node.comfyClass)) offer(node, choices);
  });
}

// The list of a worker's LoRAs is asked for when the user presses the button, never before.
function offerLoras(node) {
  const named = (name) => node.widgets.find((widget) => widget.name === name);
  async function ask() {
    const address = named("worker").value.split(" @ ").pop();
    const answer = await api.fetchApi("/mesh/loras", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ address }),
    });
    const value = await answer.json();
    if (answer.ok) named("lora").options.values = [NODES.noLora, ...value.loras];
    else app.extensionManager.toast.add({ severity: "error", summary: NODES.toast, detail: value.error, life: 8000 });
  }
  node.addWidget("button", NODES.askForLoras, null, ask, { serialize: false });
}

async function catchUp() {
  const answer = await api.fetchApi("/mesh/status");
  const { nodes = {}, message, error, hint } = await answer.json();
  const problem = error ? SETTINGS.error(error, hint) : message;
  if (problem) app.extensionManager.toast.add({ severity: "error", summary: NODES.toast, detail: problem });
  for (const status of Object.values(nodes)) nodeOf(status.node)?.(status);
}

app.registerExtension({
  name: "comfyui-mesh",
  settings: [
    {
      id: "Mesh.Workers",
      name: SETTINGS.name,
      category: [SETTINGS.menu, SETTINGS.name, SETTINGS.name],
      tooltip: SETTINGS.tooltip,
      type: () => workersPage(api, refresh),
      defaultValue: "",
    },
  ],
  setup() {
    addStyle();
    api.addEventListener("mesh.status", (event) => nodeOf(event.detail.node)?.(event.detail));
    api.addEventListener("reconnected", catchUp);
  },
  nodeCreated(node) {
    if (WITH_WORKERS.includes(node.comfyClass)) refresh();
    if (node.comfyClass === "MeshRemoteLora") offerLoras(node);
    if (node.comfyClass !== "MeshSplit") return;
    const { element, show } = panel();
    const widget = node.addDOMWidget("mesh_status", "mesh-status", element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => 134,
    });
    widget.serialize = false;
    panels.set(node, show);
    const removed = node.onRemoved;
    node.onRemoved = function () {
      panels.delete(node);
      removed?.apply(this, arguments);
    };
    node.setSize?.([Math.max(node.size[0], 340), Math.max(node.size[1], node.computeSize?.()[1] ?? 0)]);
  },
  afterConfigureGraph() {
    refresh();
    catchUp();
  },
});
