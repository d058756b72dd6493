// The ops of one instruction set.
#include "ops.h"

namespace mm::MM_ISA {

void linear(const LinearArgs&);

extern const Ops table;
const Ops table = {linear};

}  // namespace mm::MM_ISA
