// What the reader sees of "one step": controls, the batch before and after, and the pages of the cache.
"use strict";

const ROWS = 4, COLUMNS = 3, PAGES = 10, MOST_NEW = 6;
const FIELDS = [["inputTokens", "input_tokens"], ["inputPositions", "input_positions"], ["seqLens", "seq_lens"],
                ["slotMapping", "slot_mapping"]];
const UNTIL_STOP = "advance_until_stop";

const page = {
  operator: "advance_step_flashattn",
  numQueries: 3,
  blockSize: 4,
  sampled: [11, 12, 13, 14],
  stopTokenIds: [12],
  state: null,
};

// A batch whose last tokens lie where its lengths say, as a step leaves it.
function firstState() {
  const state = {
    inputTokens: [31, 47, 58, 0], inputPositions: [4, 7, 2, 0], seqLens: [5, 8, 3, 0], slotMapping: [0, 0, 0, -1],
    blockTables: [[7, 3, -1], [2, 9, 4], [0, -1, -1], [-1, -1, -1]],
    status: [0, 0, 0, 4], outputTokens: Array.from({ length: ROWS }, () => Array(MOST_NEW).fill(0)),
    numGenerated: [0, 0, 0, 0], maxSeqLens: [12, 10, 12, 12],
  };
  for (let row = 0; row < ROWS - 1; row++) {
    state.slotMapping[row] = slotOf(state.blockTables[row], state.inputPositions[row], page.blockSize) ?? PAD_SLOT;
  }
  return state;
}

function stepped() {
  return page.operator === UNTIL_STOP
    ? advanceUntilStop(page.state, page.sampled, page.blockSize, page.stopTokenIds)
    : advanceStep(page.operator, page.state, page.sampled, page.numQueries, page.blockSize);
}

