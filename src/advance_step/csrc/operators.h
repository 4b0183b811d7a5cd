// Every operator as the dispatcher calls it: read the arguments, demand what the contract asks, run the step.
//
// An Executor is where the rows run: Cpu in cpu.cpp, Cuda in cuda.cu. It says whether tensors are where it can reach
// them (holds), what the compiler may know of strides (with_stride), whether values are checked before the first write
// (kChecksData, any_row), and runs steps (rows, rows_and_pages, tokens).
#pragma once

#include <algorithm>

#include "call.h"
#include "slot_mapping.h"

namespace advance_step {

template <class Executor>
void demand_memory(Call& call, std::initializer_list<const Argument*> all, int written,
                   const Argument* same = nullptr) {
  call.demand(Executor::holds(all.begin(), all.end()));
  call.demand_own_memory(all.begin(), static_cast<int>(all.size()), written, same);
}

struct PlainArguments {
  int64_t num_seqs, num_queries, block_size;
  Argument input_tokens, sampled_token_ids, input_positions, seq_lens, slot_mapping, block_tables;
};

// What both plain contracts ask beyond their own: the state's shapes, devices and memory.
template <class Executor>
void demand_plain(Call& call, const PlainArguments& a) {
  for (const Argument* state : {&a.input_tokens, &a.input_positions, &a.slot_mapping}) {
    call.demand(state->is_int64() && state->is_vector(a.num_seqs));
  }
  call.demand(a.seq_lens.is_vector(a.num_seqs) && a.block_tables.has_rows(a.num_seqs));
  demand_memory<Executor>(
      call, {&a.input_tokens, &a.input_positions, &a.seq_lens, &a.slot_mapping, &a.sampled_token_ids, &a.block_tables},
      4, &a.sampled_token_ids);
}

// Checks the lengths, then calls run(step). The step's kind of stride is that of `metadata`, too.
template <class Executor, class Len, class Page, class Token, class Run>
void advance_plain(Call& call, const PlainArguments& a, std::initializer_list<const Argument*> metadata, Run run) {
  Argument sampled = a.sampled_token_ids;  // [num_queries] or [num_queries, 1]
  sampled.dim = 1;
  const Argument* all[10] = {&a.input_tokens, &sampled,        &a.input_positions,
                             &a.seq_lens,     &a.slot_mapping, &a.block_tables};
  Executor::with_stride(all, std::copy(metadata.begin(), metadata.end(), all + 6), [&](auto stride) {
    using Stride = decltype(stride);
    const auto block_tables = BlockTable<Matrix<const Page, Stride>>::of(a.block_tables.matrix<const Page, Stride>(),
                                                                         a.block_size, largest<Len>());
    const PlainStep<Len, Page, Token, Stride> step{a.num_seqs,
                                                   a.num_queries,
                                                   a.input_tokens.vector<int64_t, Stride>(),
                                                   sampled.vector<const Token, Stride>(),
                                                   a.input_positions.vector<int64_t, Stride>(),
                                                   a.seq_lens.vector<Len, Stride>(),
                                                   a.slot_mapping.vector<int64_t, Stride>(),
                                                   block_tables};
    if constexpr (Executor::kChecksData) {
      const auto last = static_cast<uint64_t>(block_tables.limit - 1);
      const auto seq_lens = step.seq_lens;
      // Negative, or past the last that can be advanced: the top bit of one of the two.
      call.demand(!Executor::any_row(a.num_queries, [=](int64_t i) {
        const auto length = static_cast<uint64_t>(int64_t{seq_lens[i]});
        return length | (last - length);
      }));
    }
    run(step);
  });
}

// In vLLM's argument order, of vLLM's dtypes.
template <class Executor, class Run>
void advance_plain(Call& call, const PlainArguments& a, std::initializer_list<const Argument*> metadata, Run run) {
  const Argument& sampled = a.sampled_token_ids;
  call.demand(a.num_queries >= 0 && a.num_queries <= a.num_seqs && a.block_size >= 1);
  call.demand(a.seq_lens.is_int() && a.block_tables.is_int() && sampled.is_int());
  call.demand(sampled.is_vector(a.num_queries) || sampled.is_matrix(a.num_queries, 1));
  demand_plain<Executor>(call, a);
  with_int_type(a.seq_lens, [&](auto len) {
    with_int_type(a.block_tables, [&](auto page) {
      with_int_type(sampled, [&](auto token) {
        advance_plain<Executor, decltype(len), decltype(page), decltype(token)>(call, a, metadata, run);
      });
    });
  });
}

inline PlainArguments plain_arguments(Call& call) {
  return {call.integer(0), call.integer(1), call.integer(2), call.tensor(3), call.tensor(4),
          call.tensor(5),  call.tensor(6),  call.tensor(7),  call.tensor(8)};
}

template <class Executor>
void advance_step_flashattn(StableIValue* stack, uint64_t, uint64_t) {
  Call call("advance_step::advance_step_flashattn_refusal", stack);
  const PlainArguments a = plain_arguments(call);
  advance_plain<Executor>(call, a, {}, [&](const auto& step) { Executor(a.input_tokens).rows(step, a.num_seqs); });
}

template <class Executor>
void advance_step_flashinfer(StableIValue* stack, uint64_t, uint64_t) {
  Call call("advance_step::advance_step_flashinfer_refusal", stack);
  const PlainArguments a = plain_arguments(call);
  const Argument indices = call.tensor(9), indptr = call.tensor(10), last_page_len = call.tensor(11),
                 bound = call.tensor(12);
  call.demand(indices.is_int32() && indices.dim == 1 && indptr.is_int32() && indptr.dim == 1 &&
              indptr.size[0] - 1 == a.num_seqs);
  call.demand(last_page_len.is_int32() && last_page_len.is_vector(a.num_seqs));
  call.demand(bound.is_int32() && bound.is_vector(a.num_seqs));
  demand_memory<Executor>(call,
                          {&indices, &indptr, &last_page_len, &bound, &a.input_tokens, &a.input_positions, &a.seq_lens,
                           &a.slot_mapping, &a.sampled_token_ids, &a.block_tables},
                          4);
  advance_plain<Executor>(call, a, {&indices, &indptr, &last_page_len, &bound}, [&](const auto& step) {
    const auto table = step.block_tables.ids;
    using Page = std::remove_const_t<std::remove_pointer_t<decltype(table.data)>>;
    using Stride = decltype(table.column_stride);
    const FlashInferPages<Page, Stride> pages{a.num_queries,
                                              table,
                                              step.block_tables.block_size,
                                              indices.vector<int32_t, Stride>(),
                                              indices.size[0],
                                              indptr.vector<int32_t, Stride>(),
                                              last_page_len.vector<int32_t, Stride>(),
                                              bound.vector<int32_t, Stride>()};
    if constexpr (Executor::kChecksData) {
      int64_t needed = 0;
      for (int64_t i = 0; i < a.num_queries; ++i) needed += pages.count(step.seq_lens[i]);
      call.demand(needed <= pages.num_indices);
      call.demand(!Executor::any_row(a.num_queries, [pages, seq_lens = step.seq_lens](int64_t i) {
        return uint64_t{!pages.fits(i, seq_lens[i])} << 63;
      }));
    }
    Executor(a.input_tokens).rows_and_pages(step, pages);
  });
}

template <class Executor>
void advance_speculative(Call& call, const PlainArguments& a, const Argument& spec_token,
                         const Argument& accepted_num) {
  call.demand(a.num_queries == a.num_seqs);
  call.demand(spec_token.is_int64() && spec_token.has_rows(a.num_seqs) && spec_token.size[1] >= 1);
  call.demand(accepted_num.is_int64() && accepted_num.is_vector(a.num_seqs));
  const int64_t columns = 1 + spec_token.size[1];
  for (const Argument* state : {&a.input_tokens, &a.input_positions, &a.seq_lens, &a.slot_mapping}) {
    call.demand(state->is_int64() && (state->is_matrix(a.num_seqs, columns) || state->is_vector(a.num_seqs * columns)));
  }
  call.demand(a.sampled_token_ids.is_int64() && a.sampled_token_ids.is_matrix(a.num_seqs, columns));
  demand_memory<Executor>(call,
                          {&a.input_tokens, &a.input_positions, &a.seq_lens, &a.slot_mapping, &a.sampled_token_ids,
                           &a.block_tables, &spec_token, &accepted_num},
                          4);
  using Table = BlockTable<Matrix<const int64_t>>;
  const SpeculativeStep step{columns,
                             a.input_tokens.matrix<int64_t>(columns),
                             a.sampled_token_ids.matrix<const int64_t>(),
                             a.input_positions.matrix<int64_t>(columns),
                             a.seq_lens.matrix<int64_t>(columns),
                             a.slot_mapping.matrix<int64_t>(columns),
                             Table::of(a.block_tables.matrix<const int64_t>(), a.block_size),
                             spec_token.matrix<const int64_t>(),
                             accepted_num.vector<const int64_t>()};
  if constexpr (Executor::kChecksData) {
    const auto bad = [step](int64_t i) { return uint64_t{!step.can_advance(i)} << 63; };
    call.demand(!Executor::any_row(a.num_seqs, bad));
  }
  Executor(a.input_tokens).rows(step, a.num_seqs * columns);
}

template <class Executor>
void npu_advance_step_flashattn(StableIValue* stack, uint64_t, uint64_t) {
  Call call("advance_step::npu_advance_step_flashattn_refusal", stack);
  const PlainArguments a{call.integer(6), call.integer(7), call.integer(8), call.tensor(0), call.tensor(1),
                         call.tensor(2),  call.tensor(3),  call.tensor(4),  call.tensor(5)};
  call.demand(a.num_seqs >= 1 && a.num_queries >= 1 && a.block_size >= 1 && call.given(9) == call.given(10));
  call.demand(a.block_tables.is_int64() && a.block_tables.has_rows(a.num_seqs) && a.block_tables.size[1] >= 1);
  if (call.given(9)) {
    const Argument spec_token = call.optional_tensor(9), accepted_num = call.optional_tensor(10);
    return advance_speculative<Executor>(call, a, spec_token, accepted_num);
  }
  call.demand(a.num_queries < a.num_seqs && a.seq_lens.is_int64());
  call.demand(a.sampled_token_ids.is_int64() && a.sampled_token_ids.is_matrix(a.num_queries, 1));
  demand_plain<Executor>(call, a);
  advance_plain<Executor, int64_t, int64_t, int64_t>(
      call, a, {}, [&](const auto& step) { Executor(a.input_tokens).rows(step, a.num_seqs); });
}

template <class Executor>
void eagle_step(StableIValue* stack, uint64_t, uint64_t) {
  Call call("advance_step::eagle_step_update_slot_mapping_and_metadata_refusal", stack);
  const Argument positions = call.tensor(0), table = call.tensor(1), seq_lens = call.tensor(2);
  const int64_t block_size = call.integer(3), max_model_len = call.integer(4);
  const Argument out_positions = call.tensor(5), out_slots = call.tensor(6);
  call.demand(block_size >= 1 && max_model_len >= 1 && positions.is_int() && positions.dim == 1);
  const int64_t batch_size = positions.size[0];
  const int64_t rows = call.given(7) ? call.optional_integer(7) : batch_size;
  call.demand(rows >= batch_size && table.is_int() && table.dim == 2 && table.size[0] >= batch_size);
  call.demand(seq_lens.is_int() && seq_lens.dim == 1 && seq_lens.size[0] >= batch_size);
  call.demand(out_positions.dtype == positions.dtype && out_positions.dim == 1 && out_positions.size[0] >= batch_size);
  call.demand(out_slots.is_int64() && out_slots.dim == 1 && out_slots.size[0] >= rows);
  demand_memory<Executor>(call, {&out_positions, &seq_lens, &out_slots, &positions, &table}, 3, &positions);
  with_int_type(positions, [&](auto position) {
    with_int_type(seq_lens, [&](auto len) {
      with_int_type(table, [&](auto page) {
        using Position = decltype(position);
        using Len = decltype(len);
        using Page = decltype(page);
        const Argument* const all[] = {&positions, &seq_lens, &table, &out_positions, &out_slots};
        Executor::with_stride(std::begin(all), std::end(all), [&](auto stride) {
          using Stride = decltype(stride);
          using Table = BlockTable<Matrix<const Page, Stride>>;
          const EagleStep<Position, Len, Page, Stride> step{batch_size,
                                                            at_most<Position>(max_model_len - 1),
                                                            at_most<Len>(max_model_len),
                                                            positions.vector<const Position, Stride>(),
                                                            Table::of(table.matrix<const Page, Stride>(), block_size),
                                                            seq_lens.vector<Len, Stride>(),
                                                            out_positions.vector<Position, Stride>(),
                                                            out_slots.vector<int64_t, Stride>()};
          Executor(positions).rows(step, rows);
        });
      });
    });
  });
}

template <class Executor>
void advance_until_stop(StableIValue* stack, uint64_t, uint64_t) {
  Call call("advance_step::advance_until_stop_refusal", stack);
  const Argument input_tokens = call.tensor(0), input_positions = call.tensor(2), seq_lens = call.tensor(3);
  const Argument status = call.tensor(7), output_tokens = call.tensor(8), num_generated = call.tensor(9);
  const Argument stop_token_ids = call.tensor(10), max_seq_lens = call.tensor(11);
  Argument sampled = call.tensor(1);
  const int64_t groups = call.list(4), tables = call.list(5), sizes = call.list(6);
  call.demand(groups >= 1 && groups <= kMaxGroups && tables == groups && sizes == groups && input_tokens.dim == 1);
  const int64_t rows = input_tokens.size[0];
  const auto is_row_vector = [rows](const Argument& a) { return a.is_int() && a.is_vector(rows); };
  call.demand(input_tokens.is_int64() && input_positions.is_int64() && input_positions.is_vector(rows));
  call.demand(is_row_vector(seq_lens) && is_row_vector(num_generated) && is_row_vector(max_seq_lens));
  call.demand(is_row_vector(sampled) || (sampled.is_int() && sampled.is_matrix(rows, 1)));
  call.demand(status.is_int32() && status.is_vector(rows) && output_tokens.is_int64() && output_tokens.has_rows(rows));
  call.demand(stop_token_ids.is_int64() && stop_token_ids.dim == 1);

  Argument slot_mapping[kMaxGroups], block_table[kMaxGroups];
  int64_t block_size[kMaxGroups];
  const Argument* all[9 + 2 * kMaxGroups] = {&input_tokens, &input_positions, &seq_lens,
                                             &status,       &output_tokens,   &num_generated};
  int written = 6;
  for (int g = 0; g < groups; ++g) {
    slot_mapping[g] = call.tensor_in(4, g);
    block_table[g] = call.tensor_in(5, g);
    block_size[g] = call.integer_in(6, g);
    call.demand(slot_mapping[g].is_int64() && slot_mapping[g].is_vector(rows) && block_size[g] >= 1);
    call.demand(block_table[g].is_int() && block_table[g].has_rows(rows));
    all[written++] = &slot_mapping[g];
  }
  int count = written;
  all[count++] = &sampled;
  all[count++] = &stop_token_ids;
  all[count++] = &max_seq_lens;
  for (int g = 0; g < groups; ++g) all[count++] = &block_table[g];
  call.demand(Executor::holds(all, all + count));
  call.demand_own_memory(all, count, written, &sampled);

  sampled.dim = 1;  // [B] or [B, 1]
  const auto run = [&](auto stride, auto most_groups) {
    using Stride = decltype(stride);
    UntilStopStep<Stride, most_groups> step{call.integer(12),
                                            stop_token_ids.size[0],
                                            input_tokens.vector<int64_t, Stride>(),
                                            input_positions.vector<int64_t, Stride>(),
                                            sampled.int_vector<Stride>(),
                                            seq_lens.int_vector<Stride>(),
                                            num_generated.int_vector<Stride>(),
                                            max_seq_lens.int_vector<Stride>(),
                                            status.vector<int32_t, Stride>(),
                                            output_tokens.matrix<int64_t, Stride>(),
                                            stop_token_ids.vector<const int64_t, Stride>(),
                                            static_cast<int>(groups)};
    for (int g = 0; g < groups; ++g) {
      step.groups[g] = {slot_mapping[g].vector<int64_t, Stride>(),
                        BlockTable<IntMatrix<Stride>>::of(block_table[g].int_matrix<Stride>(), block_size[g])};
    }
    if constexpr (Executor::kChecksData) {
      call.demand(!Executor::any_row(rows, [status = step.status, num_generated = step.num_generated](int64_t i) {
        return status[i] == kRunning ? static_cast<uint64_t>(num_generated.get(i)) : 0;
      }));
    }
    Executor(input_tokens).rows(step, rows);
  };
  Executor::with_stride(all, all + count, [&](auto stride) {
    if (groups == 1) {
      run(stride, std::integral_constant<int, 1>{});
    } else {
      run(stride, std::integral_constant<int, kMaxGroups>{});
    }
  });
}

template <class Executor>
void compute_slot_mapping(StableIValue* stack, uint64_t, uint64_t) {
  Call call("advance_step::compute_slot_mapping_refusal", stack);
  const Argument starts = call.tensor(0), positions = call.tensor(1), table = call.tensor(2), slots = call.tensor(3);
  const int64_t block_size = call.integer(4), cp_world_size = call.integer(5), cp_rank = call.integer(6);
  const int64_t cp_interleave = call.integer(7), pad_slot = call.integer(8);
  call.demand(block_size >= 1 && cp_world_size >= 1 && cp_interleave >= 1 && cp_rank >= 0 && cp_rank < cp_world_size);
  call.demand(block_size <= INT64_MAX / cp_world_size && block_size % cp_interleave == 0);
  call.demand(starts.is_int() && starts.dim == 1 && starts.size[0] >= 1 && positions.is_int() && positions.dim == 1);
  const int64_t num_requests = starts.size[0] - 1, num_positions = positions.size[0];
  call.demand(table.is_int() && table.dim == 2 && table.size[0] >= num_requests);
  call.demand(slots.is_int64() && slots.dim == 1);
  demand_memory<Executor>(call, {&slots, &starts, &positions, &table}, 1);
  with_int_type(positions, [&](auto position) {
    with_int_type(table, [&](auto page) {
      using Position = decltype(position);
      using Page = decltype(page);
      const Argument* const all[] = {&starts, &positions, &table, &slots};
      Executor::with_stride(std::begin(all), std::end(all), [&](auto stride) {
        using Stride = decltype(stride);
        SlotMappingStep<Position, Page, Stride> step{num_requests,
                                                     num_positions,
                                                     starts.int_vector<Stride>(),
                                                     positions.vector<const Position, Stride>(),
                                                     table.matrix<const Page, Stride>(),
                                                     BlockSize::of(block_size),
                                                     BlockSize::of(block_size * cp_world_size),
                                                     cp_world_size,
                                                     cp_rank,
                                                     cp_interleave,
                                                     pad_slot,
                                                     slots.vector<int64_t, Stride>()};
        if constexpr (Executor::kChecksData) {
          const int64_t num_tokens = step.query_start_loc.get(num_requests);
          step.one_token_each = step.has_one_token_each();
          call.demand((step.one_token_each || step.is_query_start_loc()) && num_tokens <= num_positions &&
                      num_tokens <= slots.size[0]);
          const auto last = static_cast<uint64_t>(step.last_position());
          call.demand(!Executor::any_row(num_tokens, [last, positions = step.positions](int64_t t) {
            const auto position = static_cast<uint64_t>(int64_t{positions[t]});
            return position | (last - position);
          }));
        }
        Executor(slots).tokens(step, slots.size[0]);
      });
    });
  });
}

template <class Executor>
void register_operators(torch::stable::detail::StableLibrary& library) {
  library.impl("npu_advance_step_flashattn", npu_advance_step_flashattn<Executor>);
  library.impl("advance_step_flashattn", advance_step_flashattn<Executor>);
  library.impl("advance_step_flashinfer", advance_step_flashinfer<Executor>);
  library.impl("eagle_step_update_slot_mapping_and_metadata", eagle_step<Executor>);
  library.impl("advance_until_stop", advance_until_stop<Executor>);
  library.impl("compute_slot_mapping", compute_slot_mapping<Executor>);
}

}  // namespace advance_step
