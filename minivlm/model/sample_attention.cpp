// Causal attention within samples and its gradient, in bfloat16: sample_attention.py compiles and calls this.
//
// Matrices of 32 queries are kept turned, [keys, queries]: the softmax then works on 32 queries side by side, and no
// key after the last of the queries is computed. oneDNN's products want the right-hand matrix in pairs of rows,
// [rows / 2, columns, 2]. Samples are padded to whole blocks with zeros, which weigh nothing in any sum that is read.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
#include <string>
#include <vector>

using at::BFloat16;
using at::native::cpublas::brgemm;  // [M, K] x [K, N] -> float32: M, N, K, three row lengths, whether to add
using Floats = at::vec::Vectorized<float>;
using Halves = at::vec::Vectorized<BFloat16>;

namespace {

constexpr int64_t BLOCK = 32;
static_assert(Halves::size() == BLOCK && Floats::size() * 2 == BLOCK, "written for AVX-512");

struct States {  // [tokens, heads, width]
  BFloat16* data;
  int64_t token_stride, head_stride;
  BFloat16* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

struct Samples {  // side by side in a line of tokens, in their order
  const int64_t *starts, *lengths;
  int64_t count, num_tokens, heads, key_heads, width;
  float scaling;
};

struct Pair {  // 32 numbers
  Floats low, high;
  static Pair of(const float* from) { return {Floats::loadu(from), Floats::loadu(from + Floats::size())}; }
  static Pair of(const BFloat16* from) {
    const auto [low, high] = at::vec::convert_to_float<BFloat16>(Halves::loadu(from));
    return {low, high};
  }
  void store(float* to) const {
    low.store(to);
    high.store(to + Floats::size());
  }
  void store(BFloat16* to) const { at::vec::convert_from_float<BFloat16>(low, high).store(to); }
  Pair exp() const { return {low.exp_u20(), high.exp_u20()}; }
  Pair inverse() const { return {low.reciprocal(), high.reciprocal()}; }
};
Pair operator+(const Pair& a, const Pair& b) { return {a.low + b.low, a.high + b.high}; }
Pair operator-(const Pair& a, const Pair& b) { return {a.low - b.low, a.high - b.high}; }
Pair operator*(const Pair& a, const Pair& b) { return {a.low * b.low, a.high * b.high}; }
Pair larger(const Pair& a, const Pair& b) { return {at::vec::maximum(a.low, b.low), at::vec::maximum(a.high, b.high)}; }
Pair all(float value) { return {Floats(value), Floats(value)}; }

template <typename T, int number>
T* scratch(int64_t size) {  // of this thread, starting at a cache line
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < size + 64) memory.resize(size + 64);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

struct Sample {
  int64_t start, length, padded;
  int64_t first_weight;  // among those of all samples for one head

  void load(const States& from, int64_t head, int64_t width, BFloat16* to) const {
    for (int64_t row = 0; row < length; ++row)
      for (int64_t at = 0; at < width; at += BLOCK)
        Halves::loadu(from.at(start + row, head) + at).store(to + row * width + at);
    const Halves zeros(0.0f);
    for (int64_t at = length * width; at < padded * width; at += BLOCK) zeros.store(to + at);
  }

