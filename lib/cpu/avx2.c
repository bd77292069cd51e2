#if defined(__AVX2__)
#include "kernels.h"
#if defined(__AVXVNNI__)
void kernels_avxvnni(struct kernels *k)
{
    k->isa = "avxvnni";
}
#elif defined(__AVX512VNNI__)
void kernels_evexvnni(struct kernels *k)
{
    k->isa = "evexvnni";
}
#else
void kernels_avx2(struct kernels *k)
{
    k->isa = "avx2";
}
#endif
#endif
