// Scores of a tile: scale, soft cap, ALiBi and masks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "attention/cpu/blocks.h"

namespace seqkernels::SEQKERNELS_ISA {

enum class Visibility { kNone, kSome, kAll };

template <class S>
struct Scores {
  using T = Compute<S>;
  using V = Native<T>;
  using I = typename Vec<T>::NativeInt;
  static constexpr int kWidth = kLanes<T>;

  const AttentionArgs& a;
  const bool plain;  // scores are the scaled, possibly masked products; the scale is applied in the exponent
  const T scale, cap, cap_inverse;

  explicit Scores(const AttentionArgs& args)
      : a(args),
        plain(args.scale > 0 && args.scale < 1e30 && args.softcap == 0 && args.slopes == nullptr &&
              args.mask_kind != MaskKind::kFloat),
        scale(T(args.scale)),
        cap(T(args.softcap)),
        cap_inverse(args.softcap > 0 ? T(1 / args.softcap) : T(0)) {}

  // Factor that turns a tile's value into a score.
  T left_scale() const { return plain ? scale : T(1); }

  // Keys [j0, j0 + n) of a row's boolean mask.
  const uint8_t* bools(const QueryBlock& q, int64_t r, int64_t j0, int64_t n, uint8_t* copy) const {
    const uint8_t* from = row_of<uint8_t>(a.mask, q.b, q.head[r], q.i[r]) + j0 * a.mask.d;
    if (a.mask.d == 1 && n == kKeys) return from;
    for (int64_t j = 0; j < n; ++j) copy[j] = from[j * a.mask.d];
    memset(copy + n, 0, kKeys - n);
    return copy;
  }

  // Whether a block's mask hides all, some or none of its keys.
  Visibility visibility(const QueryBlock& q, int64_t j0, int64_t n) const {
    if (a.mask_kind == MaskKind::kNone) return Visibility::kAll;
    const bool one_row = a.mask.t == 0 && (a.mask.h == 0 || q.head[0] == q.head[q.n - 1]);
    const int64_t rows = one_row ? 1 : q.n, columns = a.mask.d == 0 ? 1 : n;
    if (a.mask_kind == MaskKind::kBool) {
      bool any = false, any_keys = true;
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* m = row_of<uint8_t>(a.mask, q.b, q.head[r], q.i[r]) + j0 * a.mask.d;
        uint8_t either = 0, both = 1;
        if (a.mask.d == 1) {
          for (int64_t j = 0; j < columns; ++j) {
            either |= m[j];
            both &= m[j];
          }
        } else {
          for (int64_t j = 0; j < columns; ++j) {
            either |= m[j * a.mask.d];
            both &= m[j * a.mask.d];
          }
        }
        any |= either != 0;
        any_keys &= both != 0;
        if (any && !any_keys) return Visibility::kSome;
      }
      return any_keys ? Visibility::kAll : any ? Visibility::kSome : Visibility::kNone;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const S* m = row_of<S>(a.mask, q.b, q.head[r], q.i[r]) + j0 * a.mask.d;
      for (int64_t j = 0; j < columns; ++j) {
        S lanes[kWidth] = {m[j * a.mask.d]};
        if (load(lanes)[0] != -std::numeric_limits<T>::infinity()) return Visibility::kSome;
      }
    }
    return Visibility::kNone;
  }

  // The columns of a tile that are computed, in whole strips.
  static KeyRange columns(const QueryBlock& q, int64_t j0) {
    if (q.all_visible(j0)) return {0, kKeys};
    const KeyRange visible = q.visible_keys(0, q.n, j0);
    return {visible.lo / kStrip<T> * kStrip<T>, round_up(visible.hi, kStrip<T>)};
  }

  // Turns the products [q.n][kKeys] into scores, -inf where a row may not attend to a key. `some`: whether the mask
  // must be read. `capped` [q.n][kKeys] receives the tanh values, unless it is null.
  void finish(const QueryBlock& q, int64_t j0, int64_t n, bool some, KeyRange columns, T* tile, T* capped) const {
    if (plain && !some && q.all_visible(j0)) return;
    const V minus_infinity = broadcast(-std::numeric_limits<T>::infinity());
    I lane;
    for (int l = 0; l < kWidth; ++l) lane[l] = l;
    for (int64_t r = 0; r < q.n; ++r, tile += kKeys) {
      uint8_t copy[kKeys];
      const uint8_t* visible = nullptr;
      T added[kKeys];
      const T* add = nullptr;
      if (a.mask_kind == MaskKind::kBool && some) visible = bools(q, r, j0, n, copy);
      if (a.mask_kind == MaskKind::kFloat) {
        const S* from = row_of<S>(a.mask, q.b, q.head[r], q.i[r]) + j0 * a.mask.d;
        add = added;
        if (a.mask.d == 1 && n == kKeys) {
          if constexpr (sizeof(S) == sizeof(T)) {
            add = from;
          } else {
            for (int64_t j = 0; j < kKeys; j += kWidth) store(added + j, load(from + j));
          }
        } else {
          S lanes[kKeys] = {};
          for (int64_t j = 0; j < n; ++j) lanes[j] = from[j * a.mask.d];
          for (int64_t j = 0; j < kKeys; j += kWidth) store(added + j, load(lanes + j));
        }
      }
      T slope = 0;
      int64_t at = 0;
      if (a.slopes != nullptr) {
        const AttentionSequence& s = a.sequences[q.b];
        slope = T(a.slopes[q.b * a.slopes_b + q.head[r]]);
        at = q.i[r] + (a.causal == Causal::kLowerRight ? s.k_length - s.q_length : 0) - j0;
      }
      const typename Vec<T>::Int lo = typename Vec<T>::Int(maximum(q.keys[r].lo - j0, int64_t{0}));
      const typename Vec<T>::Int hi = typename Vec<T>::Int(min(maximum(q.keys[r].hi - j0, int64_t{0}), kKeys));
      for (int64_t j = columns.lo; j < columns.hi; j += kWidth) {
        V x = load(tile + j);
        if (!plain) {
          x *= scale;
          if (cap > 0) {
            const V t = tanh<T>(x * cap_inverse);
            if (capped != nullptr) store(capped + r * kKeys + j, t);
            x = t * cap;
          }
          if (slope != 0) {
            const V far = T(at - j) - __builtin_convertvector(lane, V);
            x -= slope * (far < T(0) ? -far : far);
          }
        }
        const I place = lane + typename Vec<T>::Int(j);
        I attends = (place >= lo) & (place < hi);
        if (add != nullptr) {
          const V m = load(add + j);
          x += m;
          attends &= m != minus_infinity;  // test m, not x: NaN - inf is NaN
        }
        if (visible != nullptr) {
          typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
          Bytes bytes;
          memcpy(&bytes, visible + j, kWidth);
          attends &= __builtin_convertvector(bytes, I) != 0;
        }
        store(tile + j, attends ? x : minus_infinity);
      }
    }
  }

  // Sets a bit for each key that a row attends to, from finished scores.
  static void visible_words(int64_t rows, KeyRange columns, const T* tile, uint64_t* words) {
    for (int64_t r = 0; r < rows; ++r, tile += kKeys) {
      words[r] = 0;
      for (int64_t j = columns.lo; j < columns.hi; ++j) {
        words[r] |= uint64_t(tile[j] != -std::numeric_limits<T>::infinity()) << j;
      }
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
