/* handles.h: what a handle of llama.h is inside, for the two doors that share it. */
#ifndef HANDLES_H
#define HANDLES_H
#include "model.h"
#include <stdatomic.h>

struct llama_model {
    struct model model;
    atomic_int users;      // 1 for the caller, 1 for each session
};

/* One user less; the last one closes it. */
void model_release(struct llama_model *model);
#endif