  void store(const float* from, int64_t first, int64_t rows, float factor, const States& to, int64_t head,
             int64_t width) const {
    for (int64_t row = 0; row < std::min(rows, length - first); ++row)
      for (int64_t at = 0; at < width; at += BLOCK)
        (Pair::of(from + row * width + at) * all(factor)).store(to.at(start + first + row, head) + at);
  }
};

std::vector<Sample> split(const Samples& samples) {
  std::vector<Sample> found;
  int64_t first_weight = 0;
  for (int64_t index = 0; index < samples.count; ++index) {
    const int64_t length = samples.lengths[index], padded = (length + BLOCK - 1) / BLOCK * BLOCK;
    found.push_back({samples.starts[index], length, padded, first_weight});
    first_weight += padded * padded;
  }
  return found;
}

void clear_between(const Samples& samples, const States& states, int64_t heads) {
  for (int64_t index = 0, token = 0; index <= samples.count; ++index) {
    const int64_t end = index < samples.count ? samples.starts[index] : samples.num_tokens;
    for (; token < end; ++token)
      for (int64_t head = 0; head < heads; ++head)
        std::fill_n(states.at(token, head), samples.width, BFloat16(0.0f));
    if (index < samples.count) token = end + samples.lengths[index];
  }
}

void pair_rows(const BFloat16* from, int64_t rows, int64_t width, BFloat16* to) {
  at::vec::pack_vnni2(from, to, width, rows, width);
}

void pair_columns(const BFloat16* from, int64_t rows, int64_t width, BFloat16* to) {  // two numbers move as one float
  at::vec::transpose_mxn<float>(
      reinterpret_cast<const float*>(from), width / 2, reinterpret_cast<float*>(to), rows, rows, width / 2);
}

void turn(const BFloat16* from, int64_t rows, int64_t stride, BFloat16* to) {  // [rows, 32] -> [32, rows]
  for (int64_t row = 0; row < rows; row += BLOCK)
    at::vec::transpose_mxn<BFloat16>(from + row * stride, stride, to + row, rows, BLOCK, BLOCK);
}

const std::array<float, BLOCK * BLOCK> HIDDEN = [] {  // -inf where the key comes after the query
  std::array<float, BLOCK * BLOCK> found{};
  for (int64_t key = 0; key < BLOCK; ++key)
    std::fill_n(found.begin() + key * BLOCK, key, -std::numeric_limits<float>::infinity());
  return found;
}();

void softmax(float* scores, int64_t seen, float scaling, BFloat16* weights, int64_t stride) {
  for (int64_t key = 0; key < BLOCK; ++key) {
    float* row = scores + (seen - BLOCK + key) * BLOCK;
    (Pair::of(row) + Pair::of(HIDDEN.data() + key * BLOCK)).store(row);
  }
  Pair top = Pair::of(scores);
  for (int64_t key = 1; key < seen; ++key) top = larger(top, Pair::of(scores + key * BLOCK));
  Pair sum = top - top;  // 0, or not a number where a score is none: the exponential below would hide it
  for (int64_t key = 0; key < seen; ++key) {
    const Pair value = ((Pair::of(scores + key * BLOCK) - top) * all(scaling)).exp();
    sum = sum + value;
    value.store(scores + key * BLOCK);
  }
  const Pair share = sum.inverse();
  for (int64_t key = 0; key < seen; ++key) (Pair::of(scores + key * BLOCK) * share).store(weights + key * stride);
}

void softmax_gradient(const float* outer, int64_t seen, const BFloat16* weights, BFloat16* to, int64_t stride) {
  Pair mean = all(0.0f);
  for (int64_t key = 0; key < seen; ++key)
    mean = mean + Pair::of(weights + key * stride) * Pair::of(outer + key * BLOCK);
  for (int64_t key = 0; key < seen; ++key)
    (Pair::of(weights + key * stride) * (Pair::of(outer + key * BLOCK) - mean)).store(to + key * stride);
}

template <typename Work>
const char* for_each_group(const Samples& samples, BFloat16* weights, const Work& work) try {
  // work(sample, key head, weights of its first head); returns what went wrong, or null
  const auto each = split(samples);
  const int64_t repeats = samples.heads / samples.key_heads;
  at::parallel_for(0, samples.count * samples.key_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Sample& sample = each[index / samples.key_heads];
      const int64_t group = index % samples.key_heads;
      work(sample, group,
           weights + sample.first_weight * samples.heads + group * repeats * sample.padded * sample.padded);
    }
    at::native::cpublas::brgemm_release();
  });
  return nullptr;
} catch (const std::exception& error) {
  thread_local std::string message;
  message = error.what();
  return message.c_str();
}

}  // namespace

