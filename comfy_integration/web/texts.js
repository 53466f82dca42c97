// What the panel on the node and the settings page say. The texts of nodes and inputs are in ../texts.py.

export const PANEL = {
  notRun: "Not run yet.",
  noStep: "no step yet",
  parts: { local_ms: "here", remote_ms: "worker", codec_ms: "codec", wire_ms: "network", other_ms: "other" },
  allHere: (blocks) => `all ${blocks} blocks here`,
  blocks: (span) => `blocks ${span}`,
  loading: (share) => (share === undefined ? "loading" : `loading ${share} %`),
  lost: (seconds) => `lost ${seconds} s ago, waiting for it`,
  local: "runs here",
  reconnected: (times) => `reconnected ${times} times`,
  step: (time, crossed, raw) => `step ${time}, ${crossed}${raw === undefined ? "" : ` of ${raw}`} crossed`,
};

export const NODES = {
  askForLoras: "ask the worker for its LoRAs",
  noLora: "none",
  toast: "Mesh",
};

export const SETTINGS = {
  menu: "Mesh",
  name: "Workers",
  tooltip: "The machines that may run blocks for this one.",
  invite: 'mesh join "mesh://..."',
  how: "On the machine with the spare GPU run: mesh serve MODELS --bind 0.0.0.0. Paste the line that it prints here.",
  none: "No worker is known here yet.",
  rename: "Name; Enter to keep it",
  add: "Add",
  test: "Test",
  remove: "Remove",
  connecting: "connecting ...",
  added: (worker) => `Added ${worker}.`,
  error: (what, hint) => (hint ? `${what} Try: ${hint}` : what),
  room: (name, bytes) => (bytes === undefined ? name : `${name}, ${bytes} for weights`),
  answers: (milliseconds, families, devices) =>
    `answers in ${milliseconds} ms; runs ${families.join(", ") || "no family"}; ${devices.join("; ")}`,
};
