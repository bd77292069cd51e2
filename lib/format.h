/* format.h: a .bin file, opened read-only and proven sound before anything in it is used.
 *
 * The layout is drawn in docs/format.md; llama/format.py is the twin that writes it. Everything
 * here points into the mapped file. */
#ifndef FORMAT_H
#define FORMAT_H
#include "guard.h"
#include "llama.h"
#include "quant.h"

struct tensor {
    llama_tensor is;         // name, kind, shape, bytes, crc32
    const struct kind *kind;
    const uint8_t *data;
};

struct file {
    char *path;
    const uint8_t *base;     // the whole file, mapped
    size_t bytes, header_bytes;
    struct guard *guard;
    llama_config config;
    struct tensor *tensors;  // (n_tensors), in the file's order
    size_t n_tensors;
    size_t *by_name;         // (n_tensors) indices of tensors, sorted by name
    llama_meta *metas;       // (n_metas)
    char *meta_keys;         // the keys again, each with a terminator
    size_t n_metas;
    const uint8_t *tokenizer;
    size_t tokenizer_bytes;
    int tokenizer_kind;
};

/* 0, or -1 with the reason; file_close is right after either. */
int file_open(struct file *file, const char *path);
void file_close(struct file *file);
/* RC, the status of something that read the file; -1 with the reason where the file was cut short
 * meanwhile or could not be read, as the numbers read are zeros then. */
int file_done(const struct file *file, int rc);
/* NULL when there is no tensor of that name. */
const struct tensor *file_find(const struct file *file, const char *name);
/* Reads tensor INDEX whole and compares its checksum. */
int file_verify(const struct file *file, size_t index);

/* The CRC-32 of zlib; CRC is 0 at first, or the value so far. */
uint32_t crc32_add(uint32_t crc, const void *data, size_t n);
#endif
