// EmbeddingBag operators: checks, allocation, launch. For one table, and for collections of tables.
#include "embedding_bag/embedding_bag.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "common/allocate.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/registration.h"
#include "common/stream.h"
#include "embedding_bag/row_sort.h"
#if defined(SEQKERNELS_HAVE_CUDA) || defined(SEQKERNELS_EMULATE_CUDA)
#define SEQKERNELS_BAGS_ON_GPU
#include "embedding_bag/cuda/launch.h"
#endif

namespace seqkernels {

Division divide(int64_t bytes) {
  constexpr int64_t kBytesPerThread = 64 << 10;  // less does not outweigh the cost of starting a thread
  constexpr double kNanosecondsPerByte = 0.15;
  const int64_t threads = bytes < 2 * kBytesPerThread ? 1 : std::min(thread_count(), bytes / kBytesPerThread);
  return {threads, kNanosecondsPerByte * double(bytes)};
}

namespace {

using OptionalTensor = const std::optional<Tensor>&;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

BagKernels kernels() { SEQKERNELS_RETURN_ON_CURRENT_ISA(bag_kernels); }

constexpr ScalarType type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}
constexpr ScalarType compute_type_of(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Allocates [n] or [n, m] on the device of `like`.
Tensor allocate_like(const Tensor& like, ScalarType type, int64_t n, int64_t m = -1) {
  return m < 0 ? allocate(DevicePlace(like.get()), dtype_code(type), -1, n)
               : allocate(DevicePlace(like.get()), dtype_code(type), n, m);
}

// Arguments that describe the bags, shared by all ops.
struct BagOpArgs {
  const Tensor& indices;
  OptionalTensor offsets;
  OptionalTensor weights;
  int64_t mode, padding;
  bool include_last_offset;
  int64_t mean_by;
};

// The checked bags of a call. Holds tensors that had to be copied and pointers to those that did not.
struct Bags {
  const char* const op;
  const Tensor device;  // all tensors must be on the device of this one
  BagShape shape{};
  Tensor indices, offsets, weights;
  int64_t B = 0;   // bags of all features
  BagTable all{};  // every bag, as one table whose `table` is not set

  Bags(const char* op, const BagOpArgs& inputs, DType dtype, const Tensor& device)
      : op(op), device(device), indices(inputs.indices) {
    shape.dtype = dtype;
    if (inputs.mode < 0 || inputs.mode > 3)
      fail(op, ": mode must be 0 (sum), 1 (mean), 2 (max) or 3 (min), got ", inputs.mode);
    if (inputs.mean_by < 0 || inputs.mean_by > 1)
      fail(op, ": mean_by must be 0 (count) or 1 (weight), got ", inputs.mean_by);
    shape.mode = BagMode(inputs.mode);
    shape.mean_by = MeanBy(inputs.mean_by);
    if (shape.mean_by == MeanBy::kWeight && !inputs.weights) shape.mean_by = MeanBy::kCount;
    const int64_t dims = indices.dim(), N = indices.numel();
    shape.wide_indices = is_wide("input", indices);
    if (!indices.is_contiguous()) indices = torch::stable::contiguous(indices);
    all.indices = indices.const_data_ptr();
    all.N = N;
    all.padding = inputs.padding;
    if (inputs.offsets) {
      if (dims != 1) fail(op, ": input must have 1 dimension where offsets are given, got ", show(shape_of(indices)));
      offsets = *inputs.offsets;
      shape.wide_offsets = is_wide("offsets", offsets);
      if (offsets.dim() != 1) fail(op, ": offsets must have 1 dimension, got ", show(shape_of(offsets)));
      if (!offsets.is_contiguous()) offsets = torch::stable::contiguous(offsets);
      const int64_t count = offsets.numel();
      if (inputs.include_last_offset && count < 1) {
        fail(op, ": offsets must have at least 1 element with include_last_offset, got ", show(shape_of(offsets)));
      }
      B = count - inputs.include_last_offset;
      all.offsets = offsets.const_data_ptr();
      all.offset_count = count;
      if (count > 0 && device.is_cpu()) {  // on a GPU the kernels check it
        const int64_t first =
            shape.wide_offsets ? *static_cast<const int64_t*>(all.offsets) : *static_cast<const int32_t*>(all.offsets);
        raise({first == 0 ? BagFault::kNone : BagFault::kFirstOffset, 0, first}, 0);
      }
    } else {
      if (dims != 2)
        fail(op, ": input must have 2 dimensions where no offsets are given, got ", show(shape_of(indices)));
      if (inputs.include_last_offset)
        fail(op, ": include_last_offset must be False where no offsets are given, got True");
      B = indices.size(0);
      all.length = indices.size(1);
    }
    all.bags = all.batch = B;
    if (inputs.weights) {
      weights = *inputs.weights;
      check_device("per_sample_weights", weights);
      const ScalarType type = weights.scalar_type();
      shape.wide_weights = type == compute_type_of(dtype);
      if (!shape.wide_weights && type != type_of(dtype)) {
        fail(op, ": per_sample_weights must be of the table's dtype ", dtype_name(type_of(dtype)), " or ",
             dtype_name(compute_type_of(dtype)), ", got ", dtype_name(type));
      }
      if (shape_of(weights) != shape_of(inputs.indices)) {
        fail(op, ": per_sample_weights must have the shape of input, ", show(shape_of(inputs.indices)), ", got ",
             show(shape_of(weights)));
      }
      if (!weights.is_contiguous()) weights = torch::stable::contiguous(weights);
      all.weights = weights.const_data_ptr();
    }
  }

  void check_device(const char* name, const Tensor& t) const { seqkernels::check_device(op, name, t, device); }
  bool is_wide(const char* name, const Tensor& t) const {
    check_device(name, t);
    const ScalarType type = t.scalar_type();
    if (type != ScalarType::Int && type != ScalarType::Long) {
      fail(op, ": ", name, " must be int32 or int64, got ", dtype_name(type));
    }
    return type == ScalarType::Long;
  }

  void set_rows(BagTable& t, int64_t E, int64_t D) const {
    t.E = E;
    t.D = D;
    constexpr int64_t kMost = int64_t{1} << 59;  // elements; their bytes cannot overflow
    if (E > kMost / std::max<int64_t>(D, 1)) {
      fail(op, ": a table must have at most ", kMost, " elements, got shape ", show({E, D}));
    }
    if (t.padding < -1 || t.padding >= E) {
      fail(op, ": padding_idx must be in [0, ", E, "), or -1 for none, got ", t.padding);
    }
  }
  void set_table(BagTable& t, const Tensor& table) const {
    check_device("weight", table);
    if (table.dim() != 2) fail(op, ": weight must have 2 dimensions, got ", show(shape_of(table)));
    if (type_of(shape.dtype) != table.scalar_type()) {
      fail(op, ": weight must be ", dtype_name(type_of(shape.dtype)), ", the dtype of the other tensors, got ",
           dtype_name(table.scalar_type()));
    }
    set_rows(t, table.size(0), table.size(1));
    t.table = table.const_data_ptr();
    t.row_stride = table.stride(0);
    t.column_stride = t.D == 1 ? 1 : table.stride(1);
  }
  // For tables that are written: elements must not overlap.
  void check_own_rows(const BagTable& t) const {
    if ((t.E > 1 && t.row_stride == 0) || (t.D > 1 && t.column_stride == 0)) {
      fail(op, ": weight must not be expanded, its rows are written to, got strides ",
           show({t.row_stride, t.column_stride}));
    }
  }
  BagTable of(const Tensor& table) const {
    BagTable t = all;
    set_table(t, table);
    return t;
  }

  Tensor output(int64_t D) const { return allocate_like(device, type_of(shape.dtype), B, D); }
  // arg for max and min; an empty tensor for other modes.
  Tensor positions(int64_t batch, int64_t D) const {
    return shape.extreme() ? allocate_like(device, ScalarType::Int, batch, D)
                           : allocate_like(device, ScalarType::Int, 0);
  }

  void raise(const BagFault& fault, int64_t E) const {
    if (fault.kind == BagFault::kIndex) {
      fail(op, ": input must hold indices in [0, ", E, "), got ", fault.value, " at position ", fault.position);
    }
    if (fault.kind == BagFault::kFirstOffset) fail(op, ": offsets must begin with 0, got ", fault.value);
    if (fault.kind != BagFault::kNone) {
      fail(op, ": offsets must not decrease nor exceed the length of input, ", all.N, ", got ", fault.value,
           " at position ", fault.position);
    }
  }
};

// The gradient of an output as kernels read it: [B, D] with any row stride.
struct OutputGradient {
  Tensor grad, arg;
  OutputGradient(const Bags& bags, const Tensor& grad_, const Tensor& arg_, int64_t batch, int64_t D)
      : grad(grad_), arg(arg_) {
    bags.check_device("grad", grad);
    if (shape_of(grad) != Shape{batch, D}) {
      fail(bags.op, ": grad must have shape ", show({batch, D}), ", got ", show(shape_of(grad)));
    }
    check_dtype(bags.op, "grad", grad, type_of(bags.shape.dtype));
    if (D > 1 && grad.stride(1) != 1) grad = torch::stable::contiguous(grad);
    if (bags.shape.extreme()) arg = checked(bags.op, "arg", arg, ScalarType::Int, {batch, D}, bags.device);
  }
  // Sets the pointers for a table whose columns begin at `column`.
  void set(const Bags& bags, BagTable& t, int64_t column) const {
    const int64_t size = bytes_of(bags.shape.dtype);
    t.out = const_cast<char*>(static_cast<const char*>(grad.const_data_ptr())) + size * column;
    t.out_stride = grad.stride(0);
    if (!bags.shape.extreme()) return;
    t.arg = const_cast<int32_t*>(static_cast<const int32_t*>(arg.const_data_ptr())) + column;
    t.arg_stride = arg.size(1);
  }
};

// The tables of a collection, each with the bags of its features, side by side in the output.
struct Collection {
  std::vector<BagTable> tables;
  std::vector<int64_t> columns;  // first column of each
  const Integers& features;
  int64_t batch, width = 0, max_rows = 0;

  Collection(const Bags& bags, const Integers& features, size_t count)
      : tables(count, bags.all), columns(count), features(features) {
    if (features.size() != count) {
      fail(bags.op, ": features must name a number for each of ", count, " tables, got ", features.size());
    }
    constexpr int64_t kMostFeatures = int64_t{1} << 31;  // their sum cannot overflow
    int64_t total = 0;
    for (const int64_t n : features) {
      if (n < 1) fail(bags.op, ": features must be at least 1 for each table, got ", n);
      if (n > kMostFeatures) fail(bags.op, ": features must be at most ", kMostFeatures, " for each table, got ", n);
      total += n;
    }
    if (bags.all.offsets == nullptr || bags.all.offset_count != bags.B + 1) {
      fail(bags.op, ": offsets must be given, with include_last_offset, for a collection");
    }
    if (total == 0 || bags.B % total != 0) {
      fail(bags.op, ": offsets must have a multiple of ", total,
           " elements (the features of all tables) and one more, got ", bags.B + 1);
    }
    if (bags.all.padding >= 0) fail(bags.op, ": padding_idx must be -1 for a collection, got ", bags.all.padding);
    batch = bags.B / total;
    int64_t feature = 0;
    for (size_t i = 0; i < count; ++i) {
      BagTable& t = tables[i];
      t.offsets = static_cast<const char*>(t.offsets) + feature * batch * (bags.shape.wide_offsets ? 8 : 4);
      t.bags = features[i] * batch;
      t.batch = batch;
      t.offset_count = t.bags + 1;
      feature += features[i];
    }
  }
  void place(size_t i) {
    BagTable& t = tables[i];
    columns[i] = width;
    width += features[i] * t.D;
    max_rows = std::max(max_rows, t.E);
  }
};

// Device dispatch.

#ifdef SEQKERNELS_BAGS_ON_GPU
#ifdef SEQKERNELS_EMULATE_CUDA
bool runs_on_gpu(const Tensor&) { return true; }
#else
bool runs_on_gpu(const Tensor& t) { return !t.is_cpu(); }
#endif

// Selects the device and stream of a tensor for its lifetime and provides scratch memory and the fault word.
struct Gpu : OnDevice {
  const Tensor& like;
  std::optional<Tensor> fault_word;
  // Kernels skip indices that are out of range. SEQKERNELS_CHECKED makes them raise, which waits for the stream.
#ifdef SEQKERNELS_EMULATE_CUDA
  const bool checked = std::getenv("SEQKERNELS_UNCHECKED") == nullptr;  // tests run both
#else
  const bool checked = std::getenv("SEQKERNELS_CHECKED") != nullptr;
#endif
  explicit Gpu(const Tensor& t) : OnDevice(t), like(t) {}

  Tensor scratch(int64_t bytes) const { return allocate_like(like, ScalarType::Byte, bytes); }
  BagFaultWord* fault() {
    if (!checked) return nullptr;
    if (!fault_word) fault_word = torch::stable::new_zeros(like, {1}, ScalarType::Long);
    return static_cast<BagFaultWord*>(fault_word->mutable_data_ptr());
  }
  void raise(const Bags& bags, const BagForward& args) {
    if (!checked) return;
    int64_t max_rows = 0;
    for (int64_t i = 0; i < args.count; ++i) max_rows = std::max(max_rows, args.tables[i].E);
    bags.raise(read_bag_fault(fault(), args, stream), max_rows);
  }
};
#endif

void run_forward(const Bags& bags, const BagTable* tables, int64_t count, int64_t max_rows) {
  const BagForward args{bags.shape, tables, count};
#ifdef SEQKERNELS_BAGS_ON_GPU
  if (runs_on_gpu(bags.device)) {
    Gpu gpu(bags.device);
    Tensor scratch = gpu.scratch(bag_forward_scratch_bytes(args));
    launch_bag_forward(args, gpu.fault(), scratch.mutable_data_ptr(), gpu.stream);
    return gpu.raise(bags, args);
  }
#endif
  bags.raise(kernels().forward(args), max_rows);
}

// Gradients by rows: sorts the rows that occur in some tables and sums their gradients.
class RowGradients {
 public:
  enum class Destination { kDense, kSparse, kStep };
  RowGradients(const Bags& bags, const std::vector<BagBackward>& tables, Destination destination)
      : bags_(bags), tables_(tables) {
#ifdef SEQKERNELS_BAGS_ON_GPU
    if (runs_on_gpu(bags.device)) {
      for (const BagBackward& args : tables) gpu_tables_.push_back(args.table);
      Gpu gpu(bags.device);
      scratch_ = gpu.scratch(bag_rows_scratch_bytes(all()));
      launch_bag_sort(all(), gpu.fault(), scratch_.mutable_data_ptr(), gpu.stream);
      gpu.raise(bags, all());
      return;
    }
#endif
    for (const BagBackward& args : tables) {
      sorted_.push_back(std::make_unique<RowSort>());
      sorted_.back()->dense = destination == Destination::kDense;
      sorted_.back()->counts_unique = destination == Destination::kSparse;
      bags.raise(kernels().sort(args, *sorted_.back()), args.table.E);
    }
  }

  std::vector<int64_t> unique() {
    std::vector<int64_t> counts(tables_.size());
#ifdef SEQKERNELS_BAGS_ON_GPU
    if (runs_on_gpu(bags_.device)) {
      count_bag_rows(all(), counts.data(), scratch_.mutable_data_ptr(), Gpu(bags_.device).stream);
      return counts;
    }
#endif
    for (size_t i = 0; i < counts.size(); ++i) counts[i] = sorted_[i]->unique_before[sorted_[i]->division.threads];
    return counts;
  }

  void reduce(const std::vector<RowTarget>& targets) {
#ifdef SEQKERNELS_BAGS_ON_GPU
    if (runs_on_gpu(bags_.device)) {
      launch_bag_reduce(all(), tables_[0].by_frequency, targets.data(), scratch_.mutable_data_ptr(),
                        Gpu(bags_.device).stream);
      return;
    }
#endif
    for (size_t i = 0; i < targets.size(); ++i) {
      const bool nothing =
          tables_[i].table.D == 0 && targets[i].rows == nullptr;  // row numbers are written even if D is 0
      if (!nothing && tables_[i].table.E > 0) kernels().reduce(tables_[i], *sorted_[i], targets[i]);
    }
  }

 private:
  const Bags& bags_;
  const std::vector<BagBackward>& tables_;
  std::vector<std::unique_ptr<RowSort>> sorted_;
#ifdef SEQKERNELS_BAGS_ON_GPU
  std::vector<BagTable> gpu_tables_;
  Tensor scratch_;
  BagForward all() const { return {bags_.shape, gpu_tables_.data(), int64_t(gpu_tables_.size())}; }
#endif
};

// Forward.

Tensor forward_into(const Bags& bags, BagTable t, Tensor* arg) {
  Tensor out = bags.output(t.D);
  t.out = out.mutable_data_ptr();
  t.out_stride = t.arg_stride = t.D;
  if (arg != nullptr) {
    *arg = bags.positions(t.bags, t.D);
    if (bags.shape.extreme()) t.arg = static_cast<int32_t*>(arg->mutable_data_ptr());
  }
  if (t.D > 0) run_forward(bags, &t, 1, t.E);
  return out;
}

#define SEQKERNELS_BAG_PARAMETERS                                                                       \
  const Tensor &indices, OptionalTensor offsets, OptionalTensor weights, int64_t mode, int64_t padding, \
      bool include_last_offset, int64_t mean_by
#define SEQKERNELS_BAG_INPUTS \
  BagOpArgs { indices, offsets, weights, mode, padding, include_last_offset, mean_by }

Tensor forward_only(const Tensor& weight, SEQKERNELS_BAG_PARAMETERS) {
  const Bags bags("embedding_bag", SEQKERNELS_BAG_INPUTS, dtype_of("embedding_bag", "weight", weight), weight);
  return forward_into(bags, bags.of(weight), nullptr);
}

std::tuple<Tensor, Tensor> forward(const Tensor& weight, SEQKERNELS_BAG_PARAMETERS) {
  const Bags bags("embedding_bag_forward", SEQKERNELS_BAG_INPUTS, dtype_of("embedding_bag_forward", "weight", weight),
                  weight);
  Tensor arg;
  Tensor out = forward_into(bags, bags.of(weight), &arg);
  return {out, arg};
}

Tensor forward_bytes(const Tensor& packed, SEQKERNELS_BAG_PARAMETERS) {
  Bags bags("embedding_bag_bytes", SEQKERNELS_BAG_INPUTS, DType::kFloat32, packed);
  bags.shape.byte_rows = true;
  BagTable t = bags.all;
  bags.check_device("packed", packed);
  check_dtype(bags.op, "packed", packed, ScalarType::Byte);
  if (packed.dim() != 2 || packed.size(1) < 9) {
    fail(bags.op, ": packed must have shape [E, D + 8], got ", show(shape_of(packed)));
  }
  const Tensor rows = packed.stride(1) == 1 ? packed : torch::stable::contiguous(packed);
  bags.set_rows(t, rows.size(0), rows.size(1) - 8);
  t.table = rows.const_data_ptr();
  t.row_stride = rows.stride(0);
  t.column_stride = 1;
  return forward_into(bags, t, nullptr);
}

Tensor pack_bytes(const Tensor& weight) {
  const char* op = "embedding_bag_pack_bytes";
  const DType dtype = dtype_of(op, "weight", weight);
  if (weight.dim() != 2 || weight.size(1) < 1) {
    fail(op, ": weight must have shape [E, D], D at least 1, got ", show(shape_of(weight)));
  }
  BagTable t{};
  t.table = weight.const_data_ptr();
  t.E = weight.size(0);
  t.D = weight.size(1);
  t.row_stride = weight.stride(0);
  t.column_stride = weight.stride(1);
  Tensor packed = allocate_like(weight, ScalarType::Byte, t.E, t.D + 8);
  uint8_t* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
#ifdef SEQKERNELS_BAGS_ON_GPU
  if (runs_on_gpu(weight)) {
    launch_bag_pack_bytes(t, dtype, bytes, Gpu(weight).stream);
    return packed;
  }
#endif
  kernels().pack_bytes(t, dtype, bytes);
  return packed;
}

Tensor forward_collection(const char* op, const Tensors& tables, const Integers& features, const BagOpArgs& inputs,
                          Tensor* arg) {
  if (tables.empty()) fail(op, ": weights must hold at least one table, got none");
  const Bags bags(op, inputs, dtype_of(op, "weight", tables[0]), tables[0]);
  Collection all(bags, features, tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    bags.set_table(all.tables[i], tables[i]);
    all.place(i);
  }
  const int64_t batch = all.batch, width = all.width;
  Tensor out = allocate_like(tables[0], type_of(bags.shape.dtype), batch, width);
  if (arg != nullptr) *arg = bags.positions(batch, width);
  const int64_t size = bytes_of(bags.shape.dtype);
  for (size_t i = 0; i < tables.size(); ++i) {
    BagTable& t = all.tables[i];
    t.out = static_cast<char*>(out.mutable_data_ptr()) + size * all.columns[i];
    t.out_stride = t.arg_stride = width;
    if (arg != nullptr && bags.shape.extreme()) t.arg = static_cast<int32_t*>(arg->mutable_data_ptr()) + all.columns[i];
  }
  if (width > 0) run_forward(bags, all.tables.data(), int64_t(tables.size()), all.max_rows);
  return out;
}

Tensor forward_only_collection(const Tensors& tables, const Integers& features, SEQKERNELS_BAG_PARAMETERS) {
  return forward_collection("embedding_bags", tables, features, SEQKERNELS_BAG_INPUTS, nullptr);
}
std::tuple<Tensor, Tensor> forward_collection_with_arg(const Tensors& tables, const Integers& features,
                                                       SEQKERNELS_BAG_PARAMETERS) {
  Tensor arg;
  Tensor out = forward_collection("embedding_bags_forward", tables, features, SEQKERNELS_BAG_INPUTS, &arg);
  return {out, arg};
}

// Backward by rows.

// Allocates a gradient. Its pages are written once, so large pages pay off.
Tensor allocate_gradient(const Bags& bags, int64_t rows, int64_t D) {
  Tensor t = allocate_like(bags.device, type_of(bags.shape.dtype), rows, D);
  if (t.is_cpu()) advise_large_pages(t.mutable_data_ptr(), size_t(rows * D * bytes_of(bags.shape.dtype)));
  return t;
}

Tensors dense_gradients(const Bags& bags, const std::vector<BagBackward>& tables) {
  RowGradients pass(bags, tables, RowGradients::Destination::kDense);
  Tensors dense;
  std::vector<RowTarget> targets(tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    dense.push_back(allocate_gradient(bags, tables[i].table.E, tables[i].table.D));
    targets[i].dense = dense[i].mutable_data_ptr();
  }
  pass.reduce(targets);
  return dense;
}

std::tuple<Tensors, Tensors> sparse_gradients(const Bags& bags, const std::vector<BagBackward>& tables) {
  RowGradients pass(bags, tables, RowGradients::Destination::kSparse);
  Tensors rows, values;
  const std::vector<int64_t> unique = pass.unique();
  std::vector<RowTarget> targets(tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    rows.push_back(allocate_like(bags.device, ScalarType::Long, unique[i]));
    values.push_back(allocate_gradient(bags, unique[i], tables[i].table.D));
    targets[i].rows = static_cast<int64_t*>(rows[i].mutable_data_ptr());
    targets[i].values = values[i].mutable_data_ptr();
  }
  pass.reduce(targets);
  return {rows, values};
}

// An optimizer step on one table, checked.
struct CheckedStep {
  RowStep step{};
  CheckedStep(const Bags& bags, int64_t optimizer, const std::vector<double>& numbers, OptionalTensor state1,
              OptionalTensor state2, const BagTable& t) {
    constexpr size_t kNumbers[] = {1, 2, 2, 5};
    if (optimizer < 0 || optimizer > 3) {
      fail(bags.op, ": optimizer must be 0 (SGD), 1 (Adagrad), 2 (row-wise Adagrad) or 3 (Adam), got ", optimizer);
    }
    if (numbers.size() != kNumbers[optimizer]) {
      fail(bags.op, ": numbers must have ", kNumbers[optimizer], " elements, got ", numbers.size());
    }
    step.optimizer = RowOptimizer(optimizer);
    step.lr = numbers[0];
    if (optimizer == 3) {
      step.beta1 = numbers[1];
      step.beta2 = numbers[2];
      step.eps = numbers[3];
      step.correction1 = 1 - std::pow(step.beta1, numbers[4]);
      step.correction2 = 1 - std::pow(step.beta2, numbers[4]);
    } else if (optimizer > 0) {
      step.eps = numbers[1];
    }
    bags.check_own_rows(t);
    const Shape wanted = optimizer == 2 ? Shape{t.E} : Shape{t.E, t.D};
    step.state1 = state(bags, "state1", state1, optimizer > 0, wanted);
    step.state2 = state(bags, "state2", state2, optimizer == 3, wanted);
  }
  static void* state(const Bags& bags, const char* name, OptionalTensor tensor, bool wanted, const Shape& shape) {
    if (!wanted) return nullptr;
    if (!tensor) fail(bags.op, ": ", name, " must be given for this optimizer, got None");
    bags.check_device(name, *tensor);
    check_dtype(bags.op, name, *tensor, compute_type_of(bags.shape.dtype));
    check_shape(bags.op, name, *tensor, shape);
    if (!tensor->is_contiguous()) fail(bags.op, ": ", name, " must be contiguous");
    return tensor->mutable_data_ptr();
  }
};

void update(const Bags& bags, const std::vector<BagBackward>& tables, const std::vector<CheckedStep>& steps) {
  RowGradients pass(bags, tables, RowGradients::Destination::kStep);
  std::vector<RowTarget> targets(tables.size());
  for (size_t i = 0; i < tables.size(); ++i) targets[i].step = &steps[i].step;
  pass.reduce(targets);
}

// Backward pass of one table.
struct SingleTableBackward {
  const Bags bags;
  const OutputGradient upstream;
  BagBackward args;
  SingleTableBackward(const char* op, const Tensor& grad, const Tensor& arg, const BagOpArgs& inputs, bool by_frequency)
      : bags(op, inputs, dtype_of(op, "grad", grad), grad),
        upstream(bags, grad, arg, bags.B, grad.dim() == 2 ? grad.size(1) : -1),
        args{bags.shape, bags.all, by_frequency} {
    upstream.set(bags, args.table, 0);
  }
  BagBackward& args_for_rows(int64_t E) {
    if (E < 0) fail(bags.op, ": num_embeddings must not be negative, got ", E);
    bags.set_rows(args.table, E, upstream.grad.size(1));
    return args;
  }
  BagBackward& args_for_table(const Tensor& weight) {
    bags.set_table(args.table, weight);
    if (args.table.D != upstream.grad.size(1)) {
      fail(bags.op, ": grad must have as many columns as weight, ", args.table.D, ", got ", upstream.grad.size(1));
    }
    return args;
  }
};

Tensor backward(const Tensor& grad, const Tensor& arg, int64_t E, SEQKERNELS_BAG_PARAMETERS, bool by_frequency) {
  SingleTableBackward call("embedding_bag_backward", grad, arg, SEQKERNELS_BAG_INPUTS, by_frequency);
  return dense_gradients(call.bags, {call.args_for_rows(E)})[0];
}
std::tuple<Tensor, Tensor> backward_sparse(const Tensor& grad, const Tensor& arg, int64_t E, SEQKERNELS_BAG_PARAMETERS,
                                           bool by_frequency) {
  SingleTableBackward call("embedding_bag_backward_sparse", grad, arg, SEQKERNELS_BAG_INPUTS, by_frequency);
  const auto [rows, values] = sparse_gradients(call.bags, {call.args_for_rows(E)});
  return {rows[0], values[0]};
}
void update_table(const Tensor& weight, OptionalTensor state1, OptionalTensor state2, int64_t optimizer,
                  const std::vector<double>& numbers, const Tensor& grad, const Tensor& arg, SEQKERNELS_BAG_PARAMETERS,
                  bool by_frequency) {
  SingleTableBackward call("embedding_bag_update_", grad, arg, SEQKERNELS_BAG_INPUTS, by_frequency);
  const BagBackward& args = call.args_for_table(weight);
  update(call.bags, {args}, {CheckedStep(call.bags, optimizer, numbers, state1, state2, args.table)});
}

Tensor weight_gradient(const Bags& bags, const std::vector<BagBackward>& tables) {
  if (!bags.weights.defined()) fail(bags.op, ": per_sample_weights must be given, got None");
  const ScalarType type = bags.weights.scalar_type();
  Tensor dweights = bags.indices.dim() == 1
                        ? allocate_like(bags.device, type, bags.all.N)
                        : allocate_like(bags.device, type, bags.indices.size(0), bags.indices.size(1));
#ifdef SEQKERNELS_BAGS_ON_GPU
  if (runs_on_gpu(bags.device)) {
    std::vector<BagTable> call;
    for (const BagBackward& args : tables) call.push_back(args.table);
    const BagForward all{bags.shape, call.data(), int64_t(call.size())};
    Gpu gpu(bags.device);
    Tensor scratch = gpu.scratch(bag_weights_scratch_bytes(all));
    launch_bag_weights(all, dweights.mutable_data_ptr(), gpu.fault(), scratch.mutable_data_ptr(), gpu.stream);
    gpu.raise(bags, all);
    return dweights;
  }
#endif
  for (const BagBackward& args : tables) {
    bags.raise(kernels().weights(args, dweights.mutable_data_ptr()), args.table.E);
  }
  return dweights;
}
Tensor backward_weights(const Tensor& grad, const Tensor& arg, const Tensor& weight, SEQKERNELS_BAG_PARAMETERS) {
  SingleTableBackward call("embedding_bag_backward_weights", grad, arg, SEQKERNELS_BAG_INPUTS, false);
  return weight_gradient(call.bags, {call.args_for_table(weight)});
}

void renorm(const Tensor& weight, const Tensor& indices, double max_norm, double norm_type) {
  const char* op = "embedding_bag_renorm_";
  const std::optional<Tensor> none;
  const Tensor flat = indices.dim() == 2 ? indices : torch::stable::reshape(indices, {1, indices.numel()});
  const Bags bags(op, BagOpArgs{flat, none, none, 0, -1, false, 0}, dtype_of(op, "weight", weight), weight);
  const BagBackward args{bags.shape, bags.of(weight), false};
  bags.check_own_rows(args.table);
#ifdef SEQKERNELS_BAGS_ON_GPU
  if (runs_on_gpu(weight)) {
    BagTable t = args.table;
    t.bags = t.batch = 1;
    t.length = t.N;
    const BagForward all{bags.shape, &t, 1};
    Gpu gpu(weight);
    Tensor scratch = gpu.scratch(bag_renorm_scratch_bytes(all));
    launch_bag_sort(all, gpu.fault(), scratch.mutable_data_ptr(), gpu.stream);
    gpu.raise(bags, all);
    launch_bag_renorm(all, max_norm, norm_type, scratch.mutable_data_ptr(), gpu.stream);
    return;
  }
#endif
  bags.raise(kernels().renorm(args, max_norm, norm_type), args.table.E);
}

// Backward pass of collections.

struct CollectionBackward {
  const Bags bags;
  Collection collection;
  std::optional<OutputGradient> upstream;
  CollectionBackward(const char* op, const Tensor& grad, const Integers& features, const BagOpArgs& inputs,
                     size_t count)
      : bags(op, inputs, dtype_of(op, "grad", grad), grad), collection(bags, features, count) {}
  void set(const Tensor& grad, const Tensor& arg) {
    upstream.emplace(bags, grad, arg, collection.batch, collection.width);
  }
  std::vector<BagBackward> all_args(bool by_frequency) const {
    std::vector<BagBackward> tables;
    for (size_t i = 0; i < collection.tables.size(); ++i) tables.push_back(args_of(i, by_frequency));
    return tables;
  }
  BagBackward args_of(size_t i, bool by_frequency) const {
    BagBackward args{bags.shape, collection.tables[i], by_frequency};
    upstream->set(bags, args.table, collection.columns[i]);
    return args;
  }
};

CollectionBackward collection_with_rows(const char* op, const Tensor& grad, const Tensor& arg, const Integers& E,
                                        const Integers& D, const Integers& features, const BagOpArgs& inputs) {
  if (E.size() != D.size()) {
    fail(op, ": num_embeddings and dims must be as many as tables, got ", E.size(), " and ", D.size());
  }
  CollectionBackward call(op, grad, features, inputs, E.size());
  for (size_t i = 0; i < E.size(); ++i) {
    if (E[i] < 0 || D[i] < 0) fail(op, ": num_embeddings and dims must not be negative, got ", E[i], " and ", D[i]);
    call.bags.set_rows(call.collection.tables[i], E[i], D[i]);
    call.collection.place(i);
  }
  call.set(grad, arg);
  return call;
}
CollectionBackward collection_with_tables(const char* op, const Tensor& grad, const Tensor& arg, const Tensors& tables,
                                          const Integers& features, const BagOpArgs& inputs) {
  CollectionBackward call(op, grad, features, inputs, tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    call.bags.set_table(call.collection.tables[i], tables[i]);
    call.collection.place(i);
  }
  call.set(grad, arg);
  return call;
}

Tensors backward_collection(const Tensor& grad, const Tensor& arg, const Integers& E, const Integers& D,
                            const Integers& features, SEQKERNELS_BAG_PARAMETERS, bool by_frequency) {
  const CollectionBackward call =
      collection_with_rows("embedding_bags_backward", grad, arg, E, D, features, SEQKERNELS_BAG_INPUTS);
  return dense_gradients(call.bags, call.all_args(by_frequency));
}
std::tuple<Tensors, Tensors> backward_sparse_collection(const Tensor& grad, const Tensor& arg, const Integers& E,
                                                        const Integers& D, const Integers& features,
                                                        SEQKERNELS_BAG_PARAMETERS, bool by_frequency) {
  const CollectionBackward call =
      collection_with_rows("embedding_bags_backward_sparse", grad, arg, E, D, features, SEQKERNELS_BAG_INPUTS);
  return sparse_gradients(call.bags, call.all_args(by_frequency));
}
Tensor backward_weights_collection(const Tensor& grad, const Tensor& arg, const Tensors& tables,
                                   const Integers& features, SEQKERNELS_BAG_PARAMETERS) {
  const CollectionBackward call =
      collection_with_tables("embedding_bags_backward_weights", grad, arg, tables, features, SEQKERNELS_BAG_INPUTS);
  return weight_gradient(call.bags, call.all_args(false));
}
void update_collection(const Tensors& tables, const Tensors& state1, const Tensors& state2, int64_t optimizer,
                       const std::vector<double>& numbers, const Tensor& grad, const Tensor& arg,
                       const Integers& features, SEQKERNELS_BAG_PARAMETERS, bool by_frequency) {
  const CollectionBackward call =
      collection_with_tables("embedding_bags_update_", grad, arg, tables, features, SEQKERNELS_BAG_INPUTS);
  const auto state_of = [](const Tensors& states, size_t i) {
    return i < states.size() ? std::optional<Tensor>(states[i]) : std::nullopt;
  };
  std::vector<CheckedStep> steps;  // checks all tables before the first one changes
  for (size_t i = 0; i < tables.size(); ++i) {
    steps.emplace_back(call.bags, optimizer, numbers, state_of(state1, i), state_of(state2, i),
                       call.collection.tables[i]);
  }
  update(call.bags, call.all_args(by_frequency), steps);
}

}  // namespace

void implement_embedding_bag(Library& m) {
  m.impl("embedding_bag", TORCH_BOX(&forward_only));
  m.impl("embedding_bag_forward", TORCH_BOX(&forward));
  m.impl("embedding_bag_backward", TORCH_BOX(&backward));
  m.impl("embedding_bag_backward_sparse", TORCH_BOX(&backward_sparse));
  m.impl("embedding_bag_backward_weights", TORCH_BOX(&backward_weights));
  m.impl("embedding_bag_update_", TORCH_BOX(&update_table));
  m.impl("embedding_bag_renorm_", TORCH_BOX(&renorm));
  m.impl("embedding_bag_bytes", TORCH_BOX(&forward_bytes));
  m.impl("embedding_bag_pack_bytes", TORCH_BOX(&pack_bytes));
  m.impl("embedding_bags", TORCH_BOX(&forward_only_collection));
  m.impl("embedding_bags_forward", TORCH_BOX(&forward_collection_with_arg));
  m.impl("embedding_bags_backward", TORCH_BOX(&backward_collection));
  m.impl("embedding_bags_backward_sparse", TORCH_BOX(&backward_sparse_collection));
  m.impl("embedding_bags_backward_weights", TORCH_BOX(&backward_weights_collection));
  m.impl("embedding_bags_update_", TORCH_BOX(&update_collection));
}

}  // namespace seqkernels
