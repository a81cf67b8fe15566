// csrc/cuda/prim/tma.cuh for the host: loads happen at a random time, stores when they are waited
// for.
#pragma once

#include "cuda/prim/copy.cuh"
#include "cuda/prim/wgmma_layout.cuh"
#include "mbarrier.cuh"

namespace fastnn {

struct TensorView {
  const void* data;
  int64_t columns, rows, parts, row_stride, part_stride;
  int box_rows;
  int64_t batches = 0, batch_stride = 0;
};
struct TensorMap : TensorView {
  int size;  // of an element
};

inline cudaError_t make_tensor_map(const TensorView& view, Storage storage, TensorMap* map) {
  const int size = storage == Storage::kFloat32 ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
                       view.row_stride * size % 16 == 0 && view.part_stride * size % 16 == 0 &&
                       view.batch_stride * size % 16 == 0;
  if (!aligned || view.box_rows > 256) return cudaErrorInvalidValue;
  *map = {view, size};
  return cudaSuccess;
}

inline void prefetch_map(const TensorMap&) {}

struct Place {
  int column, row, part, batch;
};

// Calls f(element in memory or null, element in shared memory) for a box.
template <typename Element, typename F>
void visit_box(const TensorMap& map, Place place, char* shared, uint32_t at, const F& f) {
  const auto [column, row, part, batch] = place;
  if (at % kSwizzlePattern != 0 || map.size != sizeof(Element)) std::abort();
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < kSwizzleRow / map.size; ++c) {
      const bool inside = column + c >= 0 && column + c < map.columns && row + r >= 0 &&
                          row + r < map.rows && part >= 0 && part < map.parts && batch >= 0 &&
                          batch < std::max<int64_t>(map.batches, 1);
      const auto* data = static_cast<const Element*>(map.data);
      const auto* element = inside ? data + batch * map.batch_stride + part * map.part_stride +
                                         (row + r) * map.row_stride + column + c
                                   : nullptr;
      const uint32_t offset = at + static_cast<uint32_t>(r * kSwizzleRow + c * map.size);
      f(element, reinterpret_cast<Element*>(shared + swizzled(offset)));
    }
  }
}

inline void load_place(void* shared, const TensorMap& map, Place place, Mbarrier* barrier,
                       uint16_t blocks) {
  const uint32_t at = shared_address(shared), barrier_at = shared_address(barrier);
  for (unsigned rank = 0; rank < 16; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    char* const memory = memory_of(rank);
    on_host::block->copies.push_back([=, &map] {
      visit_box<uint16_t>(map, place, memory, at, [](const uint16_t* from, uint16_t* to) {
        *to = from == nullptr ? uint16_t{0} : *from;
      });
      auto& b = HostMbarrier::of(reinterpret_cast<Mbarrier*>(memory + barrier_at));
      b.expect(-map.box_rows * kSwizzleRow);
      b.advance();
    });
  }
}

inline void load_box_multicast(void* shared, const TensorMap& map, int column, int row, int part,
                               Mbarrier* barrier, uint16_t blocks) {
  load_place(shared, map, {column, row, part, 0}, barrier, blocks);
}

// As the instructions have them, of three dimensions and of four.
inline void load_box(void* shared, const TensorMap& map, int column, int row, int part,
                     Mbarrier* barrier) {
  if (map.batches != 0) std::abort();
  load_place(shared, map, {column, row, part, 0}, barrier,
             static_cast<uint16_t>(1u << on_host::rank));
}
inline void load_box(void* shared, const TensorMap& map, int column, int row, int part, int batch,
                     Mbarrier* barrier) {
  if (map.batches == 0) std::abort();
  load_place(shared, map, {column, row, part, batch}, barrier,
             static_cast<uint16_t>(1u << on_host::rank));
}

template <typename Element, typename Combine>
void take_box(const TensorMap& map, Place place, const void* shared, const Combine& combine) {
  char* const memory = on_host::block->shared;
  const uint32_t at = shared_address(shared);
  on_host::fiber().open.push_back([=, &map] {
    visit_box<Element>(map, place, memory, at, [&](const Element* to, const Element* from) {
      if (to != nullptr) *const_cast<Element*>(to) = combine(*to, *from);
    });
  });
}
inline void store_place(const TensorMap& map, Place place, const void* shared) {
  const auto replace = [](auto, auto from) { return from; };
  if (map.size == 4) {
    take_box<float>(map, place, shared, replace);
  } else {
    take_box<uint16_t>(map, place, shared, replace);
  }
}
inline void store_box(const TensorMap& map, int column, int row, int part, const void* shared) {
  if (map.batches != 0) std::abort();
  store_place(map, {column, row, part, 0}, shared);
}
inline void store_box(const TensorMap& map, int column, int row, int part, int batch,
                      const void* shared) {
  if (map.batches == 0) std::abort();
  store_place(map, {column, row, part, batch}, shared);
}
inline void add_box(const TensorMap& map, int column, int row, int part, const void* shared) {
  if (map.batches != 0) std::abort();
  take_box<float>(map, {column, row, part, 0}, shared, std::plus<float>());
}
inline void store_commit() { on_host::commit_group(); }
inline void store_wait_read() { on_host::wait_groups(0); }
inline void fence_async_proxy() {}

}  // namespace fastnn
