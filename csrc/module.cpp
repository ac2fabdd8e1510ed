// The pybind11 module of the library: properties of the build, and what the kernels do with given sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "attention/plan.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/registration.h"
#include "embedding_bag/embedding_bag.h"
#include "recurrent/recurrent.h"
#if defined(SEQKERNELS_HAVE_CUDA) || defined(SEQKERNELS_EMULATE_CUDA)
#define SEQKERNELS_CUDA_KERNELS
#include "recurrent/cuda/launch.h"
#endif

namespace py = pybind11;

namespace {

using namespace seqkernels;

py::dict build_info() {
  py::list isas;
  for (const Isa isa : usable_isas()) isas.append(isa_name(isa));
  py::dict info;
  info["torch"] = SEQKERNELS_BUILT_WITH_TORCH;
  info["isa"] = isa_name(current_isa());
  info["isas"] = isas;
#ifdef SEQKERNELS_HAVE_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = std::vector<int>{SEQKERNELS_CUDA_ARCHITECTURES};
#else
  info["cuda"] = false;
#endif
  info["vnni"] = has_vnni(current_isa());
  info["compiler"] = __VERSION__;
  return info;
}

CellKind kind_called(const std::string& who, const std::string& name) {
  for (const CellKind kind : kCellKinds) {
    if (name == shape_of(kind).name) return kind;
  }
  throw py::value_error(who + ": kind must be a recurrent op, got " + name);
}

py::dict explain_recurrent(const std::string& name, int64_t T, int64_t B, int64_t N, int64_t D, int64_t H, int64_t P,
                           int64_t directions, int64_t heads, bool float64) {
  const CellKind kind = kind_called("explain_recurrent", name);
  RecurrentArgs args{};
  args.dtype = float64 ? DType::kFloat64 : DType::kFloat32;
  args.walk.T = T;
  args.walk.B = B;
  args.walk.N = N;
  args.directions = directions;
  args.heads = heads;
  args.D = D;
  args.H = H;
  args.P = P;
  const Plan plan = plan_recurrent(args, kind, thread_count());
  py::dict result;
  result["isa"] = isa_name(current_isa());
  result["threads"] = std::min(plan.threads, plan.row_groups * plan.unit_groups * directions * heads);
  result["row_groups"] = plan.row_groups;
  result["unit_groups"] = plan.unit_groups;
  return result;
}

int64_t recurrent_saved(const std::string& name, int64_t H, bool options) {
  return saved_width(shape_of(kind_called("recurrent_saved", name)), H, options);
}

// The list of cells as Python has it.
py::list recurrent_kinds() {
  py::list kinds;
  for (const CellKind kind : kCellKinds) {
    const CellShape cell = shape_of(kind);
    py::dict one;
    one["name"] = cell.name;
    one["gates"] = cell.gate_names;
    one["states"] = cell.state_names;
    one["peepholes"] = cell.peepholes;
    one["inner_gates"] = cell.inner_gates;
    one["norm_groups"] = cell.norm_groups;
    one["joint_norm"] = cell.joint_norm;
    one["norm_c"] = cell.norm_c;
    one["heads"] = cell.heads;
    one["projection"] = cell.projection == Projection::kNever   ? "never"
                        : cell.projection == Projection::kMaybe ? "maybe"
                                                                : "always";
    one["one_bias_gradient"] = !cell.separate;
    one["cuda"] = cell.cuda;
    one["step"] = cell.step;
    one["first"] = cell.first;
    kinds.append(one);
  }
  return kinds;
}

#ifdef SEQKERNELS_CUDA_KERNELS
// Which CUDA kernels run a layer on a device of that compute capability; 0: on the current one. options: of
// functional/_recurrent_options.py, those in force; of other names nothing depends on them.
py::dict explain_recurrent_cuda(const std::string& name, const std::string& dtype, int64_t T, int64_t B, int64_t D,
                                int64_t H, int64_t P, int64_t directions, int64_t heads,
                                const std::vector<std::string>& options, bool tf32, int major, int minor,
                                int multiprocessors, int64_t shared_bytes) {
  const CellKind kind = kind_called("explain_recurrent_cuda", name);
  static const float present = 0;  // what the planner looks at is whether it is there
  RecurrentArgs args{};
  args.dtype = dtype == "float64"    ? DType::kFloat64
               : dtype == "bfloat16" ? DType::kBFloat16
               : dtype == "float16"  ? DType::kFloat16
                                     : DType::kFloat32;
  args.walk.T = T;
  args.walk.B = B;
  args.walk.N = T * B;
  args.directions = directions;
  args.heads = heads;
  args.D = D;
  args.H = H;
  args.P = P == 0 ? H : P;
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
  args.saved_width = saved_width(shape_of(kind), H, o.any);
  CudaDevice device{major, minor, multiprocessors, shared_bytes};
  device.described = major != 0;
  if (!device.described) device = current_cuda_device();
  py::dict result;
  const auto show = [&](const char* of, PassKind kind_of_pass) {
    const CudaPlan pass =
        plan_recurrent_cuda(kind, kind_of_pass, args, {nullptr, false, 0, 0, tf32}, recompute, device);
    py::dict one;
    one["tier"] = cuda_tier_name(pass.tier);
    if (pass.tier != CudaTier::kNone) {
      one["grid"] = py::make_tuple(pass.grid[0], pass.grid[1], pass.grid[2]);
      one["block"] = pass.block;
      one["cluster"] = pass.cluster;
      one["teams"] = pass.teams;
      one["rows"] = pass.rows;
      one["shared_bytes"] = pass.shared_bytes;
      one["workspace"] = pass.workspace;
    }
    one["reasons"] = pass.reasons;
    result[of] = one;
  };
  show("forward", PassKind::kForward);
  show("backward", PassKind::kBackward);
  return result;
}
#endif

// N indices of a table with D columns, reduced to B bags.
py::dict explain_embedding_bag(int64_t N, int64_t B, int64_t D, int64_t element_size) {
  py::dict result;
  result["isa"] = isa_name(current_isa());
  result["threads"] = divide((N + B) * D * element_size).threads;
  return result;
}

py::dict explain_attention(int64_t B, int64_t Hq, int64_t Hk, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv) {
  const double pairs = double(B * Hq) * double(Tq * Tk), bytes = 4 * double(B * Hk) * double(Tk * (D + Dv));
  const bool in_place = attention::few_queries(Tq, Hq / Hk);
  const int64_t threads =
      threads_for(in_place ? attention::decode_nanoseconds(pairs, D, Dv, bytes) : attention::nanoseconds(pairs, D, Dv));
  const attention::Plan plan = attention::plan_forward(B, Hq, Hk, Tq, Tk, threads);
  py::dict result;
  result["isa"] = isa_name(current_isa());
  result["threads"] = plan.threads;
  result["tasks"] = plan.tasks;
  result["unit"] = plan.unit == attention::Unit::kGroup ? std::string("groups of heads that share keys")
                   : plan.unit == attention::Unit::kBlock
                       ? "blocks of " + std::to_string(attention::kRows) + " queries"
                       : "chunks of " + std::to_string(attention::kChunkKeys) + " keys";
  result["block"] = py::make_tuple(attention::kRows, attention::kKeys);
  result["keys"] = std::string(in_place ? "read in place" : "packed");
  return result;
}

}  // namespace

