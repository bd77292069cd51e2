#if defined(__x86_64__)
#include "kernels.h"
#if defined(__AVXVNNI__)
void kernels_avxvnni(struct kernels *k)
{
    k->isa = "avxvnni";
}
#else
void kernels_avx2(struct kernels *k)
{
    k->isa = "avx2";
}
#endif
#endif
