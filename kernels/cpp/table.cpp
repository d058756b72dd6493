// The ops of one instruction set.
#include "ops.h"

namespace mm::MM_ISA {

void linear(const LinearArgs&);
void rms_norm(const RmsNormArgs&);

extern const Ops table;
const Ops table = {linear, rms_norm};

}  // namespace mm::MM_ISA