PYBIND11_MODULE(SEQKERNELS_MODULE, m) {
  m.doc() = "The compiled half of seqkernels: importing it loads the ops.";
  m.def("build_info", &build_info);
  m.def("explain_recurrent", &explain_recurrent, py::arg("kind"), py::arg("T"), py::arg("B"), py::arg("N"),
        py::arg("D"), py::arg("H"), py::arg("P"), py::arg("directions"), py::arg("heads") = 1, py::arg("float64"));
  m.def("recurrent_kinds", &recurrent_kinds);
  m.def("recurrent_saved", &recurrent_saved, py::arg("kind"), py::arg("H"), py::arg("options"));
  m.def("set_always_parallel", &set_always_parallel, py::arg("on"));
  m.def("set_isa", [](const std::string& name) { return isa_name(set_isa(name)); }, py::arg("name"));
#ifdef SEQKERNELS_CUDA_KERNELS
  m.def("set_tf32", &set_allows_tf32, py::arg("allow"));
  m.def("set_cuda_tiers", &set_cuda_tiers, py::arg("names"));
  m.def("explain_recurrent_cuda", &explain_recurrent_cuda, py::arg("kind"), py::arg("dtype"), py::arg("T"),
        py::arg("B"), py::arg("D"), py::arg("H"), py::arg("P") = 0, py::arg("directions") = 1, py::arg("heads") = 1,
        py::arg("options") = std::vector<std::string>(), py::arg("tf32") = false, py::arg("major") = 0,
        py::arg("minor") = 0, py::arg("multiprocessors") = 0, py::arg("shared_bytes") = 0);
#endif
  m.def("explain_embedding_bag", &explain_embedding_bag, py::arg("N"), py::arg("B"), py::arg("D"),
        py::arg("element_size"));
  m.def("explain_attention", &explain_attention, py::arg("B"), py::arg("Hq"), py::arg("Hk"), py::arg("Tq"),
        py::arg("Tk"), py::arg("D"), py::arg("Dv"));
}