function isLive(row) {
  return page.operator === UNTIL_STOP ? page.state.status[row] === RowStatus.RUNNING : row < page.numQueries;
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onchange" || key === "onclick") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// A field for an integer; `set` is given it, and the page is drawn anew.
function integer(label, value, least, most, set) {
  const input = element("input", { type: "number", "aria-label": label, min: least, max: most, step: 1, value });
  input.onchange = () => {
    const number = Math.round(Number(input.value));
    set(Math.min(most, Math.max(least, Number.isFinite(number) ? number : least)));
    draw();
  };
  return input;
}

function controls() {
  const select = element("select", { "aria-label": "operator" },
    ...["advance_step_flashattn", "npu_advance_step_flashattn", UNTIL_STOP].map((name) =>
      element("option", name === page.operator ? { value: name, selected: "" } : { value: name }, name)));
  select.onchange = () => { page.operator = select.value; draw(); };
  const stop = element("input", { "aria-label": "stop_token_ids", value: page.stopTokenIds.join(" "), size: 8 });
  stop.onchange = () => {
    page.stopTokenIds = stop.value.split(/[\s,]+/).filter((word) => /^-?\d+$/.test(word)).map(Number);
    draw();
  };
  const fields = [["operator", select],
    ["block_size", integer("block_size", page.blockSize, 1, 8, (value) => { page.blockSize = value; })]];
  if (page.operator === UNTIL_STOP) fields.push(["stop_token_ids", stop]);
  else {
    fields.push(["num_queries (live rows)",
      integer("num_queries", page.numQueries, 0, ROWS, (value) => { page.numQueries = value; })]);
  }
  const result = stepped();
  const step = element("button", { id: "step", class: "md-button md-button--primary" }, "Take the step");
  step.disabled = Boolean(result.error);
  step.onclick = () => {
    page.state = result.state;
    page.sampled = page.sampled.map((token) => (token + 10) % 100);
    draw();
  };
  const reset = element("button", { id: "reset", class: "md-button" }, "Start again");
  reset.onclick = () => { page.state = firstState(); page.sampled = [11, 12, 13, 14]; draw(); };
  return element("div", { class: "controls" },
    ...fields.map(([name, field]) => element("label", {}, name, field)), step, reset);
}

// What a row may be given: its length, its table, what was sampled.
function rowsTable() {
  const until = page.operator === UNTIL_STOP;
  const head = ["row", "seq_lens", "block_tables (-1: no page)", "sampled_token_ids",
    ...(until ? ["max_seq_lens", "status"] : [])];
  const body = page.sampled.map((_, row) => element("tr", { class: `row${row}` },
    element("th", {}, String(row)),
    element("td", {}, integer(`seq_lens[${row}]`, page.state.seqLens[row], 0, 40,
      (value) => { page.state.seqLens[row] = value; })),
    element("td", {}, ...page.state.blockTables[row].map((id, column) =>
      integer(`block_tables[${row}, ${column}]`, id, -1, PAGES - 1,
        (value) => { page.state.blockTables[row][column] = value; }))),
    element("td", {}, integer(`sampled_token_ids[${row}]`, page.sampled[row], 0, 99,
      (value) => { page.sampled[row] = value; })),
    ...(until ? [
      element("td", {}, integer(`max_seq_lens[${row}]`, page.state.maxSeqLens[row], 0, 40,
        (value) => { page.state.maxSeqLens[row] = value; })),
      element("td", {}, statusField(row))] : [])));
  return element("table", { class: "inputs" }, element("thead", {}, element("tr", {},
    ...head.map((name) => element("th", {}, name)))), element("tbody", {}, ...body));
}

function statusField(row) {
  const names = Object.keys(RowStatus);
  const select = element("select", { "aria-label": `status[${row}]` }, ...names.map((name) =>
    element("option", RowStatus[name] === page.state.status[row] ? { selected: "" } : {}, name)));
  select.onchange = () => { page.state.status[row] = RowStatus[select.value]; draw(); };
  return select;
}

// The batch before and after; what changes is marked.
function comparison(after) {
  const until = page.operator === UNTIL_STOP;
  const fields = until ? [...FIELDS, ["status", "status"], ["numGenerated", "num_generated"]] : FIELDS;
  const shown = (key, value) => (key === "status" ? Object.keys(RowStatus)[value] : String(value));
  const rows = page.sampled.map((_, row) => element("tr", { class: `row${row}` }, element("th", {}, String(row)),
    ...fields.flatMap(([key]) => {
      const old = page.state[key][row], now = after ? after[key][row] : null;
      return [element("td", {}, shown(key, old)),
        element("td", { class: old === now ? "" : "changed", id: `${key}-${row}` }, now === null ? "" : shown(key, now))];
    })));
  return element("table", { class: "comparison" }, element("thead", {},
    element("tr", {}, element("th", {}), ...fields.map(([, name]) => element("th", { colspan: 2 }, name))),
    element("tr", {}, element("th", {}, "row"),
      ...fields.flatMap(() => [element("th", {}, "before"), element("th", {}, "after")]))),
  element("tbody", {}, ...rows));
}

// The cache: which row's token lies in each slot, and where the step's new ones will.
function cache(after) {
  const owner = new Map(), next = new Map();
  for (let row = 0; row < ROWS; row++) {
    for (let position = 0; position < page.state.seqLens[row]; position++) {
      const slot = slotOf(page.state.blockTables[row], position, page.blockSize);
      if (slot !== null && slot >= 0) owner.set(slot, [row, position]);
    }
    if (after && isLive(row) && after.slotMapping[row] >= 0) next.set(after.slotMapping[row], [row, after.inputPositions[row]]);
  }
  return element("div", { class: "cache" }, ...Array.from({ length: PAGES }, (_, id) =>
    element("div", { class: "page" }, element("span", {}, `page ${id}`),
      ...Array.from({ length: page.blockSize }, (_, offset) => {
        const slot = id * page.blockSize + offset;
        const [row, position] = next.get(slot) ?? owner.get(slot) ?? [null, ""];
        const kind = row === null ? "" : `row${row}${next.has(slot) ? " next" : ""}`;
        return element("div", { class: `slot ${kind}`, title: `slot ${slot}`, id: `slot-${slot}` },
          String(position), element("small", {}, String(slot)));
      }))));
}

function draw() {
  const place = document.getElementById("one-step"), result = stepped();
  place.replaceChildren(
    controls(), rowsTable(),
    element("h2", { id: "before-and-after" }, "Before and after"),
    ...(result.error ? [element("p", { class: "refusal", id: "refusal" }, result.error)] : []),
    comparison(result.state), element("h2", { id: "the-cache" }, "The cache"),
    element("p", {}, "Each cell is a slot: the large number is the position of the token that lies in it, the small " +
      "one the slot. The framed ones are where the step's new tokens will be written."),
    cache(result.state));
}

page.state = firstState();
draw();
