// The Python module of the library: properties of the build, and what the kernels do with given sizes. It is written
// with the limited C API of Python 3.10, so that one binary serves this and every later release; pybind11 needs the
// full API.
#include <algorithm>
#include <array>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "attention/plan.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/python.h"
#include "common/registration.h"
#include "embedding_bag/embedding_bag.h"
#include "recurrent/recurrent.h"
#if defined(SEQKERNELS_HAVE_CUDA) || defined(SEQKERNELS_EMULATE_CUDA)
#define SEQKERNELS_CUDA_KERNELS
#include "recurrent/cuda/launch.h"
#endif

namespace {

using namespace seqkernels;
using python::Arguments, python::Dict;

Dict build_info(Arguments&) {
  std::vector<std::string> isas;
  for (const Isa isa : usable_isas()) isas.push_back(isa_name(isa));
  Dict info;
  info.set("torch", SEQKERNELS_BUILT_WITH_TORCH);
  info.set("isa", isa_name(current_isa()));
  info.set("isas", isas);
#ifdef SEQKERNELS_HAVE_CUDA
  info.set("cuda", true);
  info.set("cuda_architectures", std::vector<int>{SEQKERNELS_CUDA_ARCHITECTURES});
#else
  info.set("cuda", false);
#endif
  info.set("vnni", has_vnni(current_isa()));
  info.set("compiler", __VERSION__);
  return info;
}

CellKind kind_called(const std::string& who, const std::string& name) {
  for (const CellKind kind : kCellKinds) {
    if (name == shape_of(kind).name) return kind;
  }
  throw std::invalid_argument(who + ": kind must be a recurrent op, got " + name);
}

Dict explain_recurrent(Arguments& given) {
  const CellKind kind = kind_called("explain_recurrent", given.read<std::string>("kind"));
  RecurrentArgs args{};
  args.walk.T = given.read<int64_t>("T");
  args.walk.B = given.read<int64_t>("B");
  args.walk.N = given.read<int64_t>("N");
  args.D = given.read<int64_t>("D");
  args.H = given.read<int64_t>("H");
  args.P = given.read<int64_t>("P");
  args.directions = given.read<int64_t>("directions");
  args.heads = given.read<int64_t>("heads", 1);
  args.dtype = given.read<bool>("float64") ? DType::kFloat64 : DType::kFloat32;
  const Plan plan = plan_recurrent(args, kind, thread_count());
  Dict result;
  result.set("isa", isa_name(current_isa()));
  result.set("threads", std::min(plan.threads, plan.row_groups * plan.unit_groups * args.directions * args.heads));
  result.set("row_groups", plan.row_groups);
  result.set("unit_groups", plan.unit_groups);
  return result;
}

int64_t recurrent_saved(Arguments& given) {
  const CellKind kind = kind_called("recurrent_saved", given.read<std::string>("kind"));
  const auto H = given.read<int64_t>("H");
  return saved_width(shape_of(kind), H, given.read<bool>("options"));
}

// The list of cells as Python has it.
std::vector<Dict> recurrent_kinds(Arguments&) {
  std::vector<Dict> kinds;
  for (const CellKind kind : kCellKinds) {
    const CellShape cell = shape_of(kind);
    Dict one;
    one.set("name", cell.name);
    one.set("gates", cell.gate_names);
    one.set("states", cell.state_names);
    one.set("peepholes", cell.peepholes);
    one.set("inner_gates", cell.inner_gates);
    one.set("norm_groups", cell.norm_groups);
    one.set("joint_norm", cell.joint_norm);
    one.set("norm_c", cell.norm_c);
    one.set("heads", cell.heads);
    one.set("projection", cell.projection == Projection::kNever   ? "never"
                          : cell.projection == Projection::kMaybe ? "maybe"
                                                                  : "always");
    one.set("one_bias_gradient", !cell.separate);
    one.set("cuda", cell.cuda);
    one.set("step", cell.step);
    one.set("first", cell.first);
    kinds.push_back(std::move(one));
  }
  return kinds;
}

#ifdef SEQKERNELS_CUDA_KERNELS
// Which CUDA kernels run a layer on a device of that compute capability; 0: on the current one. options: of
// functional/_recurrent_options.py, those in force; of other names nothing depends on them.
Dict explain_recurrent_cuda(Arguments& given) {
  const CellKind kind = kind_called("explain_recurrent_cuda", given.read<std::string>("kind"));
  static const float present = 0;  // what the planner looks at is whether it is there
  RecurrentArgs args{};
  const auto dtype = given.read<std::string>("dtype");
  args.dtype = dtype == "float64"    ? DType::kFloat64
               : dtype == "bfloat16" ? DType::kBFloat16
               : dtype == "float16"  ? DType::kFloat16
                                     : DType::kFloat32;
  args.walk.T = given.read<int64_t>("T");
  args.walk.B = given.read<int64_t>("B");
  args.walk.N = args.walk.T * args.walk.B;
  args.D = given.read<int64_t>("D");
  args.H = given.read<int64_t>("H");
  const auto P = given.read<int64_t>("P", 0);
  args.P = P == 0 ? args.H : P;
  args.directions = given.read<int64_t>("directions", 1);
  args.heads = given.read<int64_t>("heads", 1);
  const auto options = given.read<std::vector<std::string>>("options", {});
  const bool tf32 = given.read<bool>("tf32", false);
  CudaDevice device{};
  device.major = given.read<int>("major", 0);
  device.minor = given.read<int>("minor", 0);
  device.multiprocessors = given.read<int>("multiprocessors", 0);
  device.shared_bytes = given.read<int64_t>("shared_bytes", 0);
  LayerOptions& o = args.options;
  o.cell_clip = o.gate_clip = std::numeric_limits<double>::infinity();
  bool recompute = false;
  for (Weights& weights : args.weights) weights.w_hr = P == 0 ? nullptr : &present;
  for (const std::string& option : options) {
    o.any = o.any || option != "memory_efficient";
    recompute = recompute || option == "memory_efficient";
    if (option == "peephole") {
      for (Weights& weights : args.weights) weights.peephole = &present;
    }
    if (option == "cell_clip") o.cell_clip = 1;
    if (option == "gate_clip") o.gate_clip = 1;
    if (option == "zoneout_h") o.zoneout_h_rate = 0.5;
    if (option == "zoneout_c") o.zoneout_c_rate = 0.5;
    if (option == "recurrent_dropout") o.candidate = reinterpret_cast<const uint8_t*>(&present);
    if (option == "variational_dropout") o.variational = &present;
  }
  args.saved_width = saved_width(shape_of(kind), args.H, o.any);
  device.described = device.major != 0;
  if (!device.described) device = current_cuda_device();
  Dict result;
  const auto show = [&](const char* of, PassKind kind_of_pass) {
    const CudaPlan pass =
        plan_recurrent_cuda(kind, kind_of_pass, args, {nullptr, false, 0, 0, tf32}, recompute, device);
    Dict one;
    one.set("tier", cuda_tier_name(pass.tier));
    if (pass.tier != CudaTier::kNone) {
      one.set("grid", std::array{pass.grid[0], pass.grid[1], pass.grid[2]});
      one.set("block", pass.block);
      one.set("cluster", pass.cluster);
      one.set("teams", pass.teams);
      one.set("rows", pass.rows);
      one.set("shared_bytes", pass.shared_bytes);
      one.set("workspace", pass.workspace);
    }
    one.set("reasons", pass.reasons);
    result.set(of, one);
  };
  show("forward", PassKind::kForward);
  show("backward", PassKind::kBackward);
  return result;
}
#endif

// N indices of a table with D columns, reduced to B bags.
Dict explain_embedding_bag(Arguments& given) {
  const auto N = given.read<int64_t>("N"), B = given.read<int64_t>("B"), D = given.read<int64_t>("D");
  const auto element_size = given.read<int64_t>("element_size");
  Dict result;
  result.set("isa", isa_name(current_isa()));
  result.set("threads", divide((N + B) * D * element_size).threads);
  return result;
}

Dict explain_attention(Arguments& given) {
  const auto B = given.read<int64_t>("B"), Hq = given.read<int64_t>("Hq"), Hk = given.read<int64_t>("Hk"),
             Tq = given.read<int64_t>("Tq"), Tk = given.read<int64_t>("Tk"), D = given.read<int64_t>("D"),
             Dv = given.read<int64_t>("Dv");
  const double pairs = double(B * Hq) * double(Tq * Tk), bytes = 4 * double(B * Hk) * double(Tk * (D + Dv));
  const bool in_place = attention::few_queries(Tq, Hq / Hk);
  const int64_t threads =
      threads_for(in_place ? attention::decode_nanoseconds(pairs, D, Dv, bytes) : attention::nanoseconds(pairs, D, Dv));
  const attention::Plan plan = attention::plan_forward(B, Hq, Hk, Tq, Tk, threads);
  Dict result;
  result.set("isa", isa_name(current_isa()));
  result.set("threads", plan.threads);
  result.set("tasks", plan.tasks);
  result.set("unit", plan.unit == attention::Unit::kGroup ? std::string("groups of heads that share keys")
                     : plan.unit == attention::Unit::kBlock
                         ? "blocks of " + std::to_string(attention::kRows) + " queries"
                         : "chunks of " + std::to_string(attention::kChunkKeys) + " keys");
  result.set("block", std::array<int64_t, 2>{attention::kRows, attention::kKeys});
  result.set("keys", std::string(in_place ? "read in place" : "packed"));
  return result;
}

bool always_parallel(Arguments& given) {
  const bool on = given.read<bool>("on");
  set_always_parallel(on);
  return on;
}

const char* choose_isa(Arguments& given) { return isa_name(set_isa(given.read<std::string>("name"))); }

#ifdef SEQKERNELS_CUDA_KERNELS
bool choose_tf32(Arguments& given) { return set_allows_tf32(given.read<bool>("allow")); }

std::vector<std::string> choose_cuda_tiers(Arguments& given) {
  return set_cuda_tiers(given.read<std::vector<std::string>>("names"));
}
#endif

PyMethodDef methods[] = {
    python::method<build_info>("build_info"),
    python::method<explain_recurrent>("explain_recurrent"),
    python::method<recurrent_kinds>("recurrent_kinds"),
    python::method<recurrent_saved>("recurrent_saved"),
    python::method<always_parallel>("set_always_parallel"),
    python::method<choose_isa>("set_isa"),
#ifdef SEQKERNELS_CUDA_KERNELS
    python::method<choose_tf32>("set_tf32"),
    python::method<choose_cuda_tiers>("set_cuda_tiers"),
    python::method<explain_recurrent_cuda>("explain_recurrent_cuda"),
#endif
    python::method<explain_embedding_bag>("explain_embedding_bag"),
    python::method<explain_attention>("explain_attention"),
    {nullptr, nullptr, 0, nullptr},
};

// TEXT(_C) is "_C", PREFIXED(PyInit_, _C) is PyInit__C.
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOINED(first, second) first##second
#define PREFIXED(prefix, name) JOINED(prefix, name)

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          TEXT(SEQKERNELS_MODULE),
                          "The compiled half of seqkernels: importing it loads the ops.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PREFIXED(PyInit_, SEQKERNELS_MODULE)() {
  PyObject* const module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "namespace", TEXT(SEQKERNELS_NAMESPACE));
    char text[17];
    snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(seqkernels::schemas));
    PyModule_AddStringConstant(module, "schemas", text);
  }
  return module;
}
