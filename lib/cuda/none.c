/* none.c: stands where the CUDA pass would be in a build without it, so that asking for a GPU
 * is one clear answer and never a silent run on the CPU. */
#include "../backend.h"
#include "../error.h"

static int none_open(const struct model *model, const llama_session_options *options,
                     llama_session_info *info, void **state) {
    (void)model, (void)options, (void)info, (void)state;
    return fail("device \"cuda\": this library was built without CUDA; use device \"cpu\"");
}

const struct backend backend_cuda = {.name = "cuda", .open = none_open};
