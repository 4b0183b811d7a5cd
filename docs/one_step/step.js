// The arithmetic of the page "one step", for safe integers. A test holds it to the operators, value for value.
"use strict";

const PAD_SLOT = -1;
const RowStatus = { RUNNING: 0, STOPPED: 1, LENGTH: 2, NO_PAGE: 3, PADDING: 4 };

// The slot of a position by a row's table; null where the table has no column for it.
function slotOf(table, position, blockSize) {
  const column = Math.floor(position / blockSize);
  if (position < 0 || column >= table.length) return null;
  const page = table[column];
  return page < 0 ? PAD_SLOT : page * blockSize + (position % blockSize);
}

// advance_step_flashattn, and the plain mode of npu_advance_step_flashattn: {state} after the step, or {error}.
function advanceStep(operator, state, sampled, numQueries, blockSize) {
  const { inputTokens, inputPositions, seqLens, slotMapping, blockTables } = state;
  const numSeqs = inputTokens.length, width = blockTables[0].length;
  const refuse = (what) => ({ error: `${operator}: ${what}` });
  if (operator === "npu_advance_step_flashattn") {
    if (numQueries < 1) return refuse(`num_queries: expected num_queries >= 1, got ${numQueries}`);
    if (numQueries >= numSeqs) {
      return refuse(`num_queries: expected num_queries < num_seqs with num_seqs=${numSeqs}, got ${numQueries}`);
    }
  }
  for (let row = 0; row < numQueries; row++) {
    if (seqLens[row] < 0 || seqLens[row] >= width * blockSize) {
      return refuse(
        `seq_lens: expected 0 <= position < W * block_size with block_tables [${numSeqs}, W], W=${width}, ` +
        `block_size=${blockSize} in every live row, got position ${seqLens[row]} in row ${row}`);
    }
  }
  const after = copyOf(state);
  for (let row = 0; row < numSeqs; row++) {
    const live = row < numQueries, position = seqLens[row];
    after.inputTokens[row] = live ? sampled[row] : 0;
    after.inputPositions[row] = live ? position : 0;
    after.seqLens[row] = live ? position + 1 : position;
    after.slotMapping[row] = live ? slotOf(blockTables[row], position, blockSize) : PAD_SLOT;
  }
  return { state: after };
}

// advance_until_stop with one KV group: {state} after the step.
function advanceUntilStop(state, sampled, blockSize, stopTokenIds) {
  const after = copyOf(state);
  for (let row = 0; row < sampled.length; row++) {
    after.slotMapping[row] = PAD_SLOT;
    if (state.status[row] !== RowStatus.RUNNING) continue;
    const position = state.seqLens[row], slot = slotOf(state.blockTables[row], position, blockSize);
    const full = state.numGenerated[row] >= state.outputTokens[row].length;
    const stopped = stopTokenIds.includes(sampled[row]), long = position + 1 >= state.maxSeqLens[row];
    const noPage = slot === null || slot === PAD_SLOT;
    after.status[row] = full ? RowStatus.LENGTH : stopped ? RowStatus.STOPPED : long ? RowStatus.LENGTH
      : noPage ? RowStatus.NO_PAGE : RowStatus.RUNNING;
    if (full || (noPage && !stopped && !long)) continue;
    after.outputTokens[row][state.numGenerated[row]] = sampled[row];
    after.numGenerated[row] += 1;
    if (stopped || long) continue;
    after.inputTokens[row] = sampled[row];
    after.inputPositions[row] = position;
    after.seqLens[row] = position + 1;
    after.slotMapping[row] = slot;
  }
  return { state: after };
}

function copyOf(state) {
  return JSON.parse(JSON.stringify(state));
}