extern "C" const char* attend(const Samples& samples, const States& query, const States& key, const States& value,
                              BFloat16* all_weights, const States& mixed) {
  const int64_t width = samples.width, repeats = samples.heads / samples.key_heads;
  clear_between(samples, mixed, samples.heads);
  return for_each_group(samples, all_weights, [&](const Sample& sample, int64_t group, BFloat16* weights) {
    const int64_t padded = sample.padded, size = padded * width;
    BFloat16 *rows = scratch<BFloat16, 0>(size), *queries = scratch<BFloat16, 1>(size),
             *keys = scratch<BFloat16, 2>(size), *values = scratch<BFloat16, 3>(size),
             *turned = scratch<BFloat16, 4>(BLOCK * padded);
    float *scores = scratch<float, 0>(BLOCK * padded), *result = scratch<float, 1>(BLOCK * width);
    sample.load(value, group, width, rows);
    pair_rows(rows, padded, width, values);
    sample.load(key, group, width, keys);
    for (int64_t head = group * repeats; head < (group + 1) * repeats; ++head, weights += padded * padded) {
      sample.load(query, head, width, rows);
      pair_columns(rows, padded, width, queries);
      for (int64_t first = 0; first < padded; first += BLOCK) {
        const int64_t seen = first + BLOCK;
        brgemm(seen, BLOCK, width, width, padded, BLOCK, false, keys, queries + first * 2, scores);
        softmax(scores, seen, samples.scaling, weights + first, padded);
        turn(weights + first, seen, padded, turned);
        brgemm(BLOCK, width, seen, seen, width, width, false, turned, values, result);
        sample.store(result, first, BLOCK, 1.0f, mixed, head, width);
      }
    }
  });
}

extern "C" const char* differentiate(const Samples& samples, const States& query, const States& key,
                                     const States& value, BFloat16* all_weights, const States& outer,
                                     const States& d_query, const States& d_key, const States& d_value) {
  const int64_t width = samples.width, repeats = samples.heads / samples.key_heads;
  clear_between(samples, d_query, samples.heads);
  clear_between(samples, d_key, samples.key_heads);
  clear_between(samples, d_value, samples.key_heads);
  return for_each_group(samples, all_weights, [&](const Sample& sample, int64_t group, BFloat16* weights) {
    const int64_t padded = sample.padded, size = padded * width;
    BFloat16 *rows = scratch<BFloat16, 0>(size), *keys = scratch<BFloat16, 1>(size),
             *values = scratch<BFloat16, 2>(size), *queries = scratch<BFloat16, 3>(size),
             *outer_rows = scratch<BFloat16, 4>(size), *outer_columns = scratch<BFloat16, 5>(size),
             *d_scores = scratch<BFloat16, 6>(padded * padded), *turned = scratch<BFloat16, 7>(BLOCK * padded);
    float *d_weights = scratch<float, 0>(BLOCK * padded), *result = scratch<float, 1>(BLOCK * width),
          *key_sum = scratch<float, 2>(size), *value_sum = scratch<float, 3>(size);
    sample.load(key, group, width, rows);
    pair_rows(rows, padded, width, keys);
    sample.load(value, group, width, values);
    for (int64_t head = group * repeats; head < (group + 1) * repeats; ++head, weights += padded * padded) {
      const bool adds = head > group * repeats;
      sample.load(query, head, width, rows);
      pair_rows(rows, padded, width, queries);
      sample.load(outer, head, width, rows);
      pair_rows(rows, padded, width, outer_rows);
      pair_columns(rows, padded, width, outer_columns);
      for (int64_t first = 0; first < padded; first += BLOCK) {
        const int64_t seen = first + BLOCK;
        brgemm(seen, BLOCK, width, width, padded, BLOCK, false, values, outer_columns + first * 2, d_weights);
        softmax_gradient(d_weights, seen, weights + first, d_scores + first, padded);
        turn(d_scores + first, seen, padded, turned);
        brgemm(BLOCK, width, seen, seen, width, width, false, turned, keys, result);
        sample.store(result, first, BLOCK, samples.scaling, d_query, head, width);
      }
      for (int64_t first = 0; first < padded; first += BLOCK) {  // keys; no query before them saw them
        const int64_t seers = padded - first, at = first * width, block = first * padded + first;
        brgemm(BLOCK, width, seers, padded, width, width, adds, weights + block, outer_rows + at, value_sum + at);
        brgemm(BLOCK, width, seers, padded, width, width, adds, d_scores + block, queries + at, key_sum + at);
      }
    }
    sample.store(key_sum, 0, padded, samples.scaling, d_key, group, width);
    sample.store(value_sum, 0, padded, 1.0f, d_value, group, width);
  });
}
