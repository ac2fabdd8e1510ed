// Every op of the library, one schema each, and the module that loads them.
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

SEQKERNELS_OPS(m) {
  // Recurrent layers: one layer, both directions. x is [T, B, D], or [N, D] with batch_sizes.
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  // An argument for each letter of `names`.
  const auto list = [](const std::string& type, const std::string& before, const std::string& names,
                       const std::string& after) {
    std::string text;
    for (const char name : names) text += ", " + type + " " + before + name + after;
    return text;
  };
  const std::string options =
      ", bool bias=True, bool projected=False, bool peephole=False, int heads=1, Tensor? reset=None, Tensor? "
      "zoneout_h=None, Tensor? zoneout_c=None, Tensor? "
      "candidate=None, Tensor? variational=None, float[] numbers=[]";
  using seqkernels::CellKind, seqkernels::CellShape, seqkernels::kCellKinds, seqkernels::shape_of;
  for (const CellKind kind : kCellKinds) {
    const CellShape cell = shape_of(kind);
    const std::string name = cell.name, states = cell.state_names, cells = states.substr(1);
    const std::string inputs = "Tensor x" + list("Tensor?", "", states, "0") +
                               ", Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, bool bidirectional";
    const std::string outputs = "Tensor y" + list("Tensor", "", states, "_n");
    const std::string steps = list("Tensor", "", cells, "_steps");
    define(name + "(" + inputs + options + ") -> (" + outputs + ")");
    define(name + "_forward(" + inputs + options + ", bool recompute=False) -> (" + outputs + ", Tensor saved" + steps +
           ")");
    define(name + "_backward(Tensor? dy" + list("Tensor?", "d", states, "_n") + ", " + inputs +
           ", Tensor y, Tensor saved" + steps + ", bool need_dx, bool need_dw" + options +
           list("Tensor?", "d", cells, "_steps=None") + ") -> (Tensor dx" + list("Tensor", "d", states, "0") +
           ", Tensor[] dw)");
    // A prepared module: all layers and directions in one call, float32, inference. states: empty for zeros. x is [B,
    // D] for one step. ranges: [layers, 1 + directions] of the input and of h; numbers: cell_clip, gate_clip,
    // zoneout_h, zoneout_c, norm_eps.
    const std::string prepared =
        ", Tensor[] weights, int precision, int hidden_size, int proj_size, int num_layers, bool bidirectional, int "
        "heads, bool peephole, float[] numbers, Tensor? ranges, Tensor? batch_sizes, Tensor? lengths, Tensor? reset)";
    define(name + "_prepared(Tensor x, Tensor[] states" + prepared + " -> Tensor[]");
    define(name + "_prepared_(Tensor x, Tensor(a!)[] states" + prepared + " -> Tensor");
    if (!cell.step) continue;
    // One step without options. x is [B, D] or [D]. Gradients that were not requested are undefined; db_hh is returned
    // where it differs from db_ih.
    const std::string step = "Tensor x" + list("Tensor?", "", states, "0") +
                             ", Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh",
                      after = "Tensor h" + list("Tensor", "", cells, "");
    define(name + "_cell(" + step + ") -> (" + after + ")");
    define(name + "_cell_forward(" + step + ") -> (" + after + ", Tensor saved)");
    define(name + "_cell_backward(Tensor? dh" + list("Tensor?", "d", cells, "") + ", " + step + ", " + after +
           ", Tensor saved, bool need_dx, bool need_states, bool need_dw) -> (Tensor dx" +
           list("Tensor", "d", states, "0") + ", Tensor dw_ih, Tensor dw_hh, Tensor db_ih" +
           (cell.separate ? ", Tensor db_hh)" : ")"));
  }

  // Packed weights of prepared modules, see packed_weights.h. precision: 0 float32, 1 bfloat16, 2 float16, 3 int8.
  const std::string packing = ", int gates, int first, int heads, int precision)";
  define("recurrent_pack(Tensor weight" + packing + " -> (Tensor packed, Tensor scales)");
  define("recurrent_unpack(Tensor packed, Tensor scales, int rows, int columns" + packing + " -> Tensor");

  // EmbeddingBag. reduction: 0 sum, 1 mean, 2 max, 3 min; mean_by: 0 count, 1 weight; padding_idx -1: none. input is
  // [N] with offsets, or [B, L] without. `arg` is what forward returned: which position of its bag won a column.
  const std::string bags =
      "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int reduction, int padding_idx=-1, bool "
      "include_last_offset=False, int mean_by=0";
  const std::string upstream = "Tensor grad, Tensor arg, ", frequency = ", bool scale_grad_by_freq=False";
  define("embedding_bag(Tensor weight, " + bags + ") -> Tensor");
  define("embedding_bag_forward(Tensor weight, " + bags + ") -> (Tensor output, Tensor arg)");
  define("embedding_bag_backward(" + upstream + "int num_embeddings, " + bags + frequency + ") -> Tensor");
  define("embedding_bag_backward_sparse(" + upstream + "int num_embeddings, " + bags + frequency +
         ") -> (Tensor rows, Tensor values)");
  define("embedding_bag_backward_weights(" + upstream + "Tensor weight, " + bags + ") -> Tensor");
  define(
      "embedding_bag_update_(Tensor(a!) weight, Tensor(b!)? state1, Tensor(c!)? state2, int optimizer, float[] "
      "numbers, " +
      upstream + bags + frequency + ") -> ()");
  define("embedding_bag_renorm_(Tensor(a!) weight, Tensor indices, float max_norm, float norm_type) -> ()");
  define("embedding_bag_bytes(Tensor packed, " + bags + ") -> Tensor");
  define("embedding_bag_pack_bytes(Tensor weight) -> Tensor");
  // The same over tables that share one input; `features` says how many of the input's features each table serves.
  const std::string tables = "Tensor[] weights, int[] features, ",
                    rows = "int[] num_embeddings, int[] dims, int[] features, ";
  define("embedding_bags(" + tables + bags + ") -> Tensor");
  define("embedding_bags_forward(" + tables + bags + ") -> (Tensor output, Tensor arg)");
  define("embedding_bags_backward(" + upstream + rows + bags + frequency + ") -> Tensor[]");
  define("embedding_bags_backward_sparse(" + upstream + rows + bags + frequency +
         ") -> (Tensor[] rows, Tensor[] values)");
  define("embedding_bags_backward_weights(" + upstream + tables + bags + ") -> Tensor");
  define(
      "embedding_bags_update_(Tensor(a!)[] weights, Tensor(b!)[] state1, Tensor(c!)[] state2, int optimizer, float[] "
      "numbers, " +
      upstream + "int[] features, " + bags + frequency + ") -> ()");

  // Attention. q is [B, Hq, Tq, D]; or [1, Hq, N, D] with cu_q, rows of all sequences. attn_mask: 4 dimensions, each
  // full or 1. causal: 0 none, 1 upper left, 2 lower right; a window below 0: none. keep_low: of half types, out_low is
  // what rounding took from out, for a precise backward pass; empty otherwise and on CUDA.
  const std::string how =
      "SymInt max_q, SymInt max_k, float scale, int causal, SymInt window_left, SymInt window_right, float softcap, "
      "float dropout_p, Tensor? seed";
  const std::string what =
      "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? q_lengths, Tensor? k_lengths, Tensor? cu_q, Tensor? cu_k, " +
      how;
  define("attention_forward(Tensor q, Tensor k, Tensor v, " + what +
         ", bool keep_low=False) -> (Tensor out, Tensor lse, Tensor out_low)");
  define("attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, " + what +
         ", Tensor out, Tensor lse, bool need_dmask, Tensor? out_low=None) -> (Tensor dq, Tensor dk, Tensor dv, Tensor "
         "dmask)");
  define("attention_weights(Tensor q, Tensor k, " + what + ", Tensor lse) -> Tensor");
  define("attention_weights_backward(Tensor dweights, Tensor q, Tensor k, " + what +
         ", Tensor lse, bool need_dmask) -> (Tensor dq, Tensor dk, Tensor dlse, Tensor dmask)");
  define(
      "attention_dense(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? k_lengths, float scale, int causal) -> "
      "Tensor");
  // Attention of projections [B, T, E], or [T, B, E] without batch_first, in eager mode on a CPU. q is [.., 3E], or q
  // is
  // [.., E] and kv is [.., 2E]. padding: bool [B, S], True: masked. need_weights: 0 none, 1 mean, 2 of each head.
  const std::string projected =
      "Tensor q, Tensor? kv, int heads, bool batch_first, Tensor? padding, Tensor? attn_mask, float scale, int causal, "
      "float dropout_p, Tensor? seed";
  define("multihead_attention_forward(" + projected +
         ", int need_weights) -> (Tensor out, Tensor lse, Tensor weights)");
  define("multihead_attention_backward(Tensor dout, " + projected +
         ", Tensor out, Tensor lse) -> (Tensor dq, Tensor dkv)");

  // Additive attention. mask: [B or 1, Tq or 1, Tk]; key_exp: what additive_attention_key_exp returns, for reuse.
  const std::string additive = "Tensor query, Tensor key, Tensor value, Tensor v, ";
  define("additive_attention_forward(" + additive +
         "Tensor? mask, Tensor? lengths, Tensor? key_exp) -> (Tensor out, Tensor weights)");
  define("additive_attention_backward(Tensor? dout, Tensor? dweights, " + additive +
         "Tensor? lengths, Tensor? key_exp, Tensor weights) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dv)");
  define("additive_attention_key_exp(Tensor key) -> Tensor");

  // Conditional random fields. transitions: [B or 1, T or 1, K, K]; mask: [B, T]; log_z and score: float64.
  const std::string chain =
      "Tensor emissions, Tensor transitions, Tensor? start, Tensor? end, Tensor? lengths, Tensor? mask";
  define("crf_forward(" + chain + ", Tensor? tags) -> (Tensor log_z, Tensor score, Tensor alpha)");
  define("crf_backward(Tensor dlog_z, Tensor dscore, " + chain +
         ", Tensor? tags, Tensor alpha) -> (Tensor demissions, Tensor dtransitions, Tensor dstart, Tensor dend)");
  define("crf_viterbi(" + chain + ", int paths) -> (Tensor tags, Tensor scores)");

  // Connectionist temporal classification. targets: [B, S], or [sum of target_lengths]. reduction: 0 none, 1 mean, 2
  // sum. losses: of each sequence, float64.
  const std::string ctc =
      "Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths, int blank, int reduction, "
      "bool zero_infinity";
  define("ctc_loss_forward(" + ctc + ") -> (Tensor loss, Tensor losses, Tensor alpha)");
  define("ctc_loss_backward(Tensor dloss, " + ctc + ", Tensor losses, Tensor alpha) -> Tensor");
}

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
  const int64_t threads = threads_for(attention::nanoseconds(double(B * Hq) * double(Tq * Tk), D, Dv));
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
