// One node's panel: its workers and their state, the last step, the codec. Gets plain values, knows no network.

const PARTS = [
  ["local_ms", "here"],
  ["remote_ms", "worker"],
  ["codec_ms", "codec"],
  ["wire_ms", "network"],
  ["other_ms", "other"],
];

export function part(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export function bytes(count) {
  if (count < 1e3) return `${count} B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(0)} KB`;
  return count < 1e9 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e9).toFixed(2)} GB`;
}

function milliseconds(value) {
  return value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`;
}

function stateText(status) {
  const ago = Math.max(0, Math.round(Date.now() / 1000 - status.since));
  switch (status.state) {
    case "loading": {
      const share = status.total ? ` ${Math.floor((100 * status.done) / status.total)} %` : "";
      return `loading${share}`;
    }
    case "lost":
      return `lost ${ago} s ago, waiting for it`;
    case "local":
      return "runs here";
    default:
      return status.state;
  }
}

function workersOf(status) {
  if (!status.workers.length) return [part("div", "mesh-worker", `all ${status.blocks} blocks here`)];
  return status.workers.map((worker) => {
    const row = part("div", "mesh-worker");
    row.append(part("span", "mesh-name", worker.name), part("span", "mesh-dim", `blocks ${worker.span}`));
    row.title = worker.address;
    return row;
  });
}

function bar(step) {
  const line = part("div", "mesh-bar");
  for (const [name, label] of PARTS) {
    const share = step.total_ms > 0 ? (100 * step[name]) / step.total_ms : 0;
    const piece = part("span", `mesh-${name}`);
    piece.style.width = `${share}%`;
    piece.title = `${label}: ${milliseconds(step[name])}`;
    line.append(piece);
  }
  return line;
}

function legend(step) {
  const line = part("div", "mesh-legend");
  for (const [name, label] of PARTS.slice(0, 4)) {
    const item = part("span");
    item.append(part("i", `mesh-${name}`), part("span", "", `${label} ${milliseconds(step[name])}`));
    line.append(item);
  }
  return line;
}

function lastStep(status) {
  const { step } = status;
  if (!step || step.total_ms === undefined) return [part("div", "mesh-dim", "no step yet")];
  const saved = step.raw_bytes > 1.02 * step.bytes ? ` of ${bytes(step.raw_bytes)}` : "";
  const head = `step ${milliseconds(step.total_ms)}, ${bytes(step.bytes)}${saved} crossed`;
  const codec = part("div", "mesh-dim mesh-codec", `${status.codec}: ${status.reason}`);
  codec.title = status.reason;
  return [part("div", "mesh-step", head), bar(step), legend(step), codec];
}

export function panel() {
  const element = part("div", "mesh-panel");
  element.append(part("div", "mesh-dim", "Not run yet."));
  let timer;
  function show(status) {
    clearTimeout(timer);
    const head = part("div", "mesh-head");
    head.append(part("span", `mesh-dot mesh-is-${status.state.replace(" ", "-")}`), part("span", "mesh-state", stateText(status)));
    if (status.reconnects) head.append(part("span", "mesh-dim", `reconnected ${status.reconnects} times`));
    const rows = [head, ...workersOf(status)];
    if (status.state === "failed" || status.state === "wrong key" || (status.state === "local" && status.workers.length)) {
      const why = part("div", "mesh-why", status.detail);
      why.title = status.detail;
      rows.push(why);
    } else if (status.workers.length) {
      rows.push(...lastStep(status));
    }
    element.replaceChildren(...rows);
    element.dataset.state = status.state;
    if (status.state === "lost") timer = setTimeout(() => show(status), 1000);
  }
  return { element, show };
}
