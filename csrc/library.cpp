// Every op of the library, one schema each, and the registration of its implementations.
#include <cstdint>
#include <string>

#include "common/registration.h"
#include "recurrent/recurrent.h"

namespace seqkernels {
uint64_t schemas = 0xcbf29ce484222325u;  // FNV-1a of all schemas
}

SEQKERNELS_OPS(m) {
  // Recurrent layers: one layer, both directions. x is [T, B, D], or [N, D] with batch_sizes.
  const auto define = [&m](const std::string& schema) {
    for (const char c : schema + ";") seqkernels::schemas = (seqkernels::schemas ^ uint8_t(c)) * 0x100000001b3u;
    m.def(schema.c_str());
  };
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
    // A prepared module: all layers and directions in one call, float32, inference. x is [B, D] for one step. ranges:
    // [layers, 1 + directions] of the input and of h; numbers: cell_clip, gate_clip, zoneout_h, zoneout_c, norm_eps.
    const std::string prepared =
        ", Tensor[] weights, int precision, int hidden_size, int proj_size, int num_layers, bool bidirectional, int "
        "heads, bool peephole, float[] numbers, Tensor? ranges, Tensor? batch_sizes, Tensor? lengths, Tensor? reset)";
    define(name + "_prepared(Tensor x" + list("Tensor?", "", states, "0") + prepared + " -> Tensor[]");
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
  // Attention to a cache, on a CPU; not differentiable. keys and values [B, Hk, Tk, D or Dv], or with block_table
  // [B, n] [pages, Hk, page_size, ..]: key j of sequence b is row j % page_size of page block_table[b][j / page_size].
  // Their dtype may be another than that of q; with int8, rows are multiplied by key_scales and value_scales
  // [B or pages, Hk, Tk or page_size].
  define(
      "attention_decode(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor? "
      "block_table, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? q_lengths, Tensor? k_lengths, float scale, int "
      "causal, SymInt window_left, SymInt window_right, float softcap) -> Tensor");
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

SEQKERNELS_OPS_ON(CPU, m) {
  seqkernels::implement_layers(m);
  seqkernels::implement_cells(m);
#if !defined(SEQKERNELS_EMULATE_CUDA)
  seqkernels::implement_prepared(m);
#endif
  seqkernels::implement_embedding_bag(m);
  seqkernels::implement_attention(m);
  seqkernels::implement_additive_attention(m);
  seqkernels::implement_crf(m);
  seqkernels::implement_ctc(m);
}

#if defined(SEQKERNELS_HAVE_CUDA)
SEQKERNELS_OPS_ON(CUDA, m) {
  seqkernels::implement_layers(m);
  seqkernels::implement_cells(m);
  seqkernels::implement_embedding_bag(m);
}
#endif
