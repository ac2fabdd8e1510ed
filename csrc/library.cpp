// Every op of the library, one schema each, and the module that loads them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "common/isa.h"
#include "common/parallel.h"
#include "recurrent/recurrent.h"

namespace py = pybind11;

STABLE_TORCH_LIBRARY(seqkernels, m) {
  // Recurrent layers: one layer, both directions. x is [T, B, D], or [N, D] with batch_sizes.
  m.def(
      "lstm(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "bool bidirectional) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def(
      "lstm_forward(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "bool bidirectional) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, "
      "Tensor? batch_sizes, Tensor? lengths, bool bidirectional, Tensor y, Tensor gates, Tensor cells, bool need_dx, "
      "bool need_dw) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dw)");
  for (const std::string cell : {"gru", "rnn_tanh", "rnn_relu"}) {
    const std::string inputs =
        "Tensor x, Tensor? h0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, bool bidirectional";
    m.def((cell + "(" + inputs + ") -> (Tensor y, Tensor h_n)").c_str());
    m.def((cell + "_forward(" + inputs + ") -> (Tensor y, Tensor h_n, Tensor saved)").c_str());
    m.def((cell + "_backward(Tensor? dy, Tensor? dh_n, " + inputs +
           ", Tensor y, Tensor saved, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dh0, Tensor[] dw)")
              .c_str());
  }
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
  info["cuda"] = false;
  info["compiler"] = __VERSION__;
  return info;
}

py::dict explain_recurrent(int64_t gates, int64_t T, int64_t B, int64_t N, int64_t D, int64_t H, int64_t P,
                           int64_t directions, bool float64) {
  RecurrentArgs args{};
  args.dtype = float64 ? DType::kFloat64 : DType::kFloat32;
  args.walk.T = T;
  args.walk.B = B;
  args.walk.N = N;
  args.directions = directions;
  args.D = D;
  args.H = H;
  args.P = P;
  const Plan plan = plan_recurrent(args, gates, thread_count());
  py::dict result;
  result["isa"] = isa_name(current_isa());
  result["threads"] = plan.threads == 1 ? 1 : plan.row_groups * plan.unit_groups * directions;
  result["row_groups"] = plan.row_groups;
  result["unit_groups"] = plan.unit_groups;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled half of seqkernels: importing it loads the ops.";
  m.def("build_info", &build_info);
  m.def("explain_recurrent", &explain_recurrent, py::arg("gates"), py::arg("T"), py::arg("B"), py::arg("N"),
        py::arg("D"), py::arg("H"), py::arg("P"), py::arg("directions"), py::arg("float64"));
  m.def("set_isa", [](const std::string& name) { return isa_name(set_isa(name)); }, py::arg("name"));
}
