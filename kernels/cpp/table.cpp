// The ops of one instruction set.
#include "ops.h"

namespace mm::MM_ISA {

void linear(const LinearArgs&);
void rms_norm(const RmsNormArgs&);
void silu_mul(const SiluMulArgs&);
void rotary(const RotaryArgs&);
void scatter(const ScatterArgs&);
void gather(const GatherArgs&);
void largest(const LargestArgs&);
void sample(const SampleArgs&);
void attention(const AttentionArgs&);
void quantize_linear(const QuantizeArgs&);
void linear_quantized(const QuantizedLinearArgs&);

extern const Ops table;
const Ops table = {
    linear,  rms_norm, silu_mul,  rotary,          scatter,         gather,
    largest, sample,   attention, quantize_linear, linear_quantized};

}  // namespace mm::MM_ISA
