// Elman networks, and which kernels serve which kind of cell.
#include "recurrent/kernels.h"

namespace seqkernels::SEQKERNELS_ISA {

RecurrentKernels rnn_tanh_kernels(bool options) {
  return options ? kernels_of<RNNTanhOptionsCell>() : kernels_of<RNNTanhCell>();
}
RecurrentKernels rnn_relu_kernels(bool options) {
  return options ? kernels_of<RNNReluOptionsCell>() : kernels_of<RNNReluCell>();
}

RecurrentKernels recurrent_kernels(CellKind kind, bool options) {
  switch (kind) {
    case CellKind::kLSTM:
      return lstm_kernels(options);
    case CellKind::kLSTMCoupled:
      return lstm_coupled_kernels();
    case CellKind::kLSTMNorm:
      return lstm_norm_kernels();
    case CellKind::kLSTMNested:
      return lstm_nested_kernels();
    case CellKind::kGRU:
      return gru_kernels(options);
    case CellKind::kGRUBefore:
      return gru_before_kernels();
    case CellKind::kGRUNorm:
      return gru_norm_kernels();
    case CellKind::kGRUProjected:
      return gru_projected_kernels();
    case CellKind::kMGU:
      return mgu_kernels();
    case CellKind::kMGUBefore:
      return mgu_before_kernels();
    case CellKind::kRNNTanh:
      return rnn_tanh_kernels(options);
    case CellKind::kRNNRelu:
      return rnn_relu_kernels(options);
  }
  return {};
}

}  // namespace seqkernels::SEQKERNELS_ISA
