// The kernels for one instruction set; compiled once for each line of isa.def.
#include "attend.h"

namespace vsb {
namespace VSB_ISA_NAME {

template <class C, class T>
constexpr Kernels kKernels = {scratch_bytes, sum_keys<T>, quantize_keys<T>, attend<C, T>, peak};

// fp32 keeps fp32's accuracy; 16-bit inputs take bf16 products where the CPU has them (bf16
// only: fp16 would lose three bits), else fp32 products with the cheaper exponential.
const Kernels &kernels(int32_t dtype) {
#if VSB_BF16_DOT
  if (dtype == VSB_BF16) return kKernels<Pairs, bf16>;
#else
  if (dtype == VSB_BF16) return kKernels<WidenedFloats, bf16>;
#endif
  if (dtype == VSB_FP16) return kKernels<WidenedFloats, fp16>;
  return kKernels<Floats, float>;
}

}  // namespace VSB_ISA_NAME
}  // namespace vsb
