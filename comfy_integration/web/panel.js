// One node's panel: its workers and their state, the last step, the codec. Gets plain values, knows no network.

import { PANEL } from "./texts.js";

const PARTS = Object.entries(PANEL.parts);

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
    case "loading":
      return PANEL.loading(status.total ? Math.floor((100 * status.done) / status.total) : undefined);
    case "lost":
      return PANEL.lost(ago);
    case "local":
      return PANEL.local;
    default:
      return status.state;
  }
}

function workersOf(status) {
  if (!status.workers.length) return [part("div", "mesh-worker", PANEL.allHere(status.blocks))];
  return status.workers.map((worker) => {
    const row = part("div", "mesh-worker");
    row.append(part("span", "mesh-name", worker.name), part("span", "mesh-dim", PANEL.blocks(worker.span)));
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
  if (!step || step.total_ms === undefined) return [part("div", "mesh-dim", PANEL.noStep)];
  const raw = step.raw_bytes > 1.02 * step.bytes ? bytes(step.raw_bytes) : undefined;
  const head = PANEL.step(milliseconds(step.total_ms), bytes(step.bytes), raw);
  const codec = part("div", "mesh-dim mesh-codec", `${status.codec}: ${status.reason}`);
  codec.title = status.reason;
  return [part("div", "mesh-step", head), bar(step), legend(step), codec];
}

export function panel() {
  const element = part("div", "mesh-panel");
  element.append(part("div", "mesh-dim", PANEL.notRun));
  let timer;
  function show(status) {
    clearTimeout(timer);
    const head = part("div", "mesh-head");
    head.append(part("span", `mesh-dot mesh-is-${status.state.replace(" ", "-")}`), part("span", "mesh-state", stateText(status)));
    if (status.reconnects) head.append(part("span", "mesh-dim", PANEL.reconnected(status.reconnects)));
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
